//! What the tests of all ops share: random numbers, one reference for two precisions, and the rule by
//! which a result counts as right.

use crate::cuda::{DeviceBuffer, Fault, Gpu, Result};
use half::bf16;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::LazyLock;

/// A float in which a reference can be written once and evaluated in `f32` and in `f64`.
pub(crate) trait Real:
    Copy
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
{
    fn of(x: f64) -> Self;
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    fn sqrt(self) -> Self;
}

macro_rules! real {
    ($($t:ty),*) => {$(
        impl Real for $t {
            fn of(x: f64) -> Self {
                x as $t
            }
            fn exp(self) -> Self {
                self.exp()
            }
            fn ln(self) -> Self {
                self.ln()
            }
            fn sqrt(self) -> Self {
                self.sqrt()
            }
        }
    )*};
}
real!(f32, f64);

/// The numbers in another precision.
pub(crate) fn cast<R: Real>(x: &[f32]) -> Vec<R> {
    x.iter().map(|&x| R::of(f64::from(x))).collect()
}

/// `n` numbers of roughly unit variance, the same for the same seed.
pub(crate) fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| normal(&mut rng)).collect()
}

/// `n` numbers below `bound`.
pub(crate) fn random_ids(n: usize, bound: usize, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(0..bound as u32)).collect()
}

/// [`random`] numbers, rounded.
pub(crate) fn random_bf16(n: usize, seed: u64) -> Vec<bf16> {
    round(&random(n, seed))
}

/// Normal numbers without end, for operands that are too large to draw: 2²⁰ that were drawn, repeated with an odd
/// period, so that no row of a matrix looks like another.
pub(crate) struct Endless {
    numbers: Vec<bf16>,
}

impl Endless {
    pub(crate) fn new(seed: u64) -> Self {
        Self::scaled(seed, 1.0)
    }

    /// The same times a factor.
    pub(crate) fn scaled(seed: u64, factor: f32) -> Self {
        let drawn = random((1 << 20) - 3, seed);
        Self { numbers: drawn.into_iter().map(|x| bf16::from_f32(factor * x)).collect() }
    }

    /// Element `i`.
    pub(crate) fn at(&self, i: usize) -> bf16 {
        self.numbers[i % self.numbers.len()]
    }

    /// The first `len` on a device.
    pub(crate) fn uploaded(&self, gpu: &Gpu, len: usize) -> Result<DeviceBuffer<bf16>> {
        let mut buffer = gpu.alloc(len)?;
        for first in (0..len).step_by(self.numbers.len()) {
            let end = len.min(first + self.numbers.len());
            gpu.upload(&self.numbers[..end - first], &mut buffer[first..end])?;
        }
        Ok(buffer)
    }
}

/// About `count` places below `len`: the first, the last, and others drawn between.
pub(crate) fn places(len: usize, count: usize, seed: u64) -> Vec<usize> {
    let drawn = random_ids(count.saturating_sub(2), len, seed).into_iter().map(|i| i as usize);
    let mut places: Vec<usize> = [0, len - 1].into_iter().chain(drawn).collect();
    places.sort_unstable();
    places.dedup();
    places
}

/// Nothing was left unwritten.
#[track_caller]
pub(crate) fn assert_written(what: &str, found: &[bf16]) {
    let first = found.iter().position(|x| !x.is_finite());
    assert!(first.is_none(), "{what}: element {first:?} of {} is not written", found.len());
}

/// To the nearest bf16.
pub(crate) fn round(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&x| bf16::from_f32(x)).collect()
}

pub(crate) fn widen(x: &[bf16]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

/// The device that tests of kernels run on: the emulated one, whose threads run in the order that the seed
/// decides, or the first GPU where UFT_TEST_DEVICE is `cuda`.
#[track_caller]
pub(crate) fn gpu(seed: u64) -> Gpu {
    // One for all tests: opening it takes longer than most of them.
    static CUDA: LazyLock<Result<Gpu>> = LazyLock::new(|| Gpu::open(0));
    let device = std::env::var("UFT_TEST_DEVICE").unwrap_or_default();
    let gpu = match device.as_str() {
        "" | "emulated" => Gpu::emulated(seed),
        "cuda" => CUDA.clone(),
        other => panic!("UFT_TEST_DEVICE is {other:?}, it may be emulated or cuda"),
    };
    gpu.unwrap_or_else(|error| panic!("{error}"))
}

/// [`gpu`] with what only Hopper has: where the GPU is another one, the emulated device.
#[track_caller]
pub(crate) fn hopper_gpu(seed: u64) -> Gpu {
    let gpu = gpu(seed);
    match gpu.properties().compute_capability {
        (9, 0) => gpu,
        _ => Gpu::emulated_hopper(seed).unwrap_or_else(|error| panic!("{error}")),
    }
}

/// The emulated device with a fault in one of its sources.
#[track_caller]
pub(crate) fn faulty_gpu(
    seed: u64,
    file: &'static str,
    from: &'static str,
    to: &'static str,
) -> Gpu {
    Gpu::emulated_with_fault(seed, Fault { file, from, to })
        .unwrap_or_else(|error| panic!("{error}"))
}

/// Whether a check panics, as it must with a fault in the kernel.
pub(crate) fn fails(check: impl FnOnce()) -> bool {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(check)).is_err()
}

/// Seeds for orders in which a kernel's threads run: in turn, and three that are drawn.
pub(crate) const SEEDS: [u64; 4] = [0, 1, 2, 3];

/// With several blocks emulated at once, also on a machine with one core, so that they wait for each other.
pub(crate) fn together<R: Send>(run: impl FnOnce() -> R + Send) -> R {
    static POOL: LazyLock<ThreadPool> =
        LazyLock::new(|| ThreadPoolBuilder::new().num_threads(4).build().expect("four threads"));
    POOL.install(run)
}

/// Threads of every block that run only when no other can.
#[derive(Clone, Copy)]
pub(crate) enum HeldBack {
    Warp(u64),
    AllButTheFirstLaneOf(u64),
}

impl HeldBack {
    /// Twice as many as [`SEEDS`]: whether a store reads late, and which lane of a warp is last, has to be drawn, too.
    fn orders(self) -> [u64; 8] {
        let held = match self {
            Self::Warp(warp) => warp + 1,
            Self::AllButTheFirstLaneOf(warp) => 1 << 16 | (warp + 1),
        };
        [0, 1, 2, 3, 4, 5, 6, 7].map(|seed| held << 32 | seed)
    }
}

/// `check` passes, and panics in some order of threads when in one of `faults`, (file, right, wrong), what
/// is right is replaced by what is wrong.
#[track_caller]
pub(crate) fn assert_faults_are_caught(
    check: impl Fn(&Gpu),
    faults: &[(&'static str, &'static str, &'static str)],
) {
    check(&gpu(0));
    assert_caught(check, faults, &SEEDS, Gpu::emulated_with_fault);
}

/// The same with what only Hopper has.
#[track_caller]
pub(crate) fn assert_faults_are_caught_on_hopper(
    check: impl Fn(&Gpu),
    faults: &[(&'static str, &'static str, &'static str)],
) {
    check(&hopper_gpu(0));
    assert_caught(check, faults, &SEEDS, Gpu::emulated_hopper_with_fault);
}

/// The same in orders in which threads are held back, also without a fault.
#[track_caller]
pub(crate) fn assert_faults_are_caught_holding_back(
    held_back: HeldBack,
    check: impl Fn(&Gpu),
    faults: &[(&'static str, &'static str, &'static str)],
) {
    let orders = held_back.orders();
    orders.into_iter().for_each(|seed| check(&hopper_gpu(seed)));
    assert_caught(check, faults, &orders, Gpu::emulated_hopper_with_fault);
}

#[track_caller]
fn assert_caught(
    check: impl Fn(&Gpu),
    faults: &[(&'static str, &'static str, &'static str)],
    orders: &[u64],
    device: fn(u64, Fault) -> Result<Gpu>,
) {
    let mut missed = String::new();
    for &(file, from, to) in faults {
        let caught = orders.iter().any(|&seed| {
            let gpu = device(seed, Fault { file, from, to });
            let gpu = gpu.unwrap_or_else(|error| panic!("{error}"));
            let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(&gpu))) else { return false };
            let message = panic.downcast_ref::<String>().map_or("", String::as_str);
            // What is not there, or does not compile, would prove nothing.
            let proves_nothing =
                message.ends_with("times, not once") || message.contains(" error: ");
            assert!(!proves_nothing, "{message}");
            true
        });
        if !caught {
            missed += &format!("{file}: {to:?} for {from:?} is not caught\n");
        }
    }
    assert!(missed.is_empty(), "{missed}");
}

/// Sum of twelve uniforms less six: close enough to normal, and never extreme.
fn normal(rng: &mut impl Rng) -> f32 {
    (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0
}

/// An output that shows whether it was overwritten.
pub(crate) fn poison(n: usize) -> Vec<f32> {
    vec![f32::NAN; n]
}

/// Largest difference from `exact`.
pub(crate) fn error(actual: &[f32], exact: &[f64]) -> f64 {
    assert_eq!(actual.len(), exact.len());
    let differences = actual.iter().zip(exact);
    differences.fold(0.0, |worst, (a, e)| {
        let difference = (f64::from(*a) - e).abs();
        // A NaN in the result must not pass for a small difference.
        if difference.is_nan() { f64::INFINITY } else { difference.max(worst) }
    })
}

/// Right means: at most three times as far from the f64 reference as the same formula evaluated
/// plainly in f32 (plus one rounding of the largest value, for plain runs that happen to be exact).
#[track_caller]
pub(crate) fn assert_accurate(what: &str, actual: &[f32], plain: &[f32], exact: &[f64]) {
    let largest = exact.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let allowed = 3.0 * error(plain, exact) + largest * f64::from(f32::EPSILON);
    let found = error(actual, exact);
    assert!(found <= allowed, "{what}: error {found:e}, allowed {allowed:e}");
}

/// Right in bf16 means the same, where plainly means: inputs in bf16, arithmetic in f32, the result
/// rounded, and what else the kernel rounds on its way. Besides the largest error also the mean square
/// counts, which a loss of precision everywhere cannot hide from behind one unlucky rounding.
#[track_caller]
pub(crate) fn assert_accurate_bf16(what: &str, actual: &[bf16], plain: &[bf16], exact: &[f64]) {
    let (actual, plain) = (widen(actual), widen(plain));
    // Half a unit in the last place.
    let rounding = f64::from(bf16::EPSILON) / 2.0;
    let largest = exact.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let allowed = 3.0 * error(&plain, exact) + largest * rounding;
    let found = error(&actual, exact);
    assert!(found <= allowed, "{what}: error {found:e}, allowed {allowed:e}");
    let mean_square = |x: &[f32]| {
        let squares: f64 = x.iter().zip(exact).map(|(x, e)| (f64::from(*x) - e).powi(2)).sum();
        (squares / exact.len().max(1) as f64).sqrt()
    };
    let scale = (exact.iter().map(|x| x * x).sum::<f64>() / exact.len().max(1) as f64).sqrt();
    let (found, allowed) =
        (mean_square(&actual), 2.0 * mean_square(&plain) + scale * rounding / 8.0);
    assert!(found <= allowed, "{what}: root mean square error {found:e}, allowed {allowed:e}");
}

/// `gradient` is the slope of `f` at `x`: central differences in f64, every element.
#[track_caller]
pub(crate) fn assert_is_slope(f: impl Fn(&[f64]) -> f64, x: &[f64], gradient: &[f64]) {
    const STEP: f64 = 1e-5;
    for i in 0..x.len() {
        let at = |offset: f64| {
            let mut moved = x.to_vec();
            moved[i] += offset;
            f(&moved)
        };
        let slope = (at(STEP) - at(-STEP)) / (2.0 * STEP);
        let difference = (slope - gradient[i]).abs();
        assert!(
            difference <= 1e-7 * (1.0 + slope.abs()),
            "element {i}: slope {slope}, gradient {}",
            gradient[i]
        );
    }
}

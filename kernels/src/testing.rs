//! What the tests of all ops share: random numbers, one reference for two precisions, and the rule by
//! which a result counts as right.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

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

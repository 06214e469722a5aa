//! RMSNorm on a GPU: [`super`]'s functions with bf16 for the numbers and f32 for the roots.

use crate::args;
use crate::cuda::{DeviceSlice, Gpu, Kernel, Result, Source};
use half::bf16;

static SOURCE: Source =
    Source { name: "rmsnorm.cu", text: include_str!("../rmsnorm.cu"), headers: &[] };

/// Numbers of 16 bytes.
const NUMBERS: usize = 8;
const THREADS: u32 = 256;

/// (TEAM, PIECES) of rmsnorm.cu, for ever wider rows.
const TEAMS: [(usize, usize); 9] =
    [(8, 1), (16, 1), (32, 1), (32, 2), (32, 4), (256, 1), (256, 2), (256, 4), (256, 8)];

const fn kernel(name: &'static str, team: (usize, usize)) -> Kernel {
    Kernel::new(&SOURCE, name, THREADS)
        .define("THREADS", THREADS as i64)
        .define("TEAM", team.0 as i64)
        .define("PIECES", team.1 as i64)
}

const FORWARD: &str = "rmsnorm_forward";
const FORWARD_RESIDUAL: &str = "rmsnorm_forward_residual";
const BACKWARD: &str = "rmsnorm_backward";

/// Every kernel that is ever launched here.
pub const KERNELS: [Kernel; 27] = {
    let mut all = [kernel(FORWARD, TEAMS[0]); 27];
    let mut i = 0;
    while i < 9 {
        all[3 * i] = kernel(FORWARD, TEAMS[i]);
        all[3 * i + 1] = kernel(FORWARD_RESIDUAL, TEAMS[i]);
        all[3 * i + 2] = kernel(BACKWARD, TEAMS[i]);
        i += 1;
    }
    all
};

/// `y = w (x s)`; `x`, `y`: `[rows, width]`, `w`: `[width]`, `inv_rms`: `[rows]` receives s for the way
/// back. Overwrites `y` and `inv_rms`. The width is a multiple of 8 and at most 16384.
///
/// # Errors
/// The device's.
pub fn forward(
    gpu: &Gpu,
    x: &DeviceSlice<bf16>,
    w: &DeviceSlice<bf16>,
    eps: f32,
    y: &mut DeviceSlice<bf16>,
    inv_rms: &mut DeviceSlice<f32>,
) -> Result<()> {
    let (rows, width) = (inv_rms.len(), w.len());
    check("x", x, rows, width);
    check("y", y, rows, width);
    let args = args![x, w, eps, y, inv_rms, rows as i64, width as i32];
    launch(gpu, FORWARD, rows, width, args)
}

/// `sum = x + residual`, rounded to bf16, then [`forward`] of it; `residual`, `sum`: `[rows, width]`. [`backward`]
/// takes `sum` for its `x`. Overwrites `sum`, `y` and `inv_rms`.
///
/// # Errors
/// The device's.
pub fn forward_residual(
    gpu: &Gpu,
    x: &DeviceSlice<bf16>,
    residual: &DeviceSlice<bf16>,
    w: &DeviceSlice<bf16>,
    eps: f32,
    sum: &mut DeviceSlice<bf16>,
    y: &mut DeviceSlice<bf16>,
    inv_rms: &mut DeviceSlice<f32>,
) -> Result<()> {
    let (rows, width) = (inv_rms.len(), w.len());
    check("x", x, rows, width);
    check("residual", residual, rows, width);
    check("sum", sum, rows, width);
    check("y", y, rows, width);
    let args = args![x, residual, w, eps, sum, y, inv_rms, rows as i64, width as i32];
    launch(gpu, FORWARD_RESIDUAL, rows, width, args)
}

/// `dx += s w dy - x s³ mean(w dy x)`; shapes as in [`forward`], `inv_rms` as it left it. Accumulates
/// into `dx`, rounding once.
///
/// # Errors
/// The device's.
pub fn backward(
    gpu: &Gpu,
    dy: &DeviceSlice<bf16>,
    x: &DeviceSlice<bf16>,
    w: &DeviceSlice<bf16>,
    inv_rms: &DeviceSlice<f32>,
    dx: &mut DeviceSlice<bf16>,
) -> Result<()> {
    let (rows, width) = (inv_rms.len(), w.len());
    check("dy", dy, rows, width);
    check("x", x, rows, width);
    check("dx", dx, rows, width);
    let args = args![dy, x, w, inv_rms, dx, rows as i64, width as i32];
    launch(gpu, BACKWARD, rows, width, args)
}

#[track_caller]
fn check(name: &str, x: &DeviceSlice<bf16>, rows: usize, width: usize) {
    assert_eq!(x.len(), rows * width, "rmsnorm: {name} must be [{rows}, {width}]");
}

fn launch(
    gpu: &Gpu,
    name: &'static str,
    rows: usize,
    width: usize,
    args: crate::cuda::Args,
) -> Result<()> {
    assert!(width.is_multiple_of(NUMBERS), "rmsnorm: the width {width} must be a multiple of 8");
    let fits = |&(team, pieces): &(usize, usize)| width <= team * pieces * NUMBERS;
    let Some(team) = TEAMS.into_iter().find(fits) else {
        panic!("rmsnorm: the width {width} must be at most 16384");
    };
    if rows == 0 {
        return Ok(());
    }
    let blocks = rows.div_ceil(THREADS as usize / team.0);
    let shared = THREADS / 32 * size_of::<f32>() as u32;
    gpu.launch(&kernel(name, team), [blocks as u32, 1, 1], shared, args)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{EPS, reference_backward, reference_forward};
    use super::*;
    use crate::testing::{
        assert_accurate, assert_accurate_bf16, cast, fails, faulty_gpu, gpu, poison, random_bf16,
        round, widen,
    };

    /// One of every team, full and not, and rows that do not fill the last block.
    const SHAPES: [(usize, usize); 10] = [
        (1, 8),
        (70, 64),
        (33, 80),
        (17, 128),
        (9, 256),
        (5, 296),
        (3, 904),
        (2, 2048),
        (3, 2056),
        (1, 16384),
    ];

    fn check_forward(gpu: &Gpu, rows: usize, width: usize) {
        let (x, w) = (random_bf16(rows * width, 1), random_bf16(width, 2));
        let (on_x, on_w) = (gpu.uploaded(&x).unwrap(), gpu.uploaded(&w).unwrap());
        let (mut y, mut inv_rms) = (gpu.alloc(rows * width).unwrap(), gpu.alloc(rows).unwrap());
        forward(gpu, &on_x, &on_w, EPS, &mut y, &mut inv_rms).unwrap();

        let (x, w) = (widen(&x), widen(&w));
        let exact = reference_forward::<f64>(&cast(&x), &cast(&w));
        let plain = round(&reference_forward::<f32>(&x, &w));
        assert_accurate_bf16("y", &gpu.downloaded(&y).unwrap(), &plain, &exact);

        let (mut plain_y, mut plain_roots) = (poison(rows * width), poison(rows));
        crate::rmsnorm::forward(&x, &w, EPS, &mut plain_y, &mut plain_roots);
        let roots = |x: &[f32]| {
            1.0 / (x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64
                + f64::from(EPS))
            .sqrt()
        };
        let exact: Vec<f64> = x.chunks(width).map(roots).collect();
        assert_accurate("inv_rms", &gpu.downloaded(&inv_rms).unwrap(), &plain_roots, &exact);
    }

    #[test]
    fn forward_agrees_with_f64() {
        for (seed, (rows, width)) in SHAPES.into_iter().enumerate() {
            check_forward(&gpu(seed as u64), rows, width);
        }
    }

    #[test]
    fn the_residual_is_added_first() {
        for (seed, (rows, width)) in SHAPES.into_iter().enumerate() {
            let gpu = gpu(seed as u64 + 1);
            let (x, residual) = (random_bf16(rows * width, 1), random_bf16(rows * width, 2));
            let w = gpu.uploaded(&random_bf16(width, 3)).unwrap();
            let (on_x, on_residual) = (gpu.uploaded(&x).unwrap(), gpu.uploaded(&residual).unwrap());
            let new = || gpu.alloc::<bf16>(rows * width).unwrap();
            let (mut sum, mut y, mut expected_y) = (new(), new(), new());
            let mut inv_rms = gpu.alloc(rows).unwrap();
            let mut expected_inv_rms = gpu.alloc(rows).unwrap();
            forward_residual(&gpu, &on_x, &on_residual, &w, EPS, &mut sum, &mut y, &mut inv_rms)
                .unwrap();

            let added =
                x.iter().zip(&residual).map(|(a, b)| bf16::from_f32(a.to_f32() + b.to_f32()));
            let expected_sum: Vec<bf16> = added.collect();
            assert_eq!(gpu.downloaded(&sum).unwrap(), expected_sum);
            let on_sum = gpu.uploaded(&expected_sum).unwrap();
            forward(&gpu, &on_sum, &w, EPS, &mut expected_y, &mut expected_inv_rms).unwrap();
            assert_eq!(gpu.downloaded(&y).unwrap(), gpu.downloaded(&expected_y).unwrap());
            assert_eq!(
                gpu.downloaded(&inv_rms).unwrap(),
                gpu.downloaded(&expected_inv_rms).unwrap()
            );
        }
    }

    fn check_backward(gpu: &Gpu, rows: usize, width: usize) {
        let n = rows * width;
        let (x, w, dy, before) =
            (random_bf16(n, 1), random_bf16(width, 2), random_bf16(n, 3), random_bf16(n, 4));
        let (on_x, on_w, on_dy) =
            (gpu.uploaded(&x).unwrap(), gpu.uploaded(&w).unwrap(), gpu.uploaded(&dy).unwrap());
        let mut dx = gpu.uploaded(&before).unwrap();
        let (mut y, mut inv_rms) = (gpu.alloc(n).unwrap(), gpu.alloc(rows).unwrap());
        forward(gpu, &on_x, &on_w, EPS, &mut y, &mut inv_rms).unwrap();
        backward(gpu, &on_dy, &on_x, &on_w, &inv_rms, &mut dx).unwrap();

        let (x, w, dy, before) = (widen(&x), widen(&w), widen(&dy), widen(&before));
        let exact = reference_backward::<f64>(&cast(&dy), &cast(&x), &cast(&w), &cast(&before));
        let plain = round(&reference_backward::<f32>(&dy, &x, &w, &before));
        assert_accurate_bf16("dx", &gpu.downloaded(&dx).unwrap(), &plain, &exact);
    }

    #[test]
    fn backward_agrees_with_f64_and_accumulates() {
        for (seed, (rows, width)) in SHAPES.into_iter().enumerate() {
            check_backward(&gpu(seed as u64 + 2), rows, width);
        }
    }

    #[test]
    fn faults_are_seen() {
        let faulty = |from, to| faulty_gpu(1, "rmsnorm.cu", from, to);
        let gpu = faulty("make_float2(d.x + (s * ", "make_float2((s * ");
        assert!(fails(|| check_backward(&gpu, 9, 256)), "what was there is overwritten");
        let gpu = faulty("distance = TEAM / 2; distance", "distance = TEAM / 4; distance");
        assert!(fails(|| check_forward(&gpu, 17, 128)), "half of a row is summed");
        let gpu = faulty(
            "if (!in_range || column(i) >= width) continue;\n        kept_x",
            "if (!in_range) continue;\n        kept_x",
        );
        assert!(fails(|| check_backward(&gpu, 3, 904)), "numbers of the next row are summed");
        let gpu = faulty(
            "return block_sum(x, reinterpret_cast<float*>(dynamic_shared()));",
            "return block_sum(x, reinterpret_cast<float*>(dynamic_shared()) + 1);",
        );
        assert!(fails(|| check_forward(&gpu, 2, 2048)), "shared memory is overrun");
    }

    #[test]
    #[should_panic(expected = "the width 12 must be a multiple of 8")]
    fn a_width_that_is_no_multiple_of_16_bytes_is_refused() {
        let gpu = gpu(0);
        let (x, w) = (gpu.alloc(24).unwrap(), gpu.alloc(12).unwrap());
        let (mut y, mut inv_rms) = (gpu.alloc(24).unwrap(), gpu.alloc(2).unwrap());
        let _ = forward(&gpu, &x, &w, EPS, &mut y, &mut inv_rms);
    }
}

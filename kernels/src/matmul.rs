//! Matrix products, named by what is transposed: `n` as stored, `t` transposed.
//!
//! ```text
//! nt   y [m,n] = alpha x[m,k] w[n,k]ᵀ  + beta y     a linear layer
//! nn   dx[m,k] = alpha dy[m,n] w[n,k]  + beta dx    its gradient to the input
//! tn   c [p,q] = alpha a[m,p]ᵀ b[m,q]  + beta c     its gradient to a weight
//! ```
//!
//! With `beta` 0 the output is overwritten without being read. w may be stored in 16 bits (see
//! [`Weight`]).
//!
//! The same call gives the same bits on the same number of threads. A row of [`nt`] has the same
//! bits whatever other rows there are and however many threads: a text's log-probs do not depend on
//! what it is packed with.
//!
//! The work is done by the `gemm` crate, which reaches the machine's limit for large products but
//! packs and divides badly where one side is short. Those are split here, in parts that depend on
//! shapes and the number of threads alone:
//!
//! * a product with an adapter's rank in it is split by rows, so that a part stays in the caches;
//! * an adapter's gradient is collected over few rows at a time, no more than the processor can hold
//!   page addresses for, with the long side split over the threads.

mod adapter;
pub mod cuda;
mod few;
mod view;
mod weight;

pub use adapter::adapter_backward;
pub use few::nt_few;
pub use weight::Weight;

pub(crate) use view::View;

use crate::parallel::Scattered;
use gemm::Parallelism;
use rayon::prelude::*;
use view::assert_inside;

/// A side up to this length counts as an adapter's rank.
const RANK_AT_MOST: usize = 64;
/// Rows over which a gradient of short width is collected at a time.
const GRADIENT_ROWS: usize = 64;
/// Multiplications below which a product stays on one thread.
const SMALL: usize = 48 * 48 * 256;

/// `c = alpha a b + beta c` on the calling thread; `c` has the shape of `a b` with rows
/// `row_stride` apart.
pub(crate) fn product(a: View, b: View, c: &mut [f32], row_stride: usize, alpha: f32, beta: f32) {
    gemm_strided(a, b, c, row_stride, alpha, beta, Parallelism::None);
}

/// `y[m,n] = alpha x[m,k] w[n,k]ᵀ + beta y`.
pub fn nt<'w>(
    x: &[f32],
    w: impl Into<Weight<'w>>,
    y: &mut [f32],
    m: usize,
    k: usize,
    n: usize,
    alpha: f32,
    beta: f32,
) {
    let w = w.into();
    assert_shapes("nt", [("x", x.len(), m, k), ("w", w.len(), n, k), ("y", y.len(), m, n)]);
    if m == 0 {
        return;
    }
    let x = View::new(x, m, k, k);
    w.for_panels(n, k, |rows, panel| {
        let w = View::new(panel, rows.len(), k, k);
        multiply_alike(x, w.t(), &mut y[rows.start..], n, alpha, beta);
    });
}

/// `dx[m,k] = alpha dy[m,n] w[n,k] + beta dx`.
pub fn nn<'w>(
    dy: &[f32],
    w: impl Into<Weight<'w>>,
    dx: &mut [f32],
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    beta: f32,
) {
    let w = w.into();
    assert_shapes("nn", [("dy", dy.len(), m, n), ("w", w.len(), n, k), ("dx", dx.len(), m, k)]);
    let dy = View::new(dy, m, n, n);
    w.for_panels(n, k, |rows, panel| {
        let beta = if rows.start == 0 { beta } else { 1.0 };
        let w = View::new(panel, rows.len(), k, k);
        multiply(dy.col_range(rows), w, dx, k, alpha, beta);
    });
}

/// `c[p,q] = alpha a[m,p]ᵀ b[m,q] + beta c`.
pub fn tn(
    a: &[f32],
    b: &[f32],
    c: &mut [f32],
    m: usize,
    p: usize,
    q: usize,
    alpha: f32,
    beta: f32,
) {
    assert_shapes("tn", [("a", a.len(), m, p), ("b", b.len(), m, q), ("c", c.len(), p, q)]);
    let (a, b) = (View::new(a, m, p, p), View::new(b, m, q, q));
    if p.min(q) > RANK_AT_MOST || m * p * q < SMALL {
        gemm_strided(a.t(), b, c, q, alpha, beta, Parallelism::Rayon(0));
    } else if q <= p {
        collect_gradient(a, b, c, alpha, beta);
    } else {
        let mut transposed = vec![0.0; q * p];
        collect_gradient(b, a, &mut transposed, alpha, 0.0);
        for (i, row) in c.chunks_exact_mut(q).enumerate() {
            for (c, new) in row.iter_mut().zip(transposed[i..].iter().step_by(p)) {
                *c = if beta == 0.0 { *new } else { new + beta * *c };
            }
        }
    }
}

/// Rows from which on `gemm` sums a row in the same order however many there are. It takes another
/// way for a single row, for up to 256 results, and for up to 64 x 64 results, where sums are cut at
/// other places once they are longer than 512. Where they are cut depends on their length alone.
fn least_rows_alike(k: usize, n: usize) -> usize {
    let blocks = if n <= 64 && k > 512 { 65 } else { 2 };
    blocks.max(256 / n + 1)
}

/// [`multiply`] by `w`: `[k, n]`, where every row of the result has the same bits however many there
/// are: few rows get company.
fn multiply_alike(x: View, w: View, y: &mut [f32], row_stride: usize, alpha: f32, beta: f32) {
    let (m, k, n) = (x.rows, x.cols, w.cols);
    let least = least_rows_alike(k, n.max(1));
    if m >= least || k * n == 0 {
        return multiply(x, w, y, row_stride, alpha, beta);
    }
    let mut company = x.data[..m * k].to_vec();
    company.resize(least * k, 0.0);
    let mut out = vec![0.0; least * n];
    for (out, y) in out.chunks_exact_mut(n).zip(y.chunks(row_stride).take(m)) {
        out.copy_from_slice(&y[..n]);
    }
    multiply(View::new(&company, least, k, k), w, &mut out, n, alpha, beta);
    for (out, y) in out.chunks_exact(n).zip(y.chunks_mut(row_stride).take(m)) {
        y[..n].copy_from_slice(out);
    }
}

/// `c = alpha a b + beta c` for a `c` with rows `row_stride` apart, split over the threads.
fn multiply(a: View, b: View, c: &mut [f32], row_stride: usize, alpha: f32, beta: f32) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    if k.min(n) > RANK_AT_MOST || m * k * n < SMALL {
        return gemm_strided(a, b, c, row_stride, alpha, beta, Parallelism::Rayon(0));
    }
    // A few parts per thread, for balance, none so small that it would be summed otherwise.
    let rows = m.div_ceil(4 * rayon::current_num_threads()).clamp(64, 256);
    let parts = (m / rows.max(least_rows_alike(k, n))).max(1);
    let c = Scattered::new(c);
    (0..parts).into_par_iter().for_each(|part| {
        let rows = part * m / parts..(part + 1) * m / parts;
        let end = (rows.end - 1) * row_stride + n;
        // SAFETY: parts are disjoint ranges of rows.
        let c = unsafe { c.range_mut(rows.start * row_stride..end) };
        product(a.row_range(rows), b, c, row_stride, alpha, beta);
    });
}

/// `c = alpha longᵀ short + beta c`, where `short` has few columns and `c` is `[long, short]`.
fn collect_gradient(long: View, short: View, c: &mut [f32], alpha: f32, beta: f32) {
    let (m, p, q) = (long.rows, long.cols, short.cols);
    let columns = p.div_ceil(rayon::current_num_threads()).next_multiple_of(64);
    c.par_chunks_mut(columns * q).enumerate().for_each(|(part, c)| {
        let first = part * columns;
        let long = long.col_range(first..p.min(first + columns)).t();
        for start in (0..m).step_by(GRADIENT_ROWS) {
            let rows = start..m.min(start + GRADIENT_ROWS);
            let beta = if start == 0 { beta } else { 1.0 };
            let short = short.row_range(rows.clone());
            product(long.col_range(rows), short, c, q, alpha, beta);
        }
    });
}

fn gemm_strided(
    a: View,
    b: View,
    c: &mut [f32],
    row_stride: usize,
    alpha: f32,
    beta: f32,
    parallelism: Parallelism,
) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    assert_eq!(k, b.rows, "inner dimensions differ");
    assert_inside(c.len(), m, n, row_stride);
    // SAFETY: every element that the strides reach lies inside its slice: `View::new` checked `a`
    // and `b` (transposing swaps both pairs), the assertion above checked `c`.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            row_stride as isize,
            beta != 0.0,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            // The crate's alpha multiplies what was there, its beta the product.
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Operands by name, with their lengths and the shapes that these must fit.
fn assert_shapes(op: &str, operands: [(&str, usize, usize, usize); 3]) {
    for (name, len, rows, cols) in operands {
        assert_eq!(len, rows * cols, "matmul::{op}: {name} must be [{rows}, {cols}]");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Real, assert_accurate, error, poison, random};
    use half::{bf16, f16};

    /// Rows of `a` times columns of `b`, one product at a time.
    fn reference<R: Real>(
        (m, k, n): (usize, usize, usize),
        a: impl Fn(usize, usize) -> f32,
        b: impl Fn(usize, usize) -> f32,
        c: &[f32],
        alpha: f32,
        beta: f32,
    ) -> Vec<R> {
        let wide = |x: f32| R::of(f64::from(x));
        let mut out = Vec::with_capacity(m * n);
        for i in 0..m {
            for j in 0..n {
                let mut sum = R::of(0.0);
                for l in 0..k {
                    sum += wide(a(i, l)) * wide(b(l, j));
                }
                let before = if beta == 0.0 { R::of(0.0) } else { wide(beta) * wide(c[i * n + j]) };
                out.push(wide(alpha) * sum + before);
            }
        }
        out
    }

    const SHAPES: [(usize, usize, usize); 22] = [
        (1, 1, 1),
        (1, 5, 7),
        (1, 300, 65),
        (2, 17, 3),
        (3, 1, 5),
        (5, 2, 9),
        (7, 64, 1),
        (16, 16, 16),
        (33, 8, 100),
        (100, 129, 8),
        (65, 33, 129),
        (257, 64, 31),
        (300, 200, 150),
        (37, 1030, 20),
        (600, 7, 16),
        (40, 0, 3),
        (0, 5, 3),
        // Large enough to be split: by rows twice, by columns, and over the rows of a gradient.
        (700, 16, 70),
        (700, 70, 16),
        (3, 500, 450),
        (70, 2000, 9),
        (9, 2000, 70),
    ];

    type Product = fn(&[f32], &[f32], &mut [f32], usize, usize, usize, f32, f32);

    fn check(op: Product, name: &str) {
        for (m, k, n) in SHAPES {
            let (left, right) = (random(m * k, 1), random(k * n, 2));
            for (alpha, beta) in [(1.0, 0.0), (1.0, 1.0), (0.25, 0.0), (-0.5, 2.0)] {
                let c = if beta == 0.0 { poison(m * n) } else { random(m * n, 3) };
                let a = |i: usize, l: usize| match name {
                    "tn" => left[l * m + i],
                    _ => left[i * k + l],
                };
                let b = |l: usize, j: usize| match name {
                    "nt" => right[j * k + l],
                    _ => right[l * n + j],
                };
                let plain = reference::<f32>((m, k, n), a, b, &c, alpha, beta);
                let exact = reference::<f64>((m, k, n), a, b, &c, alpha, beta);
                let mut out = c.clone();
                match name {
                    "tn" => op(&left, &right, &mut out, k, m, n, alpha, beta),
                    _ => op(&left, &right, &mut out, m, k, n, alpha, beta),
                }
                let what = format!("{name} {m}x{k}x{n} alpha {alpha} beta {beta}");
                assert_accurate(&what, &out, &plain, &exact);
            }
        }
    }

    #[test]
    fn nt_agrees_with_f64() {
        check(|x, w, y, m, k, n, alpha, beta| nt(x, w, y, m, k, n, alpha, beta), "nt");
        check(|x, w, y, m, k, n, alpha, beta| nt_few(x, w, y, m, k, n, alpha, beta), "nt");
    }

    #[test]
    fn nn_agrees_with_f64() {
        check(|x, w, y, m, k, n, alpha, beta| nn(x, w, y, m, k, n, alpha, beta), "nn");
    }

    #[test]
    fn tn_agrees_with_f64() {
        check(tn, "tn");
    }

    #[test]
    fn strided_products_leave_the_gaps_alone() {
        let (m, k, n) = (9, 12, 5);
        let (a, b) = (random(m * 20, 1), random(n * 15, 2));
        let mut c = vec![7.0; m * 8];
        let (left, right) = (View::new(&a, m, k, 20), View::new(&b, n, k, 15).t());
        product(left, right, &mut c, 8, 1.0, 0.0);
        let pick = |i: usize, l: usize| a[i * 20 + l];
        let exact = reference::<f64>((m, k, n), pick, |l, j| b[j * 15 + l], &[], 1.0, 0.0);
        for i in 0..m {
            assert!(error(&c[i * 8..i * 8 + n], &exact[i * n..(i + 1) * n]) < 1e-5);
            assert!(c[i * 8 + n..(i + 1) * 8].iter().all(|x| *x == 7.0));
        }
    }

    #[test]
    fn the_same_product_twice_gives_the_same_bits() {
        let (m, k, n) = (333, 517, 129);
        let (x, w) = (random(m * k, 1), random(n * k, 2));
        let run = || {
            let mut y = poison(m * n);
            nt(&x, &w, &mut y, m, k, n, 1.0, 0.0);
            y
        };
        let first = run();
        assert!((0..5).all(|_| run() == first));
    }

    /// What packing rests on: a text's rows have the same bits in any company, on any number of
    /// threads, in 16 bits as well.
    #[test]
    fn a_row_has_the_same_bits_however_many_there_are() {
        let most = 600;
        for (k, n) in [
            (64, 16),
            (768, 16),
            (2304, 16),
            (16, 768),
            (3, 5),
            (1030, 64),
            (1030, 65),
            (768, 256),
            (2304, 768),
            (700, 1100),
            (9, 2),
            (2, 40),
        ] {
            let (x, w, before) = (random(most * k, 1), random(n * k, 2), random(most * n, 3));
            let half: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
            for (weight, beta) in [(Weight::F32(&w), 0.0), (Weight::Bf16(&half), 1.0)] {
                let run = |m: usize, threads: usize| {
                    let mut y = before[..m * n].to_vec();
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    pool.unwrap().install(|| {
                        nt(&x[..m * k], weight, &mut y, m, k, n, 1.0, beta);
                    });
                    y
                };
                let all = run(most, 2);
                for m in [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 64, 65, 66, 127, 200, 257, 513] {
                    for threads in [1, 3] {
                        assert!(run(m, threads) == all[..m * n], "{m} of {most} rows, {k}x{n}");
                    }
                }
            }
        }
    }

    #[test]
    fn sixteen_bits_are_multiplied_as_if_widened() {
        let (m, k, n) = (70, 130, 1100);
        let (x, w, dy) = (random(m * k, 1), random(n * k, 2), random(m * n, 3));
        let bf: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
        let half: Vec<f16> = w.iter().map(|w| f16::from_f32(*w)).collect();
        for weight in [Weight::Bf16(&bf), Weight::F16(&half)] {
            let mut wide = vec![0.0; n * k];
            weight.widen(&mut wide);
            let coarse = w.iter().zip(&wide).map(|(w, wide)| (w - wide).abs() / w.abs());
            assert!(coarse.fold(0.0, f32::max) < 4e-3, "eight bits of mantissa at least");
            let (mut y, mut few, mut dx) = (poison(m * n), poison(3 * n), random(m * k, 4));
            let (x_at, w_t) =
                (|i: usize, l: usize| x[i * k + l], |l: usize, j: usize| wide[j * k + l]);
            let plain = reference::<f32>((m, k, n), x_at, w_t, &y, 1.0, 0.0);
            let exact = reference::<f64>((m, k, n), x_at, w_t, &y, 1.0, 0.0);
            nt(&x, weight, &mut y, m, k, n, 1.0, 0.0);
            assert_accurate("nt", &y, &plain, &exact);
            nt_few(&x[..3 * k], weight, &mut few, 3, k, n, 1.0, 0.0);
            assert_accurate("nt_few", &few, &plain[..3 * n], &exact[..3 * n]);
            let (dy_at, w_at) =
                (|i: usize, l: usize| dy[i * n + l], |l: usize, j: usize| wide[l * k + j]);
            let plain = reference::<f32>((m, n, k), dy_at, w_at, &dx, 0.5, 1.0);
            let exact = reference::<f64>((m, n, k), dy_at, w_at, &dx, 0.5, 1.0);
            nn(&dy, weight, &mut dx, m, n, k, 0.5, 1.0);
            assert_accurate("nn", &dx, &plain, &exact);
        }
    }

    #[test]
    #[should_panic(expected = "matmul::nt: w must be [4, 3]")]
    fn a_wrong_shape_is_named() {
        nt(&[0.0; 6], &[0.0; 11][..], &mut [0.0; 8], 2, 3, 4, 1.0, 0.0);
    }
}

//! Matrix products, named by what is transposed: `n` as stored, `t` transposed.
//!
//! ```text
//! nt   y [m,n] = alpha x[m,k] w[n,k]ᵀ  + beta y     a linear layer
//! nn   dx[m,k] = alpha dy[m,n] w[n,k]  + beta dx    its gradient to the input
//! tn   c [p,q] = alpha a[m,p]ᵀ b[m,q]  + beta c     its gradient to a weight
//! ```
//!
//! With `beta` 0 the output is overwritten without being read.
//!
//! The same call gives the same bits on the same number of threads. A row's last bits may depend on how
//! many rows there are, because that decides in which order sums are taken.
//!
//! The work is done by the `gemm` crate, which reaches the machine's limit for large products but
//! packs and divides badly where one side is short. Those are split here, in parts that depend on
//! shapes and the number of threads alone:
//!
//! * a product with an adapter's rank in it is split by rows, so that a part stays in the caches;
//! * one or a few rows meet each row of the weight in turn, so that the weight is read once;
//! * an adapter's gradient is collected over few rows at a time, no more than the processor can hold
//!   page addresses for, with the long side split over the threads.

use crate::math::{dot, vectorised};
use crate::parallel::Scattered;
use gemm::Parallelism;
use rayon::prelude::*;
use std::ops::Range;

/// A side up to this length counts as an adapter's rank.
const RANK_AT_MOST: usize = 64;
/// Up to this many rows are too few to pack a weight for.
const FEW_ROWS: usize = 8;
/// Rows of the weight that those meet at a time.
const FEW_ROWS_COLUMNS: usize = 32;
/// Rows over which a gradient of short width is collected at a time.
const GRADIENT_ROWS: usize = 64;
/// Multiplications below which a product stays on one thread.
const SMALL: usize = 48 * 48 * 256;

/// A matrix inside a larger one: `rows` x `cols` elements, those of a row `col_stride` apart, rows
/// `row_stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// Rows of `cols` adjacent elements, one every `row_stride` elements of `data`.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert_inside(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transposed matrix; nothing moves.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    fn row_range(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows);
        let skipped = (range.start * self.row_stride).min(self.data.len());
        Self { data: &self.data[skipped..], rows: range.len(), ..self }
    }

    fn col_range(self, range: Range<usize>) -> Self {
        self.t().row_range(range).t()
    }
}

/// `c = alpha a b + beta c` on the calling thread; `c` has the shape of `a b` with rows
/// `row_stride` apart.
pub(crate) fn product(a: View, b: View, c: &mut [f32], row_stride: usize, alpha: f32, beta: f32) {
    gemm_strided(a, b, c, row_stride, alpha, beta, Parallelism::None);
}

/// `y[m,n] = alpha x[m,k] w[n,k]ᵀ + beta y`.
pub fn nt(
    x: &[f32],
    w: &[f32],
    y: &mut [f32],
    m: usize,
    k: usize,
    n: usize,
    alpha: f32,
    beta: f32,
) {
    assert_shapes("nt", [("x", x, m, k), ("w", w, n, k), ("y", y, m, n)]);
    if m <= FEW_ROWS && m * k * n > 0 {
        return few_rows(x, w, y, (m, k, n), alpha, beta);
    }
    let (x, w) = (View::new(x, m, k, k), View::new(w, n, k, k));
    multiply(x, w.t(), y, alpha, beta);
}

/// `dx[m,k] = alpha dy[m,n] w[n,k] + beta dx`.
pub fn nn(
    dy: &[f32],
    w: &[f32],
    dx: &mut [f32],
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    beta: f32,
) {
    assert_shapes("nn", [("dy", dy, m, n), ("w", w, n, k), ("dx", dx, m, k)]);
    let (dy, w) = (View::new(dy, m, n, n), View::new(w, n, k, k));
    multiply(dy, w, dx, alpha, beta);
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
    assert_shapes("tn", [("a", a, m, p), ("b", b, m, q), ("c", c, p, q)]);
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

/// `c = alpha a b + beta c` for a dense `c`, split over the threads.
fn multiply(a: View, b: View, c: &mut [f32], alpha: f32, beta: f32) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    if k.min(n) > RANK_AT_MOST || m * k * n < SMALL {
        gemm_strided(a, b, c, n, alpha, beta, Parallelism::Rayon(0));
    } else {
        // A few parts per thread, for balance.
        let rows = m.div_ceil(4 * rayon::current_num_threads()).clamp(64, 256);
        c.par_chunks_mut(rows * n).enumerate().for_each(|(part, c)| {
            let first = part * rows;
            let a = a.row_range(first..m.min(first + rows));
            product(a, b, c, n, alpha, beta);
        });
    }
}

/// [`nt`] for few rows: generation, one token at a time. Each row of the weight is read once, and
/// memory is the limit.
fn few_rows(
    x: &[f32],
    w: &[f32],
    y: &mut [f32],
    (m, k, n): (usize, usize, usize),
    alpha: f32,
    beta: f32,
) {
    let y = Scattered::new(y);
    let block = |(index, w): (usize, &[f32])| {
        let (start, columns) = (index * FEW_ROWS_COLUMNS, w.len() / k);
        let mut products = [0.0; FEW_ROWS * FEW_ROWS_COLUMNS];
        inner_products(x, w, k, &mut products[..m * columns]);
        for (row, products) in products[..m * columns].chunks_exact(columns).enumerate() {
            let at = row * n + start;
            // SAFETY: blocks are disjoint ranges of columns.
            let y = unsafe { y.range_mut(at..at + columns) };
            for (y, product) in y.iter_mut().zip(products) {
                *y = alpha * product + if beta == 0.0 { 0.0 } else { beta * *y };
            }
        }
    };
    let weight = FEW_ROWS_COLUMNS * k;
    if m * k * n < SMALL {
        return w.chunks(weight).enumerate().for_each(block);
    }
    w.par_chunks(weight).enumerate().with_min_len(8).for_each(block);
}

vectorised! {
    /// All rows of `x` with all rows of `w`, both `k` wide: `[rows of x, rows of w]`. Four rows of `x`
    /// at a time stay in the first-level cache.
    fn inner_products(x: &[f32], w: &[f32], k: usize, out: &mut [f32]) {
        let columns = w.len() / k;
        for (x, out) in x.chunks(4 * k).zip(out.chunks_mut(4 * columns)) {
            for (column, w) in w.chunks_exact(k).enumerate() {
                for (row, x) in x.chunks_exact(k).enumerate() {
                    out[row * columns + column] = dot(x, w);
                }
            }
        }
    }
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

fn assert_inside(len: usize, rows: usize, cols: usize, row_stride: usize) {
    let needed = if rows == 0 { 0 } else { (rows - 1) * row_stride + cols };
    assert!(
        cols <= row_stride && needed <= len,
        "[{rows}, {cols}] with stride {row_stride} does not fit in {len} elements"
    );
}

fn assert_shapes(op: &str, operands: [(&str, &[f32], usize, usize); 3]) {
    for (name, data, rows, cols) in operands {
        assert_eq!(data.len(), rows * cols, "matmul::{op}: {name} must be [{rows}, {cols}]");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Real, assert_accurate, error, poison, random};

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
        check(nt, "nt");
    }

    #[test]
    fn nn_agrees_with_f64() {
        check(nn, "nn");
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

    #[test]
    #[should_panic(expected = "matmul::nt: w must be [4, 3]")]
    fn a_wrong_shape_is_named() {
        nt(&[0.0; 6], &[0.0; 11], &mut [0.0; 8], 2, 3, 4, 1.0, 0.0);
    }
}

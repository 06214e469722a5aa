//! Matrix products, named by what is transposed: `n` as stored, `t` transposed.
//!
//! ```text
//! nt   y [m,n] = alpha x[m,k] w[n,k]ᵀ  + beta y     a linear layer
//! nn   dx[m,k] = alpha dy[m,n] w[n,k]  + beta dx    its gradient to the input
//! tn   c [p,q] = alpha a[m,p]ᵀ b[m,q]  + beta c     its gradient to a weight
//! ```
//!
//! With `beta` 0 the output is overwritten without being read. The work is done by the `gemm` crate.

use gemm::Parallelism;

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
    let (x, w) = (View::new(x, m, k, k), View::new(w, n, k, k));
    gemm_strided(x, w.t(), y, n, alpha, beta, Parallelism::Rayon(0));
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
    gemm_strided(dy, w, dx, k, alpha, beta, Parallelism::Rayon(0));
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
    gemm_strided(a.t(), b, c, q, alpha, beta, Parallelism::Rayon(0));
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

    const SHAPES: [(usize, usize, usize); 16] = [
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

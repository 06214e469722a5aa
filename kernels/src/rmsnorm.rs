//! Root-mean-square normalisation (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization").
//!
//! ```text
//! forward    s = 1 / sqrt(mean(x²) + eps)        y = w (x s)
//! backward   g = w dy                            dx += s g - x s³ mean(g x)
//! ```
//!
//! A row is as wide as the weight, whatever it stands for: a token's hidden state, or one head of a
//! query where q and k are normalised. The weight is frozen, so it has no gradient.

pub mod cuda;

use crate::math::{dot, dot3, vectorised};
use crate::parallel::rows_per_task;
use rayon::prelude::*;

/// `y = w (x s)`; `x`, `y`: `[rows, width]`, `w`: `[width]`, `inv_rms`: `[rows]` receives s for the
/// way back. Overwrites `y` and `inv_rms`.
pub fn forward(x: &[f32], w: &[f32], eps: f32, y: &mut [f32], inv_rms: &mut [f32]) {
    let width = w.len();
    let rows = inv_rms.len();
    assert_eq!(x.len(), rows * width, "rmsnorm: x must be [{rows}, {width}]");
    assert_eq!(y.len(), rows * width, "rmsnorm: y must be [{rows}, {width}]");
    let task = rows_per_task(width);
    if rows <= task {
        return forward_rows(x, w, eps, y, inv_rms);
    }
    x.par_chunks(task * width)
        .zip(y.par_chunks_mut(task * width))
        .zip(inv_rms.par_chunks_mut(task))
        .for_each(|((x, y), inv_rms)| forward_rows(x, w, eps, y, inv_rms));
}

/// `dx += s w dy - x s³ mean(w dy x)`; shapes as in [`forward`], `inv_rms` as it left it.
/// Accumulates into `dx`.
pub fn backward(dy: &[f32], x: &[f32], w: &[f32], inv_rms: &[f32], dx: &mut [f32]) {
    let width = w.len();
    let rows = inv_rms.len();
    assert_eq!(dy.len(), rows * width, "rmsnorm: dy must be [{rows}, {width}]");
    assert_eq!(x.len(), rows * width, "rmsnorm: x must be [{rows}, {width}]");
    assert_eq!(dx.len(), rows * width, "rmsnorm: dx must be [{rows}, {width}]");
    let task = rows_per_task(width);
    if rows <= task {
        return backward_rows(dy, x, w, inv_rms, dx);
    }
    dy.par_chunks(task * width)
        .zip(x.par_chunks(task * width))
        .zip(inv_rms.par_chunks(task))
        .zip(dx.par_chunks_mut(task * width))
        .for_each(|(((dy, x), inv_rms), dx)| backward_rows(dy, x, w, inv_rms, dx));
}

vectorised! {
    fn forward_rows(x: &[f32], w: &[f32], eps: f32, y: &mut [f32], inv_rms: &mut [f32]) {
        let width = w.len();
        for (row, inv_rms) in inv_rms.iter_mut().enumerate() {
            let x = &x[row * width..][..width];
            let y = &mut y[row * width..][..width];
            let s = 1.0 / (dot(x, x) / width as f32 + eps).sqrt();
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = w * (x * s);
            }
            *inv_rms = s;
        }
    }

    fn backward_rows(dy: &[f32], x: &[f32], w: &[f32], inv_rms: &[f32], dx: &mut [f32]) {
        let width = w.len();
        for (row, &s) in inv_rms.iter().enumerate() {
            let dy = &dy[row * width..][..width];
            let x = &x[row * width..][..width];
            let dx = &mut dx[row * width..][..width];
            let shared = s * s * s * (dot3(w, dy, x) / width as f32);
            for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
                *dx += s * (w * dy) - x * shared;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Real, assert_accurate, cast, poison, random};

    pub(super) const EPS: f32 = 1e-5;

    pub(super) fn reference_forward<R: Real>(x: &[R], w: &[R]) -> Vec<R> {
        let n = R::of(w.len() as f64);
        x.chunks(w.len())
            .flat_map(|x| {
                let mut sum = R::of(0.0);
                x.iter().for_each(|x| sum += *x * *x);
                let s = R::of(1.0) / (sum / n + R::of(f64::from(EPS))).sqrt();
                x.iter().zip(w).map(move |(x, w)| *w * (*x * s))
            })
            .collect()
    }

    pub(super) fn reference_backward<R: Real>(dy: &[R], x: &[R], w: &[R], dx: &[R]) -> Vec<R> {
        let n = R::of(w.len() as f64);
        let mut out = dx.to_vec();
        for (row, x) in x.chunks(w.len()).enumerate() {
            let dy = &dy[row * w.len()..];
            let (mut square, mut mixed) = (R::of(0.0), R::of(0.0));
            for i in 0..w.len() {
                square += x[i] * x[i];
                mixed += w[i] * dy[i] * x[i];
            }
            let s = R::of(1.0) / (square / n + R::of(f64::from(EPS))).sqrt();
            for i in 0..w.len() {
                out[row * w.len() + i] += s * w[i] * dy[i] - x[i] * s * s * s * mixed / n;
            }
        }
        out
    }

    const SHAPES: [(usize, usize); 6] = [(1, 1), (3, 7), (5, 64), (2, 129), (70, 768), (3000, 16)];

    #[test]
    fn forward_agrees_with_f64() {
        for (rows, width) in SHAPES {
            let (x, w) = (random(rows * width, 1), random(width, 2));
            let (mut y, mut inv_rms) = (poison(rows * width), poison(rows));
            forward(&x, &w, EPS, &mut y, &mut inv_rms);
            let plain = reference_forward::<f32>(&x, &w);
            let exact = reference_forward::<f64>(&cast(&x), &cast(&w));
            assert_accurate("y", &y, &plain, &exact);
        }
    }

    #[test]
    fn backward_agrees_with_f64_and_accumulates() {
        for (rows, width) in SHAPES {
            let n = rows * width;
            let (x, w, dy) = (random(n, 1), random(width, 2), random(n, 3));
            let before = random(n, 4);
            let (mut y, mut inv_rms, mut dx) = (poison(n), poison(rows), before.clone());
            forward(&x, &w, EPS, &mut y, &mut inv_rms);
            backward(&dy, &x, &w, &inv_rms, &mut dx);
            let plain = reference_backward::<f32>(&dy, &x, &w, &before);
            let exact = reference_backward::<f64>(&cast(&dy), &cast(&x), &cast(&w), &cast(&before));
            assert_accurate("dx", &dx, &plain, &exact);
        }
    }

    #[test]
    fn the_reference_gradient_is_the_slope() {
        let (rows, width) = (2, 5);
        let x: Vec<f64> = cast(&random(rows * width, 1));
        let (w, dy) = (cast::<f64>(&random(width, 2)), cast(&random(rows * width, 3)));
        let loss = |x: &[f64]| -> f64 {
            let y = reference_forward(x, &w);
            y.iter().zip(&dy).map(|(y, dy)| y * dy).sum()
        };
        let dx = reference_backward(&dy, &x, &w, &vec![0.0; x.len()]);
        crate::testing::assert_is_slope(loss, &x, &dx);
    }

    #[test]
    fn a_row_of_zeros_stays_finite() {
        let (mut y, mut inv_rms) = (poison(4), poison(1));
        forward(&[0.0; 4], &[1.0; 4], 1e-6, &mut y, &mut inv_rms);
        assert_eq!(y, [0.0; 4]);
        assert!((inv_rms[0] - 1e3).abs() < 1e-3);
    }
}

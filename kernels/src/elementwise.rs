//! Sums and multiples of whole arrays.

pub mod cuda;

use crate::math::vectorised;
use crate::parallel::elements_per_task;
use rayon::prelude::*;

/// `x += y`.
pub fn add(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "elementwise::add: lengths differ");
    const TASK: usize = elements_per_task();
    if x.len() <= TASK {
        return add_block(x, y);
    }
    x.par_chunks_mut(TASK).zip(y.par_chunks(TASK)).for_each(|(x, y)| add_block(x, y));
}

/// `x *= factor`.
pub fn scale(x: &mut [f32], factor: f32) {
    const TASK: usize = elements_per_task();
    if x.len() <= TASK {
        return scale_block(x, factor);
    }
    x.par_chunks_mut(TASK).for_each(|x| scale_block(x, factor));
}

/// `y[t, :] = factors[t] * x[t, :]` for `x`, `y`: `[T, width]` with T = `factors.len()`.
pub fn scale_rows(x: &[f32], factors: &[f32], y: &mut [f32]) {
    let rows = factors.len();
    assert_eq!(x.len(), y.len(), "elementwise::scale_rows: lengths differ");
    if rows == 0 {
        return assert!(x.is_empty(), "elementwise::scale_rows: no factors");
    }
    let width = x.len() / rows;
    assert_eq!(x.len(), rows * width, "elementwise::scale_rows: ragged");
    if width == 0 {
        return;
    }
    let task = crate::parallel::rows_per_task(width);
    let block = |((x, y), factors): ((&[f32], &mut [f32]), &[f32])| {
        scale_rows_block(x, factors, y, width);
    };
    if rows <= task {
        return block(((x, y), factors));
    }
    x.par_chunks(task * width)
        .zip(y.par_chunks_mut(task * width))
        .zip(factors.par_chunks(task))
        .for_each(block);
}

vectorised! {
    fn add_block(x: &mut [f32], y: &[f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }

    fn scale_block(x: &mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }

    fn scale_rows_block(x: &[f32], factors: &[f32], y: &mut [f32], width: usize) {
        let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width));
        for ((x, y), factor) in rows.zip(factors) {
            for (x, y) in x.iter().zip(y) {
                *y = factor * x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{poison, random};

    #[test]
    fn each_element_is_met_once() {
        for n in [0, 1, 33, 3 * elements_per_task() + 5] {
            let (x, y) = (random(n, 1), random(n, 2));
            let mut sum = x.clone();
            add(&mut sum, &y);
            assert!((0..n).all(|i| sum[i] == x[i] + y[i]));
            scale(&mut sum, 0.5);
            assert!((0..n).all(|i| sum[i] == (x[i] + y[i]) * 0.5));
        }
    }

    #[test]
    fn rows_are_scaled_by_their_own_factor() {
        for (rows, width) in [(0, 0), (1, 5), (3, 7), (5000, 33)] {
            let (x, factors) = (random(rows * width, 1), random(rows, 2));
            let mut y = poison(rows * width);
            scale_rows(&x, &factors, &mut y);
            assert!((0..rows * width).all(|i| y[i] == factors[i / width] * x[i]));
        }
    }
}

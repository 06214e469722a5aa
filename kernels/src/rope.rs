//! Rotary position embedding (Su et al. 2021, "RoFormer"), in Hugging Face's half-split layout.
//!
//! ```text
//! angle = position * inv_freq[i]                     i < D/2
//! y[i]       = scale (x[i] cos(angle) - x[i + D/2] sin(angle))
//! y[i + D/2] = scale (x[i + D/2] cos(angle) + x[i] sin(angle))
//! ```
//!
//! The way back is the rotation by the negative angle, with the same scale (YaRN's attention
//! factor; 1 for everything else).

pub mod cuda;

use crate::math::vectorised;
use crate::parallel::rows_per_task;
use rayon::prelude::*;
use std::sync::{Arc, Mutex};

/// The rotation of one model, with its cosines and sines computed once per position.
#[derive(Debug)]
pub struct Rope {
    /// `[D/2]`: radians per position.
    pub inv_freq: Vec<f32>,
    /// Multiplies cosine and sine.
    pub scale: f32,
    tables: Mutex<Arc<Tables>>,
}

/// `[positions, D/2]` each, already scaled.
#[derive(Debug, Default)]
struct Tables {
    positions: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    /// A rotation with these frequencies (radians per position, D/2 of them). They are rounded to
    /// `f32`, as Hugging Face stores them; angles are computed in `f64`.
    pub fn new(inv_freq: Vec<f64>, attention_scale: f64) -> Self {
        assert!(!inv_freq.is_empty(), "rope: no frequencies");
        Self {
            inv_freq: inv_freq.iter().map(|f| *f as f32).collect(),
            scale: attention_scale as f32,
            tables: Mutex::default(),
        }
    }

    /// D, the width of a head.
    pub fn head_dim(&self) -> usize {
        2 * self.inv_freq.len()
    }

    /// Rotates `x`: `[T, heads, D]` in place, row t by `positions[t]`.
    pub fn forward(&self, x: &mut [f32], heads: usize, positions: &[u32]) {
        self.rotate(x, heads, positions, 1.0);
    }

    /// Turns the gradient to the rotated `[T, heads, D]` into that to the unrotated, in place.
    pub fn backward(&self, dx: &mut [f32], heads: usize, positions: &[u32]) {
        self.rotate(dx, heads, positions, -1.0);
    }

    fn rotate(&self, x: &mut [f32], heads: usize, positions: &[u32], direction: f32) {
        let half = self.inv_freq.len();
        let width = heads * 2 * half;
        let rows = positions.len();
        assert_eq!(x.len(), rows * width, "rope: x must be [{rows}, {heads}, {}]", 2 * half);
        let Some(last) = positions.iter().max().filter(|_| width > 0) else {
            return;
        };
        let tables = self.tables(*last as usize + 1);
        let block = |(x, positions): (&mut [f32], &[u32])| {
            for (x, position) in x.chunks_exact_mut(width).zip(positions) {
                let row = *position as usize * half;
                let cos = &tables.cos[row..row + half];
                let sin = &tables.sin[row..row + half];
                rotate_heads(x, cos, sin, direction);
            }
        };
        let task = rows_per_task(width);
        if rows <= task {
            return block((x, positions));
        }
        x.par_chunks_mut(task * width).zip(positions.par_chunks(task)).for_each(block);
    }

    /// Tables of at least `positions` positions; they grow by doubling and are shared between calls.
    fn tables(&self, positions: usize) -> Arc<Tables> {
        let mut tables = self.tables.lock().expect("no panic while growing");
        if tables.positions < positions {
            *tables = Arc::new(self.compute(positions.next_power_of_two()));
        }
        tables.clone()
    }

    fn compute(&self, positions: usize) -> Tables {
        let half = self.inv_freq.len();
        let scale = f64::from(self.scale);
        let (cos, sin) = (0..positions * half)
            .into_par_iter()
            .map(|i| {
                let angle = (i / half) as f64 * f64::from(self.inv_freq[i % half]);
                ((angle.cos() * scale) as f32, (angle.sin() * scale) as f32)
            })
            .unzip();
        Tables { positions, cos, sin }
    }
}

vectorised! {
    /// One row: `x`: `[heads, D]`, `cos`, `sin`: `[D/2]`.
    fn rotate_heads(x: &mut [f32], cos: &[f32], sin: &[f32], direction: f32) {
        let half = cos.len();
        for head in x.chunks_exact_mut(2 * half) {
            let (first, second) = head.split_at_mut(half);
            for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                let sin = direction * sin;
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{error, random, random_ids};

    pub(super) fn frequencies(head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / head_dim as f64)).collect()
    }

    pub(super) fn reference(
        x: &[f32],
        heads: usize,
        positions: &[u32],
        rope: &Rope,
        direction: f64,
    ) -> Vec<f64> {
        let (half, dim) = (rope.inv_freq.len(), rope.head_dim());
        let mut y = vec![0.0; x.len()];
        for (row, position) in positions.iter().enumerate() {
            for head in 0..heads {
                for i in 0..half {
                    let angle = direction * f64::from(*position) * f64::from(rope.inv_freq[i]);
                    let at = (row * heads + head) * dim + i;
                    let (a, b) = (f64::from(x[at]), f64::from(x[at + half]));
                    let scale = f64::from(rope.scale);
                    y[at] = scale * (a * angle.cos() - b * angle.sin());
                    y[at + half] = scale * (b * angle.cos() + a * angle.sin());
                }
            }
        }
        y
    }

    #[test]
    fn both_directions_agree_with_f64() {
        for (head_dim, heads, rows) in [(2, 1, 1), (16, 3, 5), (80, 2, 70), (64, 4, 300)] {
            let rope = Rope::new(frequencies(head_dim), 1.25);
            let positions = random_ids(rows, 5000, 7);
            let x = random(rows * heads * head_dim, 1);
            let mut y = x.clone();
            rope.forward(&mut y, heads, &positions);
            assert!(error(&y, &reference(&x, heads, &positions, &rope, 1.0)) < 2e-6);
            let mut y = x.clone();
            rope.backward(&mut y, heads, &positions);
            assert!(error(&y, &reference(&x, heads, &positions, &rope, -1.0)) < 2e-6);
        }
    }

    #[test]
    fn backward_is_the_adjoint_of_forward() {
        let (heads, rows) = (2, 9);
        let rope = Rope::new(frequencies(8), 0.5);
        let positions = random_ids(rows, 100, 1);
        let (x, dy) = (random(rows * 16, 1), random(rows * 16, 2));
        let (mut y, mut dx) = (x.clone(), dy.clone());
        rope.forward(&mut y, heads, &positions);
        rope.backward(&mut dx, heads, &positions);
        let inner = |a: &[f32], b: &[f32]| -> f64 {
            let pairs = a.iter().zip(b);
            pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        assert!((inner(&y, &dy) - inner(&x, &dx)).abs() < 1e-4);
    }

    #[test]
    fn tables_grow_without_changing_what_they_held() {
        let positions = [3u32, 1, 0];
        let x = random(3 * 16, 1);
        let rope = Rope::new(frequencies(16), 1.0);
        let (mut before, mut after) = (x.clone(), x.clone());
        rope.forward(&mut before, 1, &positions);
        rope.forward(&mut random(16, 2), 1, &[9000]);
        rope.forward(&mut after, 1, &positions);
        assert_eq!(before, after);
        assert_eq!(before[32..], x[32..], "position 0 is not rotated");
    }

    #[test]
    fn no_rows_is_fine() {
        Rope::new(frequencies(16), 1.0).forward(&mut [], 3, &[]);
    }
}

//! Products with few rows: generation, one token at a time.

use super::weight::Weight;
use super::{SMALL, assert_shapes};
use crate::math::{dot, vectorised};
use crate::parallel::Scattered;
use rayon::prelude::*;

/// Up to this many rows are too few to pack a weight for.
const FEW_ROWS: usize = 8;
/// Rows of the weight that those meet at a time.
const COLUMNS: usize = 32;

/// [`nt`](super::nt) for few rows: each row of the weight is read once, and memory is the limit. With
/// more rows than pay for it, this is [`nt`](super::nt). A row's last bits differ from `nt`'s.
pub fn nt_few<'w>(
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
    if m > FEW_ROWS || m * k * n == 0 {
        return super::nt(x, w, y, m, k, n, alpha, beta);
    }
    assert_shapes("nt_few", [("x", x.len(), m, k), ("w", w.len(), n, k), ("y", y.len(), m, n)]);
    let y = Scattered::new(y);
    let block = |widened: &mut Vec<f32>, index: usize| {
        let start = index * COLUMNS;
        let columns = COLUMNS.min(n - start);
        let stored = w.range(start * k..(start + columns) * k);
        let w = match stored {
            Weight::F32(w) => w,
            _ => {
                widened.resize(stored.len(), 0.0);
                stored.widen(widened);
                widened.as_slice()
            }
        };
        let mut products = [0.0; FEW_ROWS * COLUMNS];
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
    let blocks = 0..n.div_ceil(COLUMNS);
    if m * k * n < SMALL {
        let mut widened = Vec::new();
        return blocks.for_each(|index| block(&mut widened, index));
    }
    blocks.into_par_iter().with_min_len(8).for_each_init(Vec::new, block);
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

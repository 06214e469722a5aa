//! An adapter's gradients (the twin of `cuda/adapter.rs`), where what a product has to read outweighs what it computes.

use super::{GRADIENT_ROWS, RANK_AT_MOST, SMALL, View, assert_shapes, gemm_strided, product};
use crate::parallel::Scattered;
use gemm::Parallelism;
use rayon::prelude::*;

/// `du[m,r] = scale dy[m,n] b[n,r]` and `db[n,r] += scale dy[m,n]ᵀ u[m,r]`, in one read of dy. Rows of du are
/// `row_stride` apart, so that du of several adapters can lie side by side. Overwrites du.
///
/// The bits depend on the number of threads, which share dy's columns.
pub fn adapter_backward(
    dy: &[f32],
    u: &[f32],
    b: &[f32],
    du: &mut [f32],
    row_stride: usize,
    db: &mut [f32],
    m: usize,
    n: usize,
    r: usize,
    scale: f32,
) {
    let shapes = [("dy", dy.len(), m, n), ("u", u.len(), m, r), ("b", b.len(), n, r)];
    assert_shapes("adapter_backward", shapes);
    assert_shapes("adapter_backward", [("db", db.len(), n, r); 3]);
    let [dy, u, b] = [(dy, m, n), (u, m, r), (b, n, r)].map(|(x, m, n)| View::new(x, m, n, n));
    if r > RANK_AT_MOST || m * n * r < SMALL {
        gemm_strided(dy, b, du, row_stride, scale, 0.0, Parallelism::Rayon(0));
        return gemm_strided(dy.t(), u, db, r, scale, 1.0, Parallelism::Rayon(0));
    }
    let columns = n.div_ceil(rayon::current_num_threads()).next_multiple_of(64);
    // The first part's du is du, to which those of the others are added.
    let mut others = vec![0.0; (n.div_ceil(columns) - 1) * m * r];
    let first = Scattered::new(du);
    let rest = Scattered::new(&mut others);
    db.par_chunks_mut(columns * r).enumerate().for_each(|(part, db)| {
        let own = part * columns..n.min((part + 1) * columns);
        let (dy, b) = (dy.col_range(own.clone()), b.row_range(own));
        for start in (0..m).step_by(GRADIENT_ROWS) {
            let rows = start..m.min(start + GRADIENT_ROWS);
            let (dy, u) = (dy.row_range(rows.clone()), u.row_range(rows.clone()));
            // SAFETY: a part has its own stretch of `others`, or is the only one in du.
            let (du, stride) = unsafe {
                match part {
                    0 => {
                        let end = (rows.end - 1) * row_stride + r;
                        (first.range_mut(start * row_stride..end), row_stride)
                    }
                    _ => {
                        let before = (part - 1) * m;
                        (rest.range_mut((before + start) * r..(before + rows.end) * r), r)
                    }
                }
            };
            product(dy, b, du, stride, scale, 0.0);
            product(dy.t(), u, db, r, scale, 1.0);
        }
    });
    for others in others.chunks_exact(m * r) {
        for (du, other) in du.chunks_mut(row_stride).zip(others.chunks_exact(r)) {
            du[..r].iter_mut().zip(other).for_each(|(du, other)| *du += other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_accurate, poison, random};

    /// The sums over `inner` of products, in `f32` and `f64`.
    fn sums(
        [rows, inner, columns]: [usize; 3],
        of: impl Fn(usize, usize, usize) -> [f32; 2],
    ) -> (Vec<f32>, Vec<f64>) {
        let (mut plain, mut exact) = (Vec::new(), Vec::new());
        for i in 0..rows {
            for j in 0..columns {
                let pairs = (0..inner).map(|l| of(i, l, j));
                plain.push(pairs.clone().map(|[a, b]| a * b).sum());
                exact.push(pairs.map(|[a, b]| f64::from(a) * f64::from(b)).sum());
            }
        }
        (plain, exact)
    }

    #[test]
    fn both_agree_with_f64_on_any_number_of_threads() {
        for (m, n, r) in
            [(1, 8, 4), (3, 5, 1), (70, 130, 16), (700, 300, 16), (130, 1100, 64), (90, 300, 80)]
        {
            let (dy, u, b) = (random(m * n, 1), random(m * r, 2), random(n * r, 3));
            let before = random(n * r, 4);
            let (du_plain, du_exact) =
                sums([m, n, r], |i, l, j| [0.5 * dy[i * n + l], b[l * r + j]]);
            let (mut db_plain, mut db_exact) =
                sums([n, m, r], |i, l, j| [0.5 * dy[l * n + i], u[l * r + j]]);
            db_plain.iter_mut().zip(&before).for_each(|(sum, before)| *sum += before);
            db_exact.iter_mut().zip(&before).for_each(|(sum, before)| *sum += f64::from(*before));
            for threads in [1, 2, 5] {
                let stride = r + 3;
                let (mut du, mut db) = (poison((m - 1) * stride + r), before.clone());
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                pool.unwrap().install(|| {
                    adapter_backward(&dy, &u, &b, &mut du, stride, &mut db, m, n, r, 0.5);
                });
                let gaps = du.chunks(stride).flat_map(|row| row.get(r..).unwrap_or_default());
                assert!(gaps.into_iter().all(|x| x.is_nan()), "written between du's rows");
                let du: Vec<f32> = du.chunks(stride).flat_map(|row| &row[..r]).copied().collect();
                let what = format!("{m}x{n} rank {r}, {threads} threads");
                assert_accurate(&format!("du {what}"), &du, &du_plain, &du_exact);
                assert_accurate(&format!("db {what}"), &db, &db_plain, &db_exact);
            }
        }
    }
}

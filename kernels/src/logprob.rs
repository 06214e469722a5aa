//! The head: linear layer, log-softmax and the choice of one entry, fused so that only a chunk of the
//! logits exists at any time.
//!
//! ```text
//! logits_t = W h_t                                  [V]
//! logp_t   = logits_t[y_t] - ln Σ_v e^logits_t[v]
//! dlogp_t / dh_t = W[y_t] - Σ_v p_tv W[v]           p_t = softmax(logits_t)
//! ```
//!
//! A loss sees `logp_t` alone, one scalar per token, so the gradient to the hidden state is this unit
//! gradient times `dlogp_t`: it is computed on the way forward, while the logits are there, and the
//! way back is a scaling. The sum over v is collected chunk by chunk with a running maximum, exactly
//! as in attention (rows are queries, W holds both keys and values), so a large vocabulary costs no
//! more memory than a small one.
//!
//! With an adapter of rank r on the head, `logits = W h + scale B (A h)`, and with
//! `e_t = B[y_t] - Σ_v p_tv B[v]`:
//!
//! ```text
//! dlogp_t / dh_t += scale Aᵀ e_t
//! dA += scale Σ_t dlogp_t e_t h_tᵀ
//! dB += scale Σ_t dlogits_t (A h_t)ᵀ                dlogits_tv = dlogp_t ([v = y_t] - p_tv)
//! ```
//!
//! `dB` needs every probability once more after the loss is known, so [`adapter_backward`] recomputes
//! the logits; a head without an adapter never does.

pub mod cuda;

use crate::math::{dot, exp, exp_and_sum, max, sum_exp, vectorised};
use crate::matmul::{Weight, nn, nt, nt_few, tn};
use rayon::prelude::*;

/// How much of the logits exists at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Most rows.
    pub rows: usize,
    /// Most entries of the vocabulary. The same for few rows and many: where the sum over the vocabulary
    /// is cut must not depend on a row's company.
    pub columns: usize,
}

impl Chunk {
    /// At most 16 MiB of logits. Every chunk of rows has all of W packed by its products, hence many rows and
    /// few columns: 2000 tokens of a vocabulary of 32,000 take 4 to 6 % less time than with 512 and 8192.
    pub const FUSED: Self = Self { rows: 2048, columns: 2048 };
    /// All logits at once: what the fused head is measured against.
    pub const WHOLE: Self = Self { rows: usize::MAX, columns: usize::MAX };
}

/// The output layer.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// W: `[V, H]`.
    pub weight: Weight<'a>,
    /// V.
    pub vocab: usize,
    /// H.
    pub hidden: usize,
    /// What is added to W, if anything.
    pub adapter: Option<LowRank<'a>>,
    pub chunk: Chunk,
}

/// A low-rank addition `scale B A` to a weight `[V, H]`.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    /// A: `[r, H]`.
    pub a: &'a [f32],
    /// B: `[V, r]`.
    pub b: &'a [f32],
    /// r.
    pub rank: usize,
    /// Multiplies B A.
    pub scale: f32,
}

/// `logp[t] = log_softmax(logits_t)[targets[t]]` for `hidden`: `[N, H]`, `targets`, `logp`: `[N]`.
/// Overwrites `logp`. `chunk` is room for [`Head::chunk_len`] logits, with anything in it.
pub fn forward(hidden: &[f32], targets: &[u32], head: &Head, chunk: &mut [f32], logp: &mut [f32]) {
    head.assert_shapes(hidden, targets, logp);
    let most = head.chunk_rows(targets.len());
    let rows = hidden.chunks(most * head.hidden).zip(targets.chunks(most));
    for ((hidden, targets), logp) in rows.zip(logp.chunks_mut(most)) {
        let mut softmax = Softmax::new(targets);
        head.visit_logits(hidden, targets.len(), chunk, |first, columns, logits| {
            softmax.take(first, columns, logits);
        });
        softmax.finish(logp);
    }
}

/// [`forward`], and `unit_grad[t] = dlogp[t] / dhidden[t]`: `[N, H]`. Overwrites both.
pub fn forward_with_gradient(
    hidden: &[f32],
    targets: &[u32],
    head: &Head,
    chunk: &mut [f32],
    logp: &mut [f32],
    unit_grad: &mut [f32],
) {
    head.assert_shapes(hidden, targets, logp);
    assert_eq!(
        unit_grad.len(),
        hidden.len(),
        "logprob: unit_grad must be [{}, {}]",
        targets.len(),
        head.hidden
    );
    let width = head.hidden;
    let rank = head.adapter.map_or(0, |adapter| adapter.rank);
    let most = head.chunk_rows(targets.len());
    let rows = hidden.chunks(most * width).zip(targets.chunks(most));
    let results = logp.chunks_mut(most).zip(unit_grad.chunks_mut(most * width));
    for ((hidden, targets), (logp, unit_grad)) in rows.zip(results) {
        let n = targets.len();
        let mut softmax = Softmax::new(targets);
        // Σ e^(logit - top) B[v], `[n, r]`, beside the same sum over W[v] in `unit_grad`.
        let mut low = vec![0.0; n * rank];
        head.visit_logits(hidden, n, chunk, |first, columns, logits| {
            softmax.take_weights(first, columns, logits);
            let beta = if first == 0 { 0.0 } else { 1.0 };
            if first > 0 {
                softmax.shrink(unit_grad, width);
                softmax.shrink(&mut low, rank);
            }
            let weight = head.weight_rows(first, columns);
            nn(logits, weight, unit_grad, n, columns, width, 1.0, beta);
            if let Some(adapter) = &head.adapter {
                nn(logits, adapter.b_rows(first, columns), &mut low, n, columns, rank, 1.0, beta);
            }
        });
        softmax.finish(logp);
        softmax.target_less_mean(head.weight, unit_grad, width);
        if let Some(adapter) = &head.adapter {
            softmax.target_less_mean(adapter.b, &mut low, rank);
            nn(&low, adapter.a, unit_grad, n, rank, width, adapter.scale, 1.0);
        }
    }
}

/// `logits = W h` for `hidden`: `[N, H]`, `logits`: `[N, V]`, in one piece: for generation, where N
/// is small. Overwrites `logits`.
pub fn forward_logits(hidden: &[f32], head: &Head, logits: &mut [f32]) {
    head.assert_valid();
    let rows = hidden.len() / head.hidden;
    assert_eq!(hidden.len(), rows * head.hidden, "logprob: hidden must be [N, {}]", head.hidden);
    assert_eq!(logits.len(), rows * head.vocab, "logprob: logits must be [{rows}, {}]", head.vocab);
    nt_few(hidden, head.weight, logits, rows, head.hidden, head.vocab, 1.0, 0.0);
    if let Some(adapter) = &head.adapter {
        let low = adapter.project(hidden, rows, head.hidden);
        nt_few(&low, adapter.b, logits, rows, adapter.rank, head.vocab, 1.0, 1.0);
    }
}

/// The adapter's gradients, from the `logp` of [`forward`] and the loss's `dlogp`, both `[N]`.
/// Accumulates into `da`: `[r, H]` and `db`: `[V, r]`. The head must have an adapter.
pub fn adapter_backward(
    hidden: &[f32],
    targets: &[u32],
    head: &Head,
    chunk: &mut [f32],
    logp: &[f32],
    dlogp: &[f32],
    da: &mut [f32],
    db: &mut [f32],
) {
    head.assert_shapes(hidden, targets, logp);
    let adapter = head.adapter.expect("logprob: adapter_backward without an adapter");
    let (width, rank) = (head.hidden, adapter.rank);
    assert_eq!(dlogp.len(), targets.len(), "logprob: dlogp must be [{}]", targets.len());
    assert_eq!(da.len(), adapter.a.len(), "logprob: da must be [{rank}, {width}]");
    assert_eq!(db.len(), adapter.b.len(), "logprob: db must be [{}, {rank}]", head.vocab);
    let most = head.chunk_rows(targets.len());
    let rows = hidden.chunks(most * width).zip(targets.chunks(most));
    let losses = logp.chunks(most).zip(dlogp.chunks(most));
    for ((hidden, targets), (logp, dlogp)) in rows.zip(losses) {
        let n = targets.len();
        let low = adapter.project(hidden, n, width);
        let mut of_target = vec![0.0; width];
        let lse: Vec<f32> = (0..n)
            .map(|row| {
                let target = targets[row] as usize;
                let hidden = &hidden[row * width..(row + 1) * width];
                let low = &low[row * rank..(row + 1) * rank];
                head.weight_rows(target, 1).widen(&mut of_target);
                inner(hidden, &of_target) + inner(low, adapter.b_rows(target, 1)) - logp[row]
            })
            .collect();
        // dlogp_t e_t: `[n, r]`.
        let mut pulled = vec![0.0; n * rank];
        head.visit_logits(hidden, n, chunk, |first, columns, logits| {
            let tokens = logits.par_chunks_mut(columns).zip(targets).zip(&lse).zip(dlogp);
            tokens.for_each(|(((logits, target), lse), dlogp)| {
                let target = (*target as usize).wrapping_sub(first);
                logit_gradients(logits, target, *lse, *dlogp);
            });
            let db = &mut db[first * rank..(first + columns) * rank];
            tn(logits, &low, db, n, columns, rank, 1.0, 1.0);
            let beta = if first == 0 { 0.0 } else { 1.0 };
            nn(logits, adapter.b_rows(first, columns), &mut pulled, n, columns, rank, 1.0, beta);
        });
        tn(&pulled, hidden, da, n, rank, width, adapter.scale, 1.0);
    }
}

impl<'a> Head<'a> {
    /// Logits that exist at a time for `n` rows.
    pub fn chunk_len(&self, n: usize) -> usize {
        self.chunk_rows(n) * self.chunk_columns()
    }

    fn chunk_rows(&self, n: usize) -> usize {
        self.chunk.rows.min(n).max(1)
    }

    fn chunk_columns(&self) -> usize {
        self.chunk.columns.min(self.vocab)
    }

    /// Computes the logits of `n` rows in `chunk` for one range of the vocabulary after the other and
    /// hands each to `visit` as (first entry, number of entries, `[n, entries]`).
    fn visit_logits(
        &self,
        hidden: &[f32],
        n: usize,
        chunk: &mut [f32],
        mut visit: impl FnMut(usize, usize, &mut [f32]),
    ) {
        let most = self.chunk_columns();
        let low = self.adapter.map(|adapter| adapter.project(hidden, n, self.hidden));
        for first in (0..self.vocab).step_by(most) {
            let columns = most.min(self.vocab - first);
            let logits = &mut chunk[..n * columns];
            let weight = self.weight_rows(first, columns);
            nt(hidden, weight, logits, n, self.hidden, columns, 1.0, 0.0);
            if let (Some(adapter), Some(low)) = (&self.adapter, &low) {
                nt(low, adapter.b_rows(first, columns), logits, n, adapter.rank, columns, 1.0, 1.0);
            }
            visit(first, columns, logits);
        }
    }

    fn weight_rows(&self, first: usize, rows: usize) -> Weight<'a> {
        self.weight.range(first * self.hidden..(first + rows) * self.hidden)
    }

    fn assert_valid(&self) {
        let Self { vocab, hidden, .. } = *self;
        assert!(vocab > 0 && hidden > 0, "logprob: an empty head");
        assert_eq!(self.weight.len(), vocab * hidden, "logprob: W must be [{vocab}, {hidden}]");
        if let Some(LowRank { a, b, rank, .. }) = self.adapter {
            assert_eq!(a.len(), rank * hidden, "logprob: A must be [{rank}, {hidden}]");
            assert_eq!(b.len(), vocab * rank, "logprob: B must be [{vocab}, {rank}]");
        }
    }

    fn assert_shapes(&self, hidden: &[f32], targets: &[u32], logp: &[f32]) {
        self.assert_valid();
        let n = targets.len();
        assert_eq!(hidden.len(), n * self.hidden, "logprob: hidden must be [{n}, {}]", self.hidden);
        assert_eq!(logp.len(), n, "logprob: logp must be [{n}]");
        for target in targets {
            assert!(
                (*target as usize) < self.vocab,
                "logprob: target {target} in a vocabulary of {}",
                self.vocab
            );
        }
    }
}

impl<'a> LowRank<'a> {
    /// `scale A h` for `n` rows: `[n, r]`.
    fn project(&self, hidden: &[f32], n: usize, width: usize) -> Vec<f32> {
        let mut low = vec![0.0; n * self.rank];
        nt(hidden, self.a, &mut low, n, width, self.rank, self.scale, 0.0);
        low
    }

    fn b_rows(&self, first: usize, rows: usize) -> &'a [f32] {
        &self.b[first * self.rank..(first + rows) * self.rank]
    }
}

/// The softmax of some rows, collected over one range of the vocabulary after the other.
struct Softmax<'a> {
    targets: &'a [u32],
    rows: Vec<Row>,
}

#[derive(Clone, Copy)]
struct Row {
    /// Largest logit so far.
    top: f32,
    /// Σ e^(logit - top) so far.
    sum: f32,
    /// By how much the last range made earlier sums shrink.
    shrink: f32,
    /// The target's logit, once met.
    target: f32,
}

impl<'a> Softmax<'a> {
    fn new(targets: &'a [u32]) -> Self {
        let row = Row { top: f32::NEG_INFINITY, sum: 0.0, shrink: 0.0, target: f32::NAN };
        Self { targets, rows: vec![row; targets.len()] }
    }

    /// Takes in logits `[rows, columns]` of the entries from `first` on.
    fn take(&mut self, first: usize, columns: usize, logits: &[f32]) {
        let rows = self.rows.par_iter_mut().zip(self.targets);
        let tokens = rows.zip(logits.par_chunks(columns));
        tokens.for_each(|((row, target), logits)| {
            row.meet(first, *target, logits);
            collect(row, logits);
        });
    }

    /// As [`Self::take`], and leaves e^(logit - top) in place of the logits.
    fn take_weights(&mut self, first: usize, columns: usize, logits: &mut [f32]) {
        let rows = self.rows.par_iter_mut().zip(self.targets);
        let tokens = rows.zip(logits.par_chunks_mut(columns));
        tokens.for_each(|((row, target), logits)| {
            row.meet(first, *target, logits);
            collect_weights(row, logits);
        });
    }

    /// Brings sums `[rows, width]` over earlier ranges to the present `top`.
    fn shrink(&self, sums: &mut [f32], width: usize) {
        if width > 0 {
            let rows = sums.par_chunks_mut(width).zip(&self.rows);
            rows.for_each(|(sums, row)| multiply(sums, row.shrink));
        }
    }

    /// Turns Σ e^(logit - top) M[v], `[rows, width]`, into `M[y_t] - Σ p_tv M[v]`.
    fn target_less_mean<'w>(&self, matrix: impl Into<Weight<'w>>, sums: &mut [f32], width: usize) {
        if width > 0 {
            let matrix = matrix.into();
            let rows = sums.par_chunks_mut(width).zip(&self.rows).zip(self.targets);
            rows.for_each_init(
                || vec![0.0; width],
                |of_target, ((sums, row), target)| {
                    let first = *target as usize * width;
                    matrix.range(first..first + width).widen(of_target);
                    subtract_from(of_target, sums, 1.0 / row.sum);
                },
            );
        }
    }

    fn finish(&self, logp: &mut [f32]) {
        for (logp, row) in logp.iter_mut().zip(&self.rows) {
            // In this order a nearly certain token keeps its precision.
            *logp = (row.target - row.top) - row.sum.ln();
        }
    }
}

impl Row {
    /// Notes the target's logit if it is among these, whose first is entry `first`.
    fn meet(&mut self, first: usize, target: u32, logits: &[f32]) {
        if let Some(logit) = logits.get((target as usize).wrapping_sub(first)) {
            self.target = *logit;
        }
    }

    /// Raises `top` to cover logits of at most `largest`.
    #[inline(always)]
    fn raise(&mut self, largest: f32) {
        let top = if largest > self.top { largest } else { self.top };
        self.shrink = exp(self.top - top);
        self.sum *= self.shrink;
        self.top = top;
    }
}

vectorised! {
    fn collect(row: &mut Row, logits: &[f32]) {
        row.raise(max(logits));
        row.sum += sum_exp(logits, row.top);
    }

    fn collect_weights(row: &mut Row, logits: &mut [f32]) {
        row.raise(max(logits));
        row.sum += exp_and_sum(logits, row.top);
    }

    /// Turns a row's logits into `dlogp ([v = target] - p_v)`; a target elsewhere is out of range.
    fn logit_gradients(logits: &mut [f32], target: usize, lse: f32, dlogp: f32) {
        for logit in logits.iter_mut() {
            *logit = -dlogp * exp(*logit - lse);
        }
        if let Some(logit) = logits.get_mut(target) {
            *logit += dlogp;
        }
    }

    fn multiply(x: &mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }

    /// `x = from - factor x`.
    fn subtract_from(from: &[f32], x: &mut [f32], factor: f32) {
        for (x, from) in x.iter_mut().zip(from) {
            *x = from - factor * *x;
        }
    }

    fn inner(a: &[f32], b: &[f32]) -> f32 {
        dot(a, b)
    }
}

#[cfg(test)]
mod tests;

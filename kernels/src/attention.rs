//! Causal attention over packed groups with shared prompts, without a score matrix in memory
//! (Dao 2023, "FlashAttention-2", for the tiling and the way back).
//!
//! ```text
//! forward    s_ij = q_i·k_j / sqrt(D)       over the keys j that row i may see
//!            lse_i = ln Σ_j e^s_ij          out_i = Σ_j e^(s_ij - lse_i) v_j
//! backward   p_ij = e^(s_ij - lse_i)        delta_i = dout_i·out_i
//!            dv_j = Σ_i p_ij dout_i         ds_ij = p_ij (dout_i·v_j - delta_i)
//!            dq_i = Σ_j ds_ij k_j / sqrt(D) dk_j = Σ_i ds_ij q_i / sqrt(D)
//! ```
//!
//! What a row may see: its group's prompt up to itself, and its own branch up to itself (see
//! [`crate::layout`]). With a window W, only keys with `position(i) - position(j) < W`, which is
//! Hugging Face's rule. Positions are places within a text: prompt, then branch.
//!
//! A block of queries (the heads that share a key head stacked, so that one product serves them all)
//! meets a tile of keys at a time; tiles that no query of the block may see are never touched.

pub mod cuda;
mod heads;
mod text;

pub use heads::Heads;

use crate::layout::{Beside, Group, Layout};
use crate::math::{dot, exp, exp_and_sum, max, vectorised};
use crate::matmul::{View, product};
use crate::parallel::Scattered;
use rayon::prelude::*;
use std::ops::Range;
use text::{Block, Text, Tile};

/// Rows of stacked queries per block, counted over the heads that share a key head.
const BLOCK_ROWS: usize = 384;
/// Keys per tile where all queries of a block see all of them.
const TILE_KEYS: usize = 128;
/// Keys per tile along the diagonal and at the far end of a window.
const EDGE_KEYS: usize = 32;
/// Products of queries and keys from which decoding one token is worth several threads.
const PARALLEL_DECODE: usize = 256 * 1024;

/// `q`, `out`: `[T, heads, D]`, `k`, `v`: `[T, kv_heads, D]`, `lse`: `[T, heads]` for the way back.
/// Overwrites `out` and `lse`.
pub fn forward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    layout: &Layout,
    heads: &Heads,
    window: Option<usize>,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let rows = layout.rows();
    heads.assert_shapes(rows, &[("q", q), ("out", out)], &[("k", k), ("v", v)]);
    assert_eq!(lse.len(), rows * heads.heads, "attention: lse must be [{rows}, {}]", heads.heads);
    assert_window(window);
    layout.assert_covers_rows_once();

    let texts = layout.groups.iter().flat_map(Text::of_group);
    let keys = Keys { prompts: [k, v], own: [k, v] };
    attend_all(q, &keys, texts, heads, window, out, lse);
}

/// As [`forward`] for responses `beside` a batch, whose prompts they continue: `q`, `out`, `k` and `v` are of
/// their own rows, `prompts` are k and v of the batch. There is no way back. Overwrites `out`.
pub fn forward_beside(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    prompts: [&[f32]; 2],
    beside: &Beside,
    heads: &Heads,
    window: Option<usize>,
    out: &mut [f32],
) {
    heads.assert_shapes(beside.rows(), &[("q", q), ("out", out)], &[("k", k), ("v", v)]);
    assert_window(window);
    let texts = beside.continuations.iter().map(Text::continuing);
    let own_rows: usize = beside.continuations.iter().map(|text| text.branch.len).sum();
    assert_eq!(own_rows, beside.rows(), "attention: the responses do not cover the rows once");
    let mut lse = vec![0.0; beside.rows() * heads.heads];
    attend_all(q, &Keys { prompts, own: [k, v] }, texts, heads, window, out, &mut lse);
}

/// Keys and values of texts: of their prompts, and of the rows of their own.
struct Keys<'a> {
    prompts: [&'a [f32]; 2],
    own: [&'a [f32]; 2],
}

/// All texts' queries, cut into blocks.
fn attend_all(
    q: &[f32],
    keys: &Keys,
    texts: impl Iterator<Item = Text>,
    heads: &Heads,
    window: Option<usize>,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let tokens = tokens_per_block(heads);
    let tasks: Vec<(Text, Block, usize)> = texts
        .flat_map(|text| text.blocks(tokens).map(move |block| (text, block)))
        .flat_map(|(text, block)| (0..heads.kv_heads).map(move |kv| (text, block, kv)))
        .collect();
    let (out, lse) = (Scattered::new(out), Scattered::new(lse));
    tasks.par_iter().for_each_init(ForwardScratch::default, |scratch, (text, block, kv)| {
        let q = &q[text.row(block.position) * heads.query_width()..];
        scratch.attend(q, keys, heads, window, text, block, *kv);
        let sharing = heads.sharing();
        for token in 0..block.len {
            let row = text.row(block.position + token);
            // SAFETY: a row belongs to one text and one block, and its heads to one key head.
            let out = unsafe { out.range_mut(heads.queries_of(row, *kv)) };
            let start = row * heads.heads + kv * sharing;
            // SAFETY: as above.
            let lse = unsafe { lse.range_mut(start..start + sharing) };
            scratch.finish(token * sharing, out, lse);
        }
    });
}

/// The gradients of [`forward`], from its `out` and `lse`; shapes as there, `dout` and `dq` like
/// `q`, `dk` and `dv` like `k`. Overwrites `dq`, `dk` and `dv`.
pub fn backward(
    dout: &[f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &[f32],
    lse: &[f32],
    layout: &Layout,
    heads: &Heads,
    window: Option<usize>,
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let rows = layout.rows();
    let queries = [("q", q), ("out", out), ("dout", dout), ("dq", &*dq)];
    heads.assert_shapes(rows, &queries, &[("k", k), ("v", v), ("dk", &*dk), ("dv", &*dv)]);
    assert_eq!(lse.len(), rows * heads.heads, "attention: lse must be [{rows}, {}]", heads.heads);
    assert_window(window);
    layout.assert_covers_rows_once();

    let given = Given { dout, q, k, v, out, lse, heads, window };
    let (dq, dk, dv) = (Scattered::new(dq), Scattered::new(dk), Scattered::new(dv));
    let tasks: Vec<(&Group, usize)> = layout
        .groups
        .iter()
        .flat_map(|group| (0..heads.kv_heads).map(move |kv| (group, kv)))
        .collect();
    // Keys collect from all queries of their group, so one task takes a group's key head. Where that
    // leaves threads idle, its queries are split into parts with sums of their own.
    let parts = rayon::current_num_threads().div_ceil(tasks.len().max(1));
    tasks.par_iter().for_each(|(group, kv)| {
        let rows = group.rows();
        let blocks: Vec<(Text, Block)> = Text::of_group(group)
            .flat_map(|text| text.blocks(tokens_per_block(heads)).map(move |block| (text, block)))
            .collect();
        let sums: Vec<KeySums> = text::split_evenly(&blocks, parts)
            .into_par_iter()
            .map(|blocks| {
                let mut sums = KeySums::new(rows.len() * heads.head_dim);
                let mut scratch = BackwardScratch::default();
                for (text, block) in blocks {
                    scratch.go_back(&given, rows.start, text, block, *kv, &mut sums);
                    for token in 0..block.len {
                        let row = text.row(block.position + token);
                        // SAFETY: a row belongs to one text and one block, and its heads to one key head.
                        let dq = unsafe { dq.range_mut(heads.queries_of(row, *kv)) };
                        scratch.finish(token, dq, heads);
                    }
                }
                sums
            })
            .collect();
        for (index, row) in rows.enumerate() {
            let from = index * heads.head_dim..(index + 1) * heads.head_dim;
            // SAFETY: a row belongs to one group, and this task has its key head `kv`.
            let dk = unsafe { dk.range_mut(heads.key_of(row, *kv)) };
            // SAFETY: as above.
            let dv = unsafe { dv.range_mut(heads.key_of(row, *kv)) };
            dk.fill(0.0);
            dv.fill(0.0);
            for sums in &sums {
                add(dk, &sums.dk[from.clone()]);
                add(dv, &sums.dv[from.clone()]);
            }
        }
    });
}

/// One new token against a cache. `q`, `out`: `[heads, D]`; `k_cache`, `v_cache`: `[n, kv_heads, D]`
/// hold positions 0..n, the new token's own key and value last. Overwrites `out`.
pub fn decode(
    q: &[f32],
    k_cache: &[f32],
    v_cache: &[f32],
    n: usize,
    heads: &Heads,
    window: Option<usize>,
    out: &mut [f32],
) {
    heads.assert_shapes(1, &[("q", q), ("out", out)], &[]);
    heads.assert_shapes(n, &[], &[("k_cache", k_cache), ("v_cache", v_cache)]);
    assert!(n > 0, "attention: the cache must hold the new token");
    assert_window(window);

    let text = Text::of_cache(n);
    let newest = Block { position: n - 1, len: 1 };
    let keys = Keys { prompts: [&[]; 2], own: [k_cache, v_cache] };
    let width = heads.sharing() * heads.head_dim;
    let head = |scratch: &mut ForwardScratch, (kv, out): (usize, &mut [f32])| {
        scratch.attend(q, &keys, heads, window, &text, &newest, kv);
        scratch.finish(0, out, &mut vec![0.0; heads.sharing()]);
    };
    if n * heads.query_width() <= PARALLEL_DECODE {
        let mut scratch = ForwardScratch::default();
        return out.chunks_mut(width).enumerate().for_each(|out| head(&mut scratch, out));
    }
    out.par_chunks_mut(width).enumerate().for_each_init(ForwardScratch::default, head);
}

/// Tokens whose heads fill a block.
fn tokens_per_block(heads: &Heads) -> usize {
    (BLOCK_ROWS / heads.sharing()).max(16)
}

fn assert_window(window: Option<usize>) {
    assert!(window != Some(0), "attention: a window of 0 hides even the token itself");
}

/// State of one block of stacked queries on the way forward; row `token * sharing + head`.
#[derive(Default)]
struct ForwardScratch {
    /// `[rows, D]`.
    q: Vec<f32>,
    /// `[rows, keys]` of the current tile: scores, then their exponentials.
    scores: Vec<f32>,
    /// `[rows, D]`: Σ e^(s - top) v so far.
    out: Vec<f32>,
    /// `[rows]`: largest score so far.
    top: Vec<f32>,
    /// `[rows]`: Σ e^(s - top) so far.
    sum: Vec<f32>,
}

impl ForwardScratch {
    /// Meets all keys; the block's queries are the first rows of `q`.
    fn attend(
        &mut self,
        q: &[f32],
        keys: &Keys,
        heads: &Heads,
        window: Option<usize>,
        text: &Text,
        block: &Block,
        kv: usize,
    ) {
        let (sharing, dim) = (heads.sharing(), heads.head_dim);
        let rows = block.len * sharing;
        stack(&mut self.q, q, heads, block.len, kv);
        self.out.clear();
        self.out.resize(rows * dim, 0.0);
        self.top.clear();
        self.top.resize(rows, f32::NEG_INFINITY);
        self.sum.clear();
        self.sum.resize(rows, 0.0);

        for tile in text.tiles(block, window, TILE_KEYS, EDGE_KEYS) {
            let Tile { len, queries, .. } = tile.clone();
            let [k, v] = if tile.position < text.prompt_len { keys.prompts } else { keys.own };
            let (start, rows) = (queries.start * sharing, queries.len() * sharing);
            self.scores.resize(rows * len, 0.0);
            let q = View::new(&self.q[start * dim..], rows, dim, dim);
            product(q, heads.tile(k, &tile, kv).t(), &mut self.scores, len, heads.scale(), 0.0);
            for (row, scores) in self.scores.chunks_exact_mut(len).enumerate() {
                let visible = tile.visible(block.position + queries.start + row / sharing, window);
                let row = start + row;
                let shrink = soften(scores, visible, &mut self.top[row], &mut self.sum[row]);
                if shrink != 1.0 {
                    scale(&mut self.out[row * dim..(row + 1) * dim], shrink);
                }
            }
            let weights = View::new(&self.scores, rows, len, len);
            let out = &mut self.out[start * dim..(start + rows) * dim];
            product(weights, heads.tile(v, &tile, kv), out, dim, 1.0, 1.0);
        }
    }

    /// Writes one token: `out`: `[sharing, D]`, `lse`: `[sharing]`, from stacked row `row` on.
    fn finish(&self, row: usize, out: &mut [f32], lse: &mut [f32]) {
        let dim = out.len() / lse.len();
        for (head, (out, lse)) in out.chunks_exact_mut(dim).zip(lse).enumerate() {
            let row = row + head;
            let inverse = 1.0 / self.sum[row];
            for (out, sum) in out.iter_mut().zip(&self.out[row * dim..]) {
                *out = sum * inverse;
            }
            *lse = self.top[row] + self.sum[row].ln();
        }
    }
}

/// What the way back reads.
struct Given<'a> {
    dout: &'a [f32],
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
    heads: &'a Heads,
    window: Option<usize>,
}

/// Gradients of one key head over the rows of one group, `[rows, D]` each.
struct KeySums {
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl KeySums {
    fn new(len: usize) -> Self {
        Self { dk: vec![0.0; len], dv: vec![0.0; len] }
    }
}

/// State of one block of stacked queries on the way back.
#[derive(Default)]
struct BackwardScratch {
    /// `[rows, D]`.
    q: Vec<f32>,
    /// `[rows, D]`.
    dout: Vec<f32>,
    /// `[rows, D]`.
    dq: Vec<f32>,
    /// `[rows]`: dout·out.
    delta: Vec<f32>,
    /// `[rows, keys]` of the current tile.
    p: Vec<f32>,
    /// `[rows, keys]` of the current tile.
    ds: Vec<f32>,
}

impl BackwardScratch {
    /// Computes this block's `dq` and adds its part of `dk` and `dv` to `sums`, whose first row is
    /// row `first_row` of the batch.
    fn go_back(
        &mut self,
        given: &Given,
        first_row: usize,
        text: &Text,
        block: &Block,
        kv: usize,
        sums: &mut KeySums,
    ) {
        let heads = given.heads;
        let (sharing, dim) = (heads.sharing(), heads.head_dim);
        let rows = block.len * sharing;
        let first = text.row(block.position);
        let at = first * heads.query_width();
        stack(&mut self.q, &given.q[at..], heads, block.len, kv);
        stack(&mut self.dout, &given.dout[at..], heads, block.len, kv);
        self.dq.clear();
        self.dq.resize(rows * dim, 0.0);
        self.delta.clear();
        for token in 0..block.len {
            let range = heads.queries_of(text.row(block.position + token), kv);
            let pairs = given.dout[range.clone()].chunks(dim).zip(given.out[range].chunks(dim));
            self.delta.extend(pairs.map(|(dout, out)| inner(dout, out)));
        }

        for tile in text.tiles(block, given.window, TILE_KEYS, EDGE_KEYS) {
            let Tile { len, queries, .. } = tile.clone();
            let (start, rows) = (queries.start * sharing, queries.len() * sharing);
            let (k, v) = (heads.tile(given.k, &tile, kv), heads.tile(given.v, &tile, kv));
            let q = View::new(&self.q[start * dim..], rows, dim, dim);
            let dout = View::new(&self.dout[start * dim..], rows, dim, dim);
            self.p.resize(rows * len, 0.0);
            self.ds.resize(rows * len, 0.0);
            product(q, k.t(), &mut self.p, len, heads.scale(), 0.0);
            product(dout, v.t(), &mut self.ds, len, 1.0, 0.0);
            let pairs = self.p.chunks_exact_mut(len).zip(self.ds.chunks_exact_mut(len));
            for (row, (p, ds)) in pairs.enumerate() {
                let position = block.position + queries.start + row / sharing;
                let lse =
                    given.lse[text.row(position) * heads.heads + kv * sharing + row % sharing];
                let visible = tile.visible(position, given.window);
                score_gradients(p, ds, visible, lse, self.delta[start + row]);
            }
            let p = View::new(&self.p, rows, len, len);
            let ds = View::new(&self.ds, rows, len, len);
            let keys = (tile.row - first_row) * dim..(tile.row - first_row + len) * dim;
            product(p.t(), dout, &mut sums.dv[keys.clone()], dim, 1.0, 1.0);
            product(ds.t(), q, &mut sums.dk[keys], dim, heads.scale(), 1.0);
            let dq = &mut self.dq[start * dim..(start + rows) * dim];
            product(ds, k, dq, dim, heads.scale(), 1.0);
        }
    }

    /// Writes one token's `dq`: `[sharing, D]`.
    fn finish(&self, token: usize, dq: &mut [f32], heads: &Heads) {
        let width = heads.sharing() * heads.head_dim;
        dq.copy_from_slice(&self.dq[token * width..(token + 1) * width]);
    }
}

/// Copies the heads that share key head `kv` from the first rows of `x` into `[tokens * sharing, D]`.
fn stack(stacked: &mut Vec<f32>, x: &[f32], heads: &Heads, tokens: usize, kv: usize) {
    stacked.clear();
    for token in 0..tokens {
        stacked.extend_from_slice(&x[heads.queries_of(token, kv)]);
    }
}

/// Scores out of sight become -inf, whose exponential is 0.
#[inline(always)]
fn hide(scores: &mut [f32], visible: &Range<usize>) {
    scores[..visible.start].fill(f32::NEG_INFINITY);
    scores[visible.end..].fill(f32::NEG_INFINITY);
}

vectorised! {
    /// One row of a tile: turns the visible scores into e^(s - top) and the others into 0, with `top`
    /// and `sum` brought up to date. Returns the factor by which what was summed before shrinks.
    fn soften(scores: &mut [f32], visible: Range<usize>, top: &mut f32, sum: &mut f32) -> f32 {
        hide(scores, &visible);
        let largest = max(scores);
        let mut shrink = 1.0;
        if largest > *top {
            shrink = exp(*top - largest);
            *top = largest;
        }
        // Nothing visible yet: any shift but -inf keeps e^(-inf) at 0.
        let shift = if *top == f32::NEG_INFINITY { 0.0 } else { *top };
        *sum = *sum * shrink + exp_and_sum(scores, shift);
        shrink
    }

    /// One row of a tile: turns scores into weights p, and dout·v into ds = p (dout·v - delta).
    fn score_gradients(p: &mut [f32], ds: &mut [f32], visible: Range<usize>, lse: f32, delta: f32) {
        hide(p, &visible);
        for (p, ds) in p.iter_mut().zip(ds) {
            *p = exp(*p - lse);
            *ds = *p * (*ds - delta);
        }
    }

    fn inner(a: &[f32], b: &[f32]) -> f32 {
        dot(a, b)
    }

    fn scale(x: &mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }

    fn add(x: &mut [f32], y: &[f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }
}

#[cfg(test)]
mod tests;

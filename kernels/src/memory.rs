//! What kernels take for themselves besides their arguments, in bytes. Everything here is given back at
//! the end of a call, but a peak of memory has to count it.

use crate::attention::Heads;

/// Elements over which the `gemm` crate packs both sides of a product at a time, at most.
const PACKED_DEPTH: usize = 1024;
/// Columns of a product that a thread of the crate packs at a time, at most. All are packed at once where there
/// are no more than twice as many.
const PACKED_COLUMNS: usize = 512;

/// The largest packing buffers of a product of `[m, k]` and `[k, n]`.
pub fn product(m: usize, k: usize, n: usize) -> usize {
    let columns = n.min(PACKED_COLUMNS * rayon::current_num_threads().max(2));
    size_of::<f32>() * k.min(PACKED_DEPTH) * (m + columns)
}

/// The sums over keys on attention's way back, where the longest group has `rows` rows.
pub fn attention(heads: &Heads, rows: usize) -> usize {
    let threads = rayon::current_num_threads();
    // Every thread works at one key head of a group, or at a part of it with sums of its own.
    size_of::<f32>() * 2 * rows * heads.head_dim * threads
}

/// The tables of a rotation up to position `positions`.
pub fn rotation(heads: &Heads, positions: usize) -> usize {
    size_of::<f32>() * positions.next_power_of_two() * heads.head_dim
}

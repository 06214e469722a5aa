//! The sizes of the tiles of attention.cu and decode.cu, which get them as constants, and the shared memory they take.

use super::super::Heads;
use super::{DECODE, SOURCE};
use crate::cuda::{Error, Kernel, Result};

/// Threads of every block.
pub(super) const THREADS: u32 = 128;
/// Rows of a tile that is met, but for that of the way forward.
const MET: usize = 64;
/// Query heads that a block of the decoding kernel has at most.
pub(super) const DECODE_ROWS: usize = 16;
/// Keys that a block of the decoding kernel meets.
pub(super) const PART_KEYS: usize = 256;

/// What the kernels are compiled for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiling {
    head_dim: usize,
    sharing: usize,
}

impl Tiling {
    /// # Errors
    /// The kernels have no such heads.
    pub(super) fn of(heads: &Heads) -> Result<Self> {
        let (head_dim, sharing) = (heads.head_dim, heads.sharing());
        if !head_dim.is_multiple_of(2) || head_dim > 128 {
            let limit = "the kernels for GPUs take an even one of at most 128";
            return Err(Error::Failed(format!("attention: head_dim is {head_dim}, {limit}")));
        }
        if sharing > MET {
            let limit = "the kernels for GPUs take at most 64";
            let message = format!("attention: {sharing} query heads share a key head, {limit}");
            return Err(Error::Failed(message));
        }
        Ok(Self::new(head_dim, sharing))
    }

    pub(super) const fn new(head_dim: usize, sharing: usize) -> Self {
        Self { head_dim, sharing }
    }

    /// A kernel of attention.cu.
    pub(super) const fn kernel(self, name: &'static str) -> Kernel {
        Kernel::new(&SOURCE, name, THREADS)
            .define("HEAD_DIM", self.head_dim as i64)
            .define("SHARING", self.sharing as i64)
            .define("FORWARD_ROWS", Self::FORWARD_ROWS as i64)
            .define("FORWARD_COLUMNS", self.forward_columns() as i64)
            .define("BACKWARD_ROWS", self.backward_rows() as i64)
            .define("MET", MET as i64)
    }

    /// A kernel of decode.cu.
    pub(super) const fn decode_kernel(self, name: &'static str) -> Kernel {
        Kernel::new(&DECODE, name, THREADS)
            .define("HEAD_DIM", self.head_dim as i64)
            .define("SHARING", self.sharing as i64)
            .define("ROWS", DECODE_ROWS as i64)
            .define("PART_KEYS", PART_KEYS as i64)
            .define("MET", MET as i64)
    }

    // Of rows of the own tile a warp has as many as the registers hold, since each saves reading the met tile once more.
    const FORWARD_ROWS: usize = 128;

    /// Columns of scores that a warp has in registers at a time on the way forward: the keys of a tile.
    const fn forward_columns(self) -> usize {
        if self.dim() <= 96 { 64 } else { 48 }
    }

    /// Rows of a block of queries or keys on the way back.
    pub(super) const fn backward_rows(self) -> usize {
        if self.dim() <= 64 { 128 } else { 64 }
    }

    /// Tokens of a block of queries on the way forward.
    pub(super) fn forward_tokens(self) -> usize {
        Self::FORWARD_ROWS / self.sharing
    }

    /// Tokens of a block of queries on the way back.
    pub(super) fn backward_tokens(self) -> usize {
        self.backward_rows() / self.sharing
    }

    pub(super) fn forward_bytes(self) -> u32 {
        self.bytes(Self::FORWARD_ROWS + 4 * self.forward_columns())
    }

    pub(super) fn backward_keys_bytes(self) -> u32 {
        let statistics = 4 * MET * size_of::<f32>();
        self.backward_queries_bytes() + statistics as u32
    }

    pub(super) fn backward_queries_bytes(self) -> u32 {
        self.bytes(2 * self.backward_rows() + 4 * MET)
    }

    pub(super) fn decode_bytes(self) -> u32 {
        self.bytes(DECODE_ROWS + 4 * MET)
    }

    /// Of so many rows.
    fn bytes(self, rows: usize) -> u32 {
        (rows * self.dim() * size_of::<u16>()) as u32
    }

    /// DIM: head_dim with zeros behind it.
    const fn dim(self) -> usize {
        self.head_dim.next_multiple_of(16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a block may have on the smallest of the supported GPUs, compute capability 8.6.
    const SMALLEST: u32 = 99 * 1024;

    #[test]
    fn every_head_fits_the_smallest_device() {
        for head_dim in (2..=128).step_by(2) {
            let tiling = Tiling::of(&Heads { heads: 6, kv_heads: 2, head_dim }).unwrap();
            for bytes in
                [tiling.forward_bytes(), tiling.backward_keys_bytes(), tiling.decode_bytes()]
            {
                assert!(bytes <= SMALLEST, "{bytes} bytes for head_dim {head_dim}");
            }
        }
    }

    #[test]
    fn heads_without_a_kernel_are_refused() {
        let refusal = |heads, kv_heads, head_dim| {
            Tiling::of(&Heads { heads, kv_heads, head_dim }).unwrap_err().to_string()
        };
        assert!(refusal(2, 1, 256).contains("head_dim is 256"));
        assert!(refusal(2, 1, 7).contains("head_dim is 7"));
        assert!(refusal(65, 1, 64).contains("65 query heads share a key head"));
    }
}

//! The shape of heads: which query heads share a key head, and where each lies in a row.

use super::text::Tile;
use crate::matmul::View;
use std::ops::Range;

/// How many heads there are, and how wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`. Query head h reads key head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
}

impl Heads {
    /// Query heads per key head.
    pub(super) fn sharing(&self) -> usize {
        self.heads / self.kv_heads
    }

    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    pub fn key_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    pub(super) fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Where the heads that share key head `kv` lie in row `row` of q, out and their gradients.
    pub(super) fn queries_of(&self, row: usize, kv: usize) -> Range<usize> {
        let width = self.sharing() * self.head_dim;
        let start = row * self.query_width() + kv * width;
        start..start + width
    }

    /// Where key head `kv` lies in row `row` of k, v and their gradients.
    pub(super) fn key_of(&self, row: usize, kv: usize) -> Range<usize> {
        let start = row * self.key_width() + kv * self.head_dim;
        start..start + self.head_dim
    }

    /// Key head `kv` of the rows of a tile, as a matrix `[keys, D]`.
    pub(super) fn tile<'a>(&self, keys: &'a [f32], tile: &Tile, kv: usize) -> View<'a> {
        let start = self.key_of(tile.row, kv).start;
        View::new(&keys[start..], tile.len, self.head_dim, self.key_width())
    }

    pub(super) fn assert_valid(&self) {
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads) && self.head_dim > 0,
            "attention: {} heads over {} key heads of width {}",
            self.heads,
            self.kv_heads,
            self.head_dim
        );
    }

    pub(super) fn assert_shapes(
        &self,
        rows: usize,
        queries: &[(&str, &[f32])],
        keys: &[(&str, &[f32])],
    ) {
        self.assert_valid();
        for (name, data) in queries {
            let width = self.query_width();
            assert_eq!(data.len(), rows * width, "attention: {name} must be [{rows}, {width}]");
        }
        for (name, data) in keys {
            let width = self.key_width();
            assert_eq!(data.len(), rows * width, "attention: {name} must be [{rows}, {width}]");
        }
    }
}

//! Matrices inside larger ones.

use std::ops::Range;

/// A matrix inside a larger one: `rows` x `cols` elements, those of a row `col_stride` apart, rows
/// `row_stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(super) data: &'a [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl<'a> View<'a> {
    /// Rows of `cols` adjacent elements, one every `row_stride` elements of `data`.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert_inside(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transposed matrix; nothing moves.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    pub(super) fn row_range(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows);
        let skipped = (range.start * self.row_stride).min(self.data.len());
        Self { data: &self.data[skipped..], rows: range.len(), ..self }
    }

    pub(super) fn col_range(self, range: Range<usize>) -> Self {
        self.t().row_range(range).t()
    }
}

pub(super) fn assert_inside(len: usize, rows: usize, cols: usize, row_stride: usize) {
    let needed = if rows == 0 { 0 } else { (rows - 1) * row_stride + cols };
    assert!(
        cols <= row_stride && needed <= len,
        "[{rows}, {cols}] with stride {row_stride} does not fit in {len} elements"
    );
}

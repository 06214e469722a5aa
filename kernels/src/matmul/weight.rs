//! Frozen weights in the number format of their file.
//!
//! A 16-bit weight is widened a panel of rows at a time, just before the panel is multiplied: half
//! the memory of a widened copy, for one pass over a panel that stays in the caches.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use std::cell::Cell;
use std::ops::Range;

/// Rows of a weight that are widened at a time: in [`nn`](super::nn) about the depth of a block of
/// the product, whose result is then not visited more often than it would be anyway.
const PANEL_ROWS: usize = 512;
/// Elements that one task widens.
const TASK: usize = 1 << 14;

/// The elements of a matrix, row-major, as they are stored; each is exact in `f32`.
#[derive(Clone, Copy, Debug)]
pub enum Weight<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl<'a> Weight<'a> {
    pub fn len(&self) -> usize {
        match self {
            Self::F32(w) => w.len(),
            Self::F16(w) => w.len(),
            Self::Bf16(w) => w.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements of a range.
    ///
    /// # Panics
    /// If it is not inside.
    pub fn range(self, range: Range<usize>) -> Self {
        match self {
            Self::F32(w) => Self::F32(&w[range]),
            Self::F16(w) => Self::F16(&w[range]),
            Self::Bf16(w) => Self::Bf16(&w[range]),
        }
    }

    /// The elements as `f32`; `out` has one for each. Overwrites `out`.
    pub fn widen(self, out: &mut [f32]) {
        match self {
            Self::F32(w) => out.copy_from_slice(w),
            Self::F16(w) => w.convert_to_f32_slice(out),
            Self::Bf16(w) => widen_bf16(w, out),
        }
    }

    /// Calls `visit` for all `rows` rows of `width` elements, in order, some at a time: with the rows
    /// and their elements.
    pub(super) fn for_panels(
        self,
        rows: usize,
        width: usize,
        mut visit: impl FnMut(Range<usize>, &[f32]),
    ) {
        thread_local! {
            /// Memory for a panel. It is taken out while in use: a thread that waits for its share of
            /// a product may be given another product meanwhile.
            static PANEL: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
        }
        if let Self::F32(w) = self {
            return visit(0..rows, w);
        }
        let mut panel = PANEL.take();
        for first in (0..rows).step_by(PANEL_ROWS) {
            let range = first..rows.min(first + PANEL_ROWS);
            let len = range.len() * width;
            if panel.len() < len {
                panel.resize(len, 0.0);
            }
            let stored = self.range(range.start * width..range.end * width);
            let tasks = panel[..len].par_chunks_mut(TASK).enumerate();
            tasks.for_each(|(task, out)| {
                let start = task * TASK;
                stored.range(start..start + out.len()).widen(out);
            });
            visit(range, &panel[..len]);
        }
        PANEL.set(panel);
    }
}

/// The upper half of an `f32` is a `bf16`; this loop becomes vector code, unlike a call per element.
fn widen_bf16(w: &[bf16], out: &mut [f32]) {
    assert_eq!(w.len(), out.len(), "weight: widened lengths differ");
    for (out, w) in out.iter_mut().zip(w) {
        *out = f32::from_bits(u32::from(w.to_bits()) << 16);
    }
}

impl<'a> From<&'a [f32]> for Weight<'a> {
    fn from(w: &'a [f32]) -> Self {
        Self::F32(w)
    }
}

impl<'a> From<&'a Vec<f32>> for Weight<'a> {
    fn from(w: &'a Vec<f32>) -> Self {
        Self::F32(w)
    }
}

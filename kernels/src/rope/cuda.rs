//! The rotation on a device: see `rope.cu`.

use super::Rope;
use crate::args;
use crate::cuda::{
    DeviceBuffer, DeviceSlice, Gpu, Kernel, Result, Source, TILE, assert_aligned, blocks,
};
use half::bf16;

pub(crate) const HEADER: (&str, &str) = ("rope.cuh", include_str!("../rope.cuh"));
static SOURCE: Source =
    Source { name: "rope.cu", text: include_str!("../rope.cu"), headers: &[TILE, HEADER] };

const fn rotate(head_dim: usize) -> Kernel {
    Kernel::new(&SOURCE, "rope_rotate", 256).define("HEAD_DIM", head_dim as i64)
}

/// The kernel for the head widths of usual models, and for one that is odd.
pub const KERNELS: &[Kernel] = &[rotate(12), rotate(64), rotate(80), rotate(96), rotate(128)];

/// The cosines and sines of a [`Rope`] on a device.
pub struct Table {
    /// `[positions, D/2, 2]`.
    angles: DeviceBuffer<f32>,
    positions: usize,
    head_dim: usize,
}

impl Table {
    /// For positions below `positions`: the same numbers as on the processor.
    ///
    /// # Errors
    /// The device has no memory left.
    pub fn new(gpu: &Gpu, rope: &Rope, positions: usize) -> Result<Self> {
        assert!(positions > 0, "rope: a table without positions");
        let (pairs, head_dim) = (positions * rope.inv_freq.len(), rope.head_dim());
        if gpu.most_allocated().is_some() {
            // It only counts.
            return Ok(Self { angles: gpu.alloc(2 * pairs)?, positions, head_dim });
        }
        let tables = rope.tables(positions);
        let pairs = tables.cos.iter().zip(&tables.sin).take(pairs);
        let angles: Vec<f32> = pairs.flat_map(|(cos, sin)| [*cos, *sin]).collect();
        Ok(Self { angles: gpu.uploaded(&angles)?, positions, head_dim })
    }

    /// D.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// `[positions, D/2, 2]`: cosines and sines.
    pub(crate) fn angles(&self) -> &DeviceSlice<f32> {
        &self.angles
    }

    /// Positions below this one have angles.
    pub fn positions(&self) -> usize {
        self.positions
    }
}

/// [`Rope::forward`] in bf16: rotates `x`: `[T, heads, D]` in place, row t by `positions[t]`. A position
/// beyond the table makes its row NaN.
///
/// # Errors
/// The launch fails.
pub fn forward(
    gpu: &Gpu,
    table: &Table,
    x: &mut DeviceSlice<bf16>,
    heads: usize,
    positions: &DeviceSlice<u32>,
) -> Result<()> {
    turn(gpu, table, x, heads, positions, 1.0)
}

/// [`Rope::backward`] in bf16: turns the gradient to the rotated `[T, heads, D]` into that to the
/// unrotated, in place.
///
/// # Errors
/// The launch fails.
pub fn backward(
    gpu: &Gpu,
    table: &Table,
    dx: &mut DeviceSlice<bf16>,
    heads: usize,
    positions: &DeviceSlice<u32>,
) -> Result<()> {
    turn(gpu, table, dx, heads, positions, -1.0)
}

fn turn(
    gpu: &Gpu,
    table: &Table,
    x: &mut DeviceSlice<bf16>,
    heads: usize,
    positions: &DeviceSlice<u32>,
    direction: f32,
) -> Result<()> {
    let (rows, head_dim) = (positions.len(), table.head_dim);
    assert_eq!(x.len(), rows * heads * head_dim, "rope: x must be [{rows}, {heads}, {head_dim}]");
    assert_aligned("rope", [&*x]);
    if x.len() == 0 {
        return Ok(());
    }
    // Elements of the first half that a thread turns with their partners; as in rope.cu.
    let piece = if (head_dim / 2).is_multiple_of(8) { 8 } else { 1 };
    let items = rows * heads * (head_dim / 2 / piece);
    let count = u32::try_from(items).expect("rope: a batch of more than 2^32 pieces");
    let args =
        args![x, positions, &table.angles, table.positions as u32, heads as u32, count, direction];
    gpu.launch(&rotate(head_dim), [blocks(items, 256), 1, 1], 0, args)
}

#[cfg(test)]
mod tests;

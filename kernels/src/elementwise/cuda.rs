//! Sums and multiples of whole arrays on a device: see `elementwise.cu`.

use crate::args;
use crate::cuda::{DeviceSlice, Gpu, Kernel, Result, Source, TILE, assert_aligned, blocks};
use half::bf16;

static SOURCE: Source =
    Source { name: "elementwise.cu", text: include_str!("../elementwise.cu"), headers: &[TILE] };
const ADD: Kernel = Kernel::new(&SOURCE, "elementwise_add", 256);
const SCALE_ROWS: Kernel = Kernel::new(&SOURCE, "elementwise_scale_rows", 256);

/// Every kernel of this file.
pub const KERNELS: &[Kernel] = &[ADD, SCALE_ROWS];

/// Elements of one thread.
const EACH: usize = 8;

/// [`super::add`] in bf16: `x += y`.
///
/// # Errors
/// The launch fails.
pub fn add(gpu: &Gpu, x: &mut DeviceSlice<bf16>, y: &DeviceSlice<bf16>) -> Result<()> {
    let n = x.len();
    assert_eq!(n, y.len(), "elementwise::add: lengths differ");
    assert_aligned("elementwise::add", [x, y]);
    if n == 0 {
        return Ok(());
    }
    gpu.launch(&ADD, [blocks(n, 256 * EACH), 1, 1], 0, args![x, y, n])
}

/// [`super::scale_rows`] in bf16: `y[t, :] = factors[t] * x[t, :]` for `x`, `y`: `[T, width]` with T =
/// `factors.len()`. Overwrites `y`.
///
/// # Errors
/// The launch fails.
pub fn scale_rows(
    gpu: &Gpu,
    x: &DeviceSlice<bf16>,
    factors: &DeviceSlice<f32>,
    y: &mut DeviceSlice<bf16>,
) -> Result<()> {
    let rows = factors.len();
    assert_eq!(x.len(), y.len(), "elementwise::scale_rows: lengths differ");
    if x.len() == 0 {
        return Ok(());
    }
    assert!(rows > 0 && x.len().is_multiple_of(rows), "elementwise::scale_rows: ragged");
    let width = x.len() / rows;
    assert_aligned("elementwise::scale_rows", [x, y]);
    gpu.launch(&SCALE_ROWS, [blocks(rows, 1), 1, 1], 0, args![x, factors, y, width as u32])
}

#[cfg(test)]
mod tests;

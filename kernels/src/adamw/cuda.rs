//! AdamW and the gradient's norm on a device: see `adamw.cu`.

use super::{AdamW, Factors};
use crate::args;
use crate::cuda::{DeviceBuffer, DeviceSlice, Gpu, Kernel, Result, Source, blocks};
use half::bf16;

static SOURCE: Source =
    Source { name: "adamw.cu", text: include_str!("../adamw.cu"), headers: &[] };
const STEP: Kernel = Kernel::new(&SOURCE, "adamw_step", THREADS);
const NORM_SQUARED: Kernel = Kernel::new(&SOURCE, "adamw_norm_squared", THREADS);
const ADD_UP: Kernel = Kernel::new(&SOURCE, "adamw_add_up", THREADS);

/// Every kernel of this file.
pub const KERNELS: &[Kernel] = &[STEP, NORM_SQUARED, ADD_UP];

// As in adamw.cu.
const THREADS: u32 = 256;
const PIECE: usize = 4096;
/// For a sum over a block: one f64 a warp.
const SHARED_BYTES: u32 = THREADS / 32 * 8;

/// One matrix that is trained, `[rows, width]`, and what belongs to it.
pub struct Tensor<'a> {
    pub param: &'a mut DeviceSlice<f32>,
    pub grad: &'a DeviceSlice<f32>,
    pub m: &'a mut DeviceSlice<f32>,
    pub v: &'a mut DeviceSlice<f32>,
    /// `[rows, pitch]`, or more rows: receives `copy_scale * param` for the products, at the beginning of
    /// each row; all else in it stays as it is.
    pub copy: &'a mut DeviceSlice<bf16>,
    pub width: usize,
    /// At least `width`.
    pub pitch: usize,
    pub copy_scale: f32,
}

/// Where the tensors of a model lie, kept on the device between calls, and room for sums. A call that meets
/// the tensors of the last one uploads nothing.
pub struct Table {
    /// What the device's copy was made from.
    words: Vec<u64>,
    on_device: Option<OnDevice>,
}

struct OnDevice {
    /// As `struct Tensor` of adamw.cu.
    tensors: DeviceBuffer<u64>,
    /// `[blocks, 2]`: a tensor and a piece of it.
    pieces: DeviceBuffer<u32>,
    /// `[blocks]`, then the total.
    sums: DeviceBuffer<f64>,
    blocks: usize,
}

impl Table {
    pub fn new() -> Self {
        Self { words: Vec::new(), on_device: None }
    }

    /// Brings the table up to date; `None` if there is nothing to update.
    fn of(&mut self, gpu: &Gpu, tensors: &[Tensor]) -> Result<Option<&mut OnDevice>> {
        let words: Vec<u64> = tensors.iter().flat_map(Tensor::words).collect();
        if words != self.words {
            self.on_device = OnDevice::new(gpu, &words, tensors)?;
            self.words = words;
        }
        Ok(self.on_device.as_mut())
    }
}

impl Default for Table {
    fn default() -> Self {
        Self::new()
    }
}

impl OnDevice {
    fn new(gpu: &Gpu, words: &[u64], tensors: &[Tensor]) -> Result<Option<Self>> {
        let pieces: Vec<u32> = (0..tensors.len())
            .flat_map(|tensor| {
                let count = tensors[tensor].param.len().div_ceil(PIECE);
                (0..count).flat_map(move |piece| [tensor as u32, piece as u32])
            })
            .collect();
        if pieces.is_empty() {
            return Ok(None);
        }
        let blocks = pieces.len() / 2;
        Ok(Some(Self {
            tensors: gpu.uploaded(words)?,
            pieces: gpu.uploaded(&pieces)?,
            sums: gpu.alloc(blocks + 1)?,
            blocks,
        }))
    }
}

impl Tensor<'_> {
    /// `struct Tensor` of adamw.cu.
    fn words(&self) -> [u64; 7] {
        let Self { param, grad, m, v, copy, width, pitch, copy_scale } = self;
        let length = param.len();
        let lengths = [grad.len(), m.len(), v.len()];
        assert_eq!(lengths, [length; 3], "adamw: lengths differ from param's");
        assert!(
            *width > 0 && length.is_multiple_of(*width) && pitch >= width,
            "adamw: {length} elements with rows of {width}, {pitch} apart in the copy"
        );
        let rows = length / width;
        assert!(copy.len() >= rows * pitch, "adamw: the copy must be [{rows}, {pitch}] or more");
        let short =
            |n: usize| u64::from(u32::try_from(n).expect("adamw: a tensor of 2^32 elements"));
        [
            param.address(),
            m.address(),
            v.address(),
            grad.address(),
            copy.address(),
            short(length) | short(*width) << 32,
            short(*pitch) | u64::from(copy_scale.to_bits()) << 32,
        ]
    }
}

/// [`super::step`] for all `tensors`, in one launch and with the same bits. Their copies for the products
/// are written too.
///
/// # Errors
/// The launch fails, or the device has no memory left for the table.
pub fn step(gpu: &Gpu, table: &mut Table, tensors: &mut [Tensor], settings: &AdamW) -> Result<()> {
    let by = Factors::of(settings);
    let Some(OnDevice { tensors, pieces, blocks: count, .. }) = table.of(gpu, tensors)? else {
        return Ok(());
    };
    let args = args![
        &*tensors,
        &*pieces,
        by.grad_scale,
        by.decay,
        by.one_minus_beta1,
        by.beta2,
        by.one_minus_beta2,
        by.sqrt_correction2,
        by.eps,
        by.step_size,
    ];
    gpu.launch(&STEP, [blocks(*count, 1), 1, 1], 0, args)
}

/// Σ grad² over all `tensors`, in f64 and in an order that depends on their lengths alone. Waits for it.
///
/// # Errors
/// A launch fails, or the device has no memory left for the table.
pub fn norm_squared(gpu: &Gpu, table: &mut Table, tensors: &[Tensor]) -> Result<f64> {
    let Some(OnDevice { tensors, pieces, sums, blocks: count }) = table.of(gpu, tensors)? else {
        return Ok(0.0);
    };
    let (sums, total) = sums.split_at_mut(*count);
    let grid = [blocks(*count, 1), 1, 1];
    gpu.launch(&NORM_SQUARED, grid, SHARED_BYTES, args![&*tensors, &*pieces, &mut *sums])?;
    let args = args![&*sums, *count as u32, &mut *total];
    gpu.launch(&ADD_UP, [1, 1, 1], SHARED_BYTES, args)?;
    let mut sum = [0.0];
    gpu.download(total, &mut sum)?;
    Ok(sum[0])
}

#[cfg(test)]
mod tests;

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

/// One matrix that is trained, `[rows, width]`, and where it and its copy for the products begin among all of
/// them.
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    pub start: usize,
    pub rows: usize,
    pub width: usize,
    pub copy_start: usize,
    /// From one row of the copy to the next, at least `width`.
    pub pitch: usize,
    pub copy_scale: f32,
}

/// Where the tensors of a model lie, on the device.
pub struct Table {
    /// As `struct Tensor` of adamw.cu.
    tensors: DeviceBuffer<u64>,
    /// `[blocks, 2]`: a tensor and a piece of it.
    pieces: DeviceBuffer<u32>,
    blocks: usize,
    /// Where the last tensor ends, and the last copy.
    ends: (usize, usize),
}

impl Table {
    /// # Errors
    /// The device has no memory left.
    ///
    /// # Panics
    /// A tensor has 2^32 elements, or a pitch below its width.
    pub fn new(gpu: &Gpu, tensors: &[Tensor]) -> Result<Self> {
        let words: Vec<u64> = tensors.iter().flat_map(Tensor::words).collect();
        let pieces: Vec<u32> = (0..tensors.len())
            .flat_map(|tensor| {
                let count = tensors[tensor].len().div_ceil(PIECE);
                (0..count).flat_map(move |piece| [tensor as u32, piece as u32])
            })
            .collect();
        let end = |end: fn(&Tensor) -> usize| tensors.iter().map(end).max().unwrap_or(0);
        Ok(Self {
            tensors: gpu.uploaded(&words)?,
            pieces: gpu.uploaded(&pieces)?,
            blocks: pieces.len() / 2,
            ends: (end(|t| t.start + t.len()), end(|t| t.copy_start + t.rows * t.pitch)),
        })
    }

    fn assert_holds(&self, what: &str, len: usize) {
        let end = self.ends.0;
        assert!(len >= end, "adamw: {what} has {len} elements, the tensors end at {end}");
    }
}

impl Tensor {
    fn len(&self) -> usize {
        self.rows * self.width
    }

    /// `struct Tensor` of adamw.cu.
    fn words(&self) -> [u64; 4] {
        let &Self { start, width, copy_start, pitch, copy_scale, .. } = self;
        assert!(width > 0 && pitch >= width, "adamw: rows of {width}, {pitch} apart in the copy");
        let short =
            |n: usize| u64::from(u32::try_from(n).expect("adamw: a tensor of 2^32 elements"));
        [
            start as u64,
            copy_start as u64,
            short(self.len()) | short(width) << 32,
            short(pitch) | u64::from(copy_scale.to_bits()) << 32,
        ]
    }
}

/// [`super::step`] for all tensors, in one launch and with the same bits; `params`, `grads`, `m` and `v` have each
/// at its [`Tensor::start`]. `copies` receives `copy_scale * param` at the beginning of each row of a copy; all
/// else in it stays as it is.
///
/// # Errors
/// The launch fails.
///
/// # Panics
/// A tensor ends beyond one of the slices.
pub fn step(
    gpu: &Gpu,
    table: &Table,
    params: &mut DeviceSlice<f32>,
    grads: &DeviceSlice<f32>,
    m: &mut DeviceSlice<f32>,
    v: &mut DeviceSlice<f32>,
    copies: &mut DeviceSlice<bf16>,
    settings: &AdamW,
) -> Result<()> {
    let all = [("params", params.len()), ("grads", grads.len()), ("m", m.len()), ("v", v.len())];
    all.into_iter().for_each(|(what, len)| table.assert_holds(what, len));
    let (len, end) = (copies.len(), table.ends.1);
    assert!(len >= end, "adamw: copies has {len} elements, the tensors' copies end at {end}");
    if table.blocks == 0 {
        return Ok(());
    }
    let by = Factors::of(settings);
    let args = args![
        &table.tensors,
        &table.pieces,
        params,
        grads,
        m,
        v,
        copies,
        by.grad_scale,
        by.decay,
        by.one_minus_beta1,
        by.beta2,
        by.one_minus_beta2,
        by.sqrt_correction2,
        by.eps,
        by.step_size,
    ];
    gpu.launch(&STEP, [blocks(table.blocks, 1), 1, 1], 0, args)
}

/// The norm of a gradient that grows: taken after everything that is added to it, without waiting, and read
/// in the end.
pub struct Norm {
    /// `[blocks]`.
    sums: DeviceBuffer<f64>,
    /// Σ grad², and the number of the first one that was not finite, or 0.
    total: DeviceBuffer<f64>,
}

impl Norm {
    /// # Errors
    /// The device has no memory left.
    pub fn new(gpu: &Gpu, table: &Table) -> Result<Self> {
        let mut norm = Self { sums: gpu.alloc(table.blocks)?, total: gpu.alloc(2)? };
        norm.clear(gpu)?;
        Ok(norm)
    }

    /// Forgets what was taken.
    ///
    /// # Errors
    /// The device's.
    pub fn clear(&mut self, gpu: &Gpu) -> Result<()> {
        gpu.zero(&mut self.total)
    }

    /// Σ grad² over all tensors, in f64 and in an order that depends on their lengths alone. `number`, which
    /// counts from 1, is remembered if this is the first that is not finite.
    ///
    /// # Errors
    /// A launch fails.
    ///
    /// # Panics
    /// A tensor ends beyond `grads`.
    pub fn take(
        &mut self,
        gpu: &Gpu,
        table: &Table,
        grads: &DeviceSlice<f32>,
        number: u32,
    ) -> Result<()> {
        table.assert_holds("grads", grads.len());
        let Self { sums, total } = self;
        if table.blocks > 0 {
            let args = args![&table.tensors, &table.pieces, grads, &mut *sums];
            gpu.launch(&NORM_SQUARED, [blocks(table.blocks, 1), 1, 1], SHARED_BYTES, args)?;
        }
        let args = args![&*sums, table.blocks as u32, number, total];
        gpu.launch(&ADD_UP, [1, 1, 1], SHARED_BYTES, args)
    }

    /// Σ grad² as last taken, and which was the first that was not finite. Waits for it.
    ///
    /// # Errors
    /// The device's, or an earlier launch's.
    pub fn read(&self, gpu: &Gpu) -> Result<(f64, Option<u32>)> {
        let mut total = [0.0; 2];
        gpu.download(&self.total, &mut total)?;
        Ok((total[0], (total[1] > 0.0).then_some(total[1] as u32)))
    }
}

#[cfg(test)]
mod tests;

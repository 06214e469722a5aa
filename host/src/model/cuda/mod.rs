//! The decoder on a GPU: the twin of [`super::decoder`], [`super::layer`] and [`super::linear`], file by file,
//! with the same names and the same order of ops. Numbers are bf16 and sums f32, where the processor has f32.
//!
//! Nothing here knows whether the device is real, emulated or only counts: see [`uft_kernels::cuda`].

mod adapters;
mod batch;
mod decoder;
mod generate;
mod layer;
mod linear;
mod plan;
mod tape;
mod weights;

pub use adapters::{Adapters, Gradients, Moments};
pub use decoder::{Decoder, Tape};
pub use generate::Continuation;
pub use plan::Counted;

use super::config::ModelConfig;
use crate::{Error, ErrorKind, Result};
use half::bf16;
use linear::Product;
use uft_kernels::cuda::{self, Arena, DeviceBuffer, DeviceSlice, Gpu};
use uft_kernels::embedding;
use uft_kernels::rope::cuda::Table;

/// What all blocks have in common.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    gpu: &'a Gpu,
    /// Where activations come from.
    arena: &'a Arena,
    config: &'a ModelConfig,
    rope: &'a Table,
    /// The product of linear layers: one for batches, one for a token at a time.
    product: Product,
}

impl Context<'_> {
    /// Room for `len` numbers.
    fn take(&self, len: usize) -> Result<DeviceBuffer<bf16>> {
        Ok(self.arena.take(len)?)
    }

    /// Room for sums, statistics or roots.
    fn take_f32(&self, len: usize) -> Result<DeviceBuffer<f32>> {
        Ok(self.arena.take(len)?)
    }

    fn zeros(&self, len: usize) -> Result<DeviceBuffer<bf16>> {
        let mut buffer = self.arena.take(len)?;
        self.gpu.zero(&mut buffer)?;
        Ok(buffer)
    }

    /// The rows `rows` of `x`: `[total, width]`.
    fn gather(
        &self,
        x: &DeviceSlice<bf16>,
        rows: &DeviceSlice<u32>,
        total: usize,
    ) -> Result<DeviceBuffer<bf16>> {
        let mut out = self.arena.take(rows.len() * (x.len() / total))?;
        embedding::cuda::gather(self.gpu, x, rows, &mut out)?;
        Ok(out)
    }

    /// As [`Self::gather`].
    fn gather_f32(
        &self,
        x: &DeviceSlice<f32>,
        rows: &DeviceSlice<u32>,
        total: usize,
    ) -> Result<DeviceBuffer<f32>> {
        let mut out = self.take_f32(rows.len() * (x.len() / total))?;
        embedding::cuda::gather(self.gpu, x.halves(), rows, out.halves_mut())?;
        Ok(out)
    }
}

/// Numbers on the device, with memory from the arena.
fn sent<T: cuda::Plain>(gpu: &Gpu, arena: &Arena, numbers: &[T]) -> Result<DeviceBuffer<T>> {
    let mut buffer = arena.take(numbers.len())?;
    gpu.upload(numbers, &mut buffer)?;
    Ok(buffer)
}

impl From<cuda::Error> for Error {
    fn from(error: cuda::Error) -> Self {
        let kind = match &error {
            cuda::Error::Missing(_) => ErrorKind::Config,
            cuda::Error::OutOfMemory(_) => ErrorKind::OutOfMemory,
            cuda::Error::Failed(_) => ErrorKind::Other,
        };
        Self::new(kind, error.to_string())
    }
}

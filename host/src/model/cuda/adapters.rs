//! The adapters and their gradients on a device.
//!
//! What is trained stays in memory, in f32 ([`Lora`]). Every pass gets a copy of it in bf16, as the products
//! want it, and gives the gradients back in f32: for a few million parameters both take milliseconds.

use super::sent;
use crate::model::lora::{Lora, LoraGrads};
use crate::model::targets::Site;
use crate::{Error, Result};
use half::bf16;
use std::ops::Range;
use uft_kernels::cuda::{Arena, DeviceBuffer, DeviceSlice, Gpu};
use uft_kernels::logprob::cuda::padded as padded_vocabulary;
use uft_kernels::matmul::cuda::adapter::{MOST_RANK, pack_a, pack_b, padded};

/// One adapter: `y += (x Aᵀ) (s B)ᵀ`.
pub struct Adapter {
    /// r.
    pub rank: usize,
    /// s.
    pub scale: f32,
    /// A: `[R, in]`, zeros beyond r.
    pub a: DeviceBuffer<bf16>,
    /// s B: `[out, R]`, zeros beyond r; of the head `[P, R]`.
    pub b: DeviceBuffer<bf16>,
}

/// All adapters of a [`Lora`], in its order, as they are during a pass.
pub struct Adapters {
    adapters: Vec<Adapter>,
}

impl Adapters {
    /// # Errors
    /// A rank is higher than the kernels take, or the device has no memory left.
    pub fn of(lora: &Lora, gpu: &Gpu, arena: &Arena) -> Result<Self> {
        let adapters = lora.adapters.iter().map(|adapter| {
            let (rank, inputs, outputs) = (adapter.rank, adapter.inputs, adapter.outputs);
            if rank > MOST_RANK {
                return Err(Error::config(format!(
                    "rank {rank} of {}: on a GPU it must be at most {MOST_RANK}",
                    adapter.name
                )));
            }
            let mut a = arena.take(padded(rank) * inputs)?;
            let mut b = arena.take(rows_of_b(adapter.site, outputs) * padded(rank))?;
            pack_a(gpu, &sent(gpu, arena, &adapter.a)?, &mut a, rank, inputs)?;
            let (rows, beyond) = b.split_at_mut(outputs * padded(rank));
            pack_b(gpu, &sent(gpu, arena, &adapter.b)?, rows, outputs, rank, adapter.scale)?;
            gpu.zero(beyond)?;
            Ok(Adapter { rank, scale: adapter.scale, a, b })
        });
        Ok(Self { adapters: adapters.collect::<Result<_>>()? })
    }

    /// The adapter at a place of [`Lora::index`].
    pub fn at(&self, index: usize) -> &Adapter {
        &self.adapters[index]
    }
}

/// Adapters with the map of where each is.
#[derive(Clone, Copy)]
pub struct Adapted<'a> {
    pub lora: &'a Lora,
    pub adapters: &'a Adapters,
}

impl<'a> Adapted<'a> {
    /// The adapter of a site.
    pub fn get(&self, site: Site) -> Option<&'a Adapter> {
        self.lora.index(site).map(|at| self.adapters.at(at))
    }
}

/// Rows of B: the head's are as many as its weight has on a device.
fn rows_of_b(site: Site, outputs: usize) -> usize {
    match site {
        Site::Head => padded_vocabulary(outputs),
        Site::Layer(..) => outputs,
    }
}

/// Gradients of all adapters, in one piece: one copy brings them back.
pub struct Gradients {
    numbers: DeviceBuffer<f32>,
    /// Of A and of B.
    places: Vec<[Range<usize>; 2]>,
}

/// Gradients of one adapter.
pub struct Grad<'a> {
    /// `[r, in]`.
    pub a: &'a mut DeviceSlice<f32>,
    /// `[out, r]`; of the head `[P, r]`.
    pub b: &'a mut DeviceSlice<f32>,
}

impl Gradients {
    /// Gradients of zero.
    pub fn zeros(lora: &Lora, gpu: &Gpu, arena: &Arena) -> Result<Self> {
        let mut end = 0;
        let mut place = |len: usize| {
            // Where 16 bytes can be read at a time.
            let start = end;
            end += len.next_multiple_of(4);
            start..start + len
        };
        let places: Vec<[Range<usize>; 2]> = lora
            .adapters
            .iter()
            .map(|adapter| {
                let rows = rows_of_b(adapter.site, adapter.outputs);
                [place(adapter.rank * adapter.inputs), place(rows * adapter.rank)]
            })
            .collect();
        let mut numbers = arena.take(end)?;
        gpu.zero(&mut numbers)?;
        Ok(Self { numbers, places })
    }

    /// Those at a place of [`Lora::index`].
    pub fn at(&mut self, index: usize) -> Grad<'_> {
        let [a, b] = self.places[index].clone();
        let (first, second) = self.numbers.split_at_mut(b.start);
        Grad { a: &mut first[a], b: &mut second[..b.len()] }
    }

    /// Adds all of them to those in memory, when the device has them.
    pub fn add_to(&self, grads: &mut LoraGrads, gpu: &Gpu) -> Result<()> {
        let mut numbers = vec![0.0; self.numbers.len()];
        gpu.download(&self.numbers, &mut numbers)?;
        for (grad, [a, b]) in grads.adapters.iter_mut().zip(&self.places) {
            for (grad, place) in [(&mut grad.a, a), (&mut grad.b, b)] {
                // Beyond the vocabulary the head's B has none.
                let from = &numbers[place.clone()];
                grad.iter_mut().zip(from).for_each(|(sum, more)| *sum += more);
            }
        }
        Ok(())
    }
}

//! What is trained, on a device: the adapters in f32, with a copy in bf16 as the products want it, their gradients
//! and their moments. It comes back to memory only to be written into files.

use crate::model::lora::{AdapterGrad, Lora, LoraGrads};
use crate::model::targets::Site;
use crate::{Error, Result};
use half::bf16;
use std::ops::Range;
use std::sync::Arc;
use uft_kernels::adamw::{self, AdamW, cuda as device};
use uft_kernels::cuda::{DeviceBuffer, DeviceSlice, Gpu};
use uft_kernels::logprob::cuda::padded as padded_vocabulary;
use uft_kernels::matmul::cuda::adapter::{MOST_RANK, pack_a, pack_b, padded};

/// All adapters of a [`Lora`], in its order.
pub struct Adapters {
    layout: Arc<Layout>,
    /// A and B of each, as the layout says.
    params: DeviceBuffer<f32>,
    /// A and s B of each for the products.
    copies: DeviceBuffer<bf16>,
}

/// One adapter, as products take it: `y += (x Aᵀ) (s B)ᵀ`.
#[derive(Clone, Copy)]
pub struct Adapter<'a> {
    /// r.
    pub rank: usize,
    /// s.
    pub scale: f32,
    /// A: `[R, in]`, zeros beyond r.
    pub a: &'a DeviceSlice<bf16>,
    /// s B: `[out, R]`, zeros beyond r; of the head `[P, R]`.
    pub b: &'a DeviceSlice<bf16>,
}

/// Gradients of one adapter.
pub struct Grad<'a> {
    /// `[r, in]`.
    pub a: &'a mut DeviceSlice<f32>,
    /// `[out, r]`; of the head `[P, r]`.
    pub b: &'a mut DeviceSlice<f32>,
}

/// Where the matrices of all adapters lie: parameters, gradients and moments at the same places.
struct Layout {
    gpu: Gpu,
    /// The adapters with A and B empty.
    lora: Lora,
    /// Of A and of B, without the rows of zeros after the head's B.
    places: Vec<[Range<usize>; 2]>,
    copies: Vec<[Range<usize>; 2]>,
    table: device::Table,
    /// Numbers of all matrices, and of all copies.
    len: usize,
    copies_len: usize,
}

/// Matrices begin where 16 bytes can be read at a time, in f32 and in bf16.
const ALIGNMENT: usize = 8;

impl Layout {
    fn new(lora: &Lora, gpu: &Gpu) -> Result<Self> {
        let (mut len, mut copies_len) = (0usize, 0usize);
        let (mut places, mut copies, mut tensors) = (Vec::new(), Vec::new(), Vec::new());
        for adapter in &lora.adapters {
            let (rank, inputs, outputs) = (adapter.rank, adapter.inputs, adapter.outputs);
            if rank > MOST_RANK {
                return Err(Error::config(format!(
                    "rank {rank} of {}: on a GPU it must be at most {MOST_RANK}",
                    adapter.name
                )));
            }
            let (wide, tall) = (padded(rank), rows_of_b(adapter.site, outputs));
            let mut tensor = |rows: usize,
                              width,
                              room: usize,
                              pitch: usize,
                              copy_rows: usize,
                              copy_scale| {
                let (start, copy_start) = (len, copies_len);
                len = (start + room).next_multiple_of(ALIGNMENT);
                let copy_room = copy_rows * pitch;
                copies_len = (copy_start + copy_room).next_multiple_of(ALIGNMENT);
                tensors.push(device::Tensor { start, rows, width, copy_start, pitch, copy_scale });
                (start..start + rows * width, copy_start..copy_start + copy_room)
            };
            let (a, copy_of_a) = tensor(rank, inputs, rank * inputs, inputs, wide, 1.0);
            let (b, copy_of_b) = tensor(outputs, rank, tall * rank, wide, tall, adapter.scale);
            places.push([a, b]);
            copies.push([copy_of_a, copy_of_b]);
        }
        let table = device::Table::new(gpu, &tensors)?;
        let (gpu, lora) = (gpu.clone(), lora.without_matrices());
        Ok(Self { gpu, lora, places, copies, table, len, copies_len })
    }

    /// Numbers of the shape of all matrices, zeros.
    fn zeros(&self) -> Result<DeviceBuffer<f32>> {
        let mut numbers = self.gpu.alloc(self.len)?;
        self.gpu.zero(&mut numbers)?;
        Ok(numbers)
    }

    /// Each adapter's part of such numbers, A's and B's, in memory.
    fn read(&self, numbers: &DeviceSlice<f32>) -> Result<impl Iterator<Item = [Vec<f32>; 2]>> {
        let numbers = self.gpu.downloaded(numbers)?;
        Ok(self.places.iter().map(move |of| of.clone().map(|place| numbers[place].to_vec())))
    }

    /// The reverse of [`Self::read`].
    fn write<'m>(
        &self,
        matrices: impl Iterator<Item = [&'m [f32]; 2]>,
        numbers: &mut DeviceSlice<f32>,
    ) -> Result<()> {
        let mut all = vec![0.0; self.len];
        for (matrices, places) in matrices.zip(&self.places) {
            for (matrix, place) in matrices.into_iter().zip(places) {
                all[place.clone()].copy_from_slice(matrix);
            }
        }
        Ok(self.gpu.upload(&all, numbers)?)
    }
}

/// Rows of B: the head's are as many as its weight has on a device.
fn rows_of_b(site: Site, outputs: usize) -> usize {
    match site {
        Site::Head => padded_vocabulary(outputs),
        Site::Layer(..) => outputs,
    }
}

impl Adapters {
    /// # Errors
    /// A rank is higher than the kernels take, or the device has no memory left.
    pub fn new(lora: &Lora, gpu: &Gpu) -> Result<Self> {
        let layout = Arc::new(Layout::new(lora, gpu)?);
        let (params, mut copies) = (layout.zeros()?, gpu.alloc(layout.copies_len)?);
        gpu.zero(&mut copies)?;
        let mut adapters = Self { layout, params, copies };
        adapters.write(lora)?;
        Ok(adapters)
    }

    /// The same once more.
    pub fn copy(&self) -> Result<Self> {
        let Layout { gpu, len, copies_len, .. } = &*self.layout;
        let (mut params, mut copies) = (gpu.alloc(*len)?, gpu.alloc(*copies_len)?);
        gpu.copy(&self.params, &mut params)?;
        gpu.copy(&self.copies, &mut copies)?;
        Ok(Self { layout: self.layout.clone(), params, copies })
    }

    /// The adapters with A and B empty.
    pub fn shape(&self) -> &Lora {
        &self.layout.lora
    }

    /// What they are now.
    pub fn read(&self) -> Result<Lora> {
        let mut lora = self.layout.lora.clone();
        let matrices = self.layout.read(&self.params)?;
        for (adapter, [a, b]) in lora.adapters.iter_mut().zip(matrices) {
            (adapter.a, adapter.b) = (a, b);
        }
        Ok(lora)
    }

    /// Makes them those of `lora`, which has the same shape.
    pub fn write(&mut self, lora: &Lora) -> Result<()> {
        let Self { layout, params, copies } = self;
        let Layout { gpu, places, copies: copy_places, .. } = &**layout;
        layout.write(lora.adapters.iter().map(|a| [a.a.as_slice(), &a.b]), params)?;
        let places = places.iter().zip(copy_places);
        for (adapter, ([a, b], [copy_of_a, copy_of_b])) in lora.adapters.iter().zip(places) {
            let (rank, inputs, outputs) = (adapter.rank, adapter.inputs, adapter.outputs);
            let to = &mut copies[copy_of_a.clone()];
            pack_a(gpu, &params[a.clone()], to, rank, inputs)?;
            let to = &mut copies[copy_of_b.start..copy_of_b.start + outputs * padded(rank)];
            pack_b(gpu, &params[b.clone()], to, outputs, rank, adapter.scale)?;
        }
        Ok(())
    }

    /// The adapter at a place of [`Lora::index`].
    pub fn at(&self, index: usize) -> Adapter<'_> {
        let adapter = &self.layout.lora.adapters[index];
        let [a, b] = self.layout.copies[index].clone();
        let (a, b) = (&self.copies[a], &self.copies[b]);
        Adapter { rank: adapter.rank, scale: adapter.scale, a, b }
    }

    /// The adapter of a site.
    pub fn get(&self, site: Site) -> Option<Adapter<'_>> {
        self.shape().index(site).map(|at| self.at(at))
    }
}

/// The gradients of [`Adapters`], and their norm.
pub struct Gradients {
    layout: Arc<Layout>,
    numbers: DeviceBuffer<f32>,
    norm: device::Norm,
}

impl Gradients {
    /// Gradients of zero.
    pub fn zeros(adapters: &Adapters) -> Result<Self> {
        let layout = adapters.layout.clone();
        let norm = device::Norm::new(&layout.gpu, &layout.table)?;
        Ok(Self { numbers: layout.zeros()?, norm, layout })
    }

    /// Makes all zero.
    pub fn clear(&mut self) -> Result<()> {
        self.layout.gpu.zero(&mut self.numbers)?;
        Ok(self.norm.clear(&self.layout.gpu)?)
    }

    /// Those at a place of [`Lora::index`].
    pub fn at(&mut self, index: usize) -> Grad<'_> {
        let [grad] = self.each([Some(index)]);
        grad.expect("it was asked for")
    }

    /// Those at several places, which ascend.
    pub fn each<const N: usize>(&mut self, indices: [Option<usize>; N]) -> [Option<Grad<'_>>; N] {
        let Layout { lora, places, .. } = &*self.layout;
        let (mut rest, mut start) = (Some(&mut *self.numbers), 0);
        let mut take = |place: Range<usize>| {
            let rest_of_all = rest.take().expect("it is put back");
            let (own, after) = rest_of_all.split_at_mut(place.end - start);
            let own = &mut own[place.start - start..];
            (rest, start) = (Some(after), place.end);
            own
        };
        indices.map(|index| {
            let [a, b] = places[index?].clone();
            let adapter = &lora.adapters[index?];
            let len = rows_of_b(adapter.site, adapter.outputs) * adapter.rank;
            Some(Grad { a: take(a), b: take(b.start..b.start + len) })
        })
    }

    /// What they are now.
    pub fn read(&self) -> Result<LoraGrads> {
        let matrices = self.layout.read(&self.numbers)?;
        Ok(LoraGrads { adapters: matrices.map(|[a, b]| AdapterGrad { a, b }).collect() })
    }

    /// As [`super::super::trained::Gradients::take_norm`], without waiting.
    pub fn take_norm(&mut self, number: u32) -> Result<()> {
        let Self { layout, numbers, norm } = self;
        Ok(norm.take(&layout.gpu, &layout.table, numbers, number)?)
    }

    /// As [`super::super::trained::Gradients::norm`]. Waits for it.
    pub fn norm(&self) -> Result<(f64, Option<u32>)> {
        let (squared, first) = self.norm.read(&self.layout.gpu)?;
        Ok((squared.sqrt(), first))
    }
}

/// AdamW's moments of [`Adapters`].
pub struct Moments {
    layout: Arc<Layout>,
    /// The mean of the gradients, and that of their squares.
    m: DeviceBuffer<f32>,
    v: DeviceBuffer<f32>,
}

impl Moments {
    /// Moments of zero.
    pub fn zeros(adapters: &Adapters) -> Result<Self> {
        let layout = adapters.layout.clone();
        Ok(Self { m: layout.zeros()?, v: layout.zeros()?, layout })
    }

    /// One update of the adapters.
    pub fn update(
        &mut self,
        adapters: &mut Adapters,
        grads: &Gradients,
        settings: &AdamW,
    ) -> Result<()> {
        let Layout { gpu, table, .. } = &*self.layout;
        let Adapters { params, copies, .. } = adapters;
        let (grads, m, v) = (&grads.numbers, &mut self.m, &mut self.v);
        Ok(adamw::cuda::step(gpu, table, params, grads, m, v, copies, settings)?)
    }

    /// As [`super::super::trained::Moments::read`].
    pub fn read(&self) -> Result<Vec<[Vec<f32>; 2]>> {
        let moments = self.layout.read(&self.m)?.zip(self.layout.read(&self.v)?);
        Ok(moments.flat_map(|([ma, mb], [va, vb])| [[ma, va], [mb, vb]]).collect())
    }

    /// As [`super::super::trained::Moments::write`].
    pub fn write(&mut self, moments: &[[Vec<f32>; 2]]) -> Result<()> {
        let of = |which: usize| {
            let (pairs, _) = moments.as_chunks::<2>();
            pairs.iter().map(move |[a, b]| [a[which].as_slice(), &b[which]])
        };
        self.layout.write(of(0), &mut self.m)?;
        self.layout.write(of(1), &mut self.v)
    }
}

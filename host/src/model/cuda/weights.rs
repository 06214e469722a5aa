//! From a model directory to weights on a device: tensor by tensor out of the mapped files, without a copy of
//! the model in memory. What is not bf16 in its file is rounded to it.

use super::decoder::Decoder;
use crate::model::config::ModelConfig;
use crate::model::decoder::Options;
use crate::model::shards::Shards;
use crate::model::weights::{Read, Reader, Weights};
use crate::{Error, Result};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use std::path::Path;
use std::sync::Mutex;
use uft_kernels::attention::cuda::Schedule;
use uft_kernels::cuda::{Arena, DeviceBuffer, Gpu, Offload};
use uft_kernels::layout::Layout;
use uft_kernels::logprob::cuda::padded as padded_vocabulary;
use uft_kernels::matmul::Weight;

/// Numbers that are rounded at a time.
const PIECE: usize = 1 << 22;

impl Decoder {
    /// As [`super::super::decoder::Decoder::load`], onto a device.
    pub fn load(dir: &Path, gpu: &Gpu) -> Result<Self> {
        let config = ModelConfig::load(dir)?;
        let shards = Shards::open(dir)?;
        let mut reader = Reader::new(dir, &shards);
        let model = Loader { gpu, reader: Some(&mut reader) }.model(config)?;
        reader.refuse_leftovers(&model.config)?;
        Ok(model)
    }

    /// A decoder of this shape with nothing in its weights: for a device that counts.
    pub fn shaped(config: &ModelConfig, gpu: &Gpu) -> Result<Self> {
        Loader { gpu, reader: None }.model(config.clone())
    }
}

struct Loader<'a, 'r> {
    gpu: &'a Gpu,
    /// None for a shape alone.
    reader: Option<&'a mut Reader<'r>>,
}

impl Read for Loader<'_, '_> {
    type Matrix = DeviceBuffer<bf16>;
    type Vector = DeviceBuffer<bf16>;

    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<DeviceBuffer<bf16>> {
        self.tensor(name, &shape, shape[0] * shape[1])
    }

    /// `[V, H]` with rows of zeros up to `[P, H]`: the head's products take so many.
    fn vocabulary(
        &mut self,
        name: &str,
        [vocab, hidden]: [usize; 2],
    ) -> Result<DeviceBuffer<bf16>> {
        self.tensor(name, &[vocab, hidden], padded_vocabulary(vocab) * hidden)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<DeviceBuffer<bf16>> {
        self.tensor(name, &[len], len)
    }
}

impl Loader<'_, '_> {
    fn model(&mut self, config: ModelConfig) -> Result<Decoder> {
        expect_widths(&config, self.gpu)?;
        let Weights { embedding, head, norm, layers } = self.weights(&config)?;
        Ok(Decoder {
            embedding,
            head,
            norm,
            layers,
            rope: config.rope.rotation(config.heads.head_dim),
            angles: Mutex::default(),
            gpu: self.gpu.clone(),
            arena: match self.gpu.most_allocated() {
                Some(_) => Arena::counting(self.gpu),
                None => Arena::new(self.gpu, 0)?,
            },
            offload: match self.gpu.most_allocated() {
                Some(_) => Offload::counting(self.gpu),
                None => Offload::new(self.gpu, 0)?,
            },
            options: Options::default(),
            config,
        })
    }

    /// A tensor at the beginning of `room` numbers, zeros behind it.
    fn tensor(&mut self, name: &str, shape: &[usize], room: usize) -> Result<DeviceBuffer<bf16>> {
        let mut buffer = self.gpu.alloc(room)?;
        let Some(reader) = &mut self.reader else { return Ok(buffer) };
        let frozen = reader.hold(name, shape)?;
        let weight = Weight::from(&frozen);
        let (numbers, beyond) = buffer.split_at_mut(weight.len());
        match weight {
            Weight::Bf16(weight) => self.gpu.upload(weight, numbers)?,
            _ => {
                let mut wide = vec![0.0; PIECE.min(weight.len())];
                let mut rounded = vec![bf16::ZERO; wide.len()];
                for start in (0..weight.len()).step_by(PIECE) {
                    let range = start..weight.len().min(start + PIECE);
                    let (wide, rounded) = (&mut wide[..range.len()], &mut rounded[..range.len()]);
                    weight.range(range.clone()).widen(wide);
                    rounded.convert_from_f32_slice(wide);
                    if let Some(value) = rounded.iter().position(|value| !value.is_finite()) {
                        let value = wide[value];
                        return Err(Error::model(format!(
                            "{name}: {value} is too large for bf16, in which a GPU computes"
                        )));
                    }
                    self.gpu.upload(rounded, &mut numbers[range])?;
                }
            }
        }
        self.gpu.zero(beyond)?;
        Ok(buffer)
    }
}

/// Kernels read 16 bytes at a time, so that rows are multiples of 8 numbers.
fn expect_widths(config: &ModelConfig, gpu: &Gpu) -> Result<()> {
    let heads = &config.heads;
    let normed = if config.qk_norm { heads.head_dim } else { 0 };
    let widths = [
        ("hidden_size", config.hidden),
        ("intermediate_size", config.intermediate),
        ("the width of all query heads", config.query_width()),
        ("the width of all key heads", config.key_width()),
        ("head_dim", normed),
    ];
    if let Some((what, width)) = widths.into_iter().find(|(_, width)| !width.is_multiple_of(8)) {
        return Err(Error::model(format!(
            "{what} is {width}: on a GPU it must be a multiple of 8; with device = \"cpu\" it may be any"
        )));
    }
    // What attention does not take it says itself.
    Schedule::new(gpu, &Layout::new(&[(1, Vec::new())]), heads, None)?;
    Ok(())
}

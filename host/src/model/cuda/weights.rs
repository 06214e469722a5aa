//! From a model directory to weights on a device: tensor by tensor out of the mapped files, without a copy of
//! the model in memory. What is not bf16 in its file is rounded to it.

use super::decoder::Decoder;
use super::layer::Layer;
use super::linear::Linear;
use crate::model::config::ModelConfig;
use crate::model::decoder::Options;
use crate::model::shards::Shards;
use crate::model::targets::{HEAD, LinearSite, Projection};
use crate::model::weights::{EMBEDDING, Reader};
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

impl Loader<'_, '_> {
    fn model(&mut self, config: ModelConfig) -> Result<Decoder> {
        expect_widths(&config)?;
        let (vocab, hidden) = (config.vocab, config.hidden);
        let linears = config.linears();
        let layers = linears
            .chunks_exact(Projection::ALL.len())
            .enumerate()
            .map(|(index, linears)| self.layer(index, linears, &config))
            .collect::<Result<_>>()?;
        Ok(Decoder {
            embedding: self.vocabulary(EMBEDDING, vocab, hidden)?,
            head: match config.tied {
                true => None,
                false => Some(self.vocabulary(&format!("{HEAD}.weight"), vocab, hidden)?),
            },
            norm: self.tensor("model.norm.weight", &[hidden])?,
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
            layers,
            config,
        })
    }

    fn layer(
        &mut self,
        index: usize,
        linears: &[LinearSite],
        config: &ModelConfig,
    ) -> Result<Layer> {
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        let mut linear = |projection: Projection| {
            self.linear(&linears[projection as usize], config.has_bias(projection))
        };
        let (q, k) = (linear(Projection::Q)?, linear(Projection::K)?);
        let (v, o) = (linear(Projection::V)?, linear(Projection::O)?);
        let (gate, up) = (linear(Projection::Gate)?, linear(Projection::Up)?);
        let down = linear(Projection::Down)?;
        let (hidden, head_dim) = (config.hidden, config.heads.head_dim);
        let head_norms = match config.qk_norm {
            false => None,
            true => Some([
                self.tensor(&name("self_attn.q_norm"), &[head_dim])?,
                self.tensor(&name("self_attn.k_norm"), &[head_dim])?,
            ]),
        };
        let input_norm = self.tensor(&name("input_layernorm"), &[hidden])?;
        let mlp_norm = self.tensor(&name("post_attention_layernorm"), &[hidden])?;
        Ok(Layer { index, input_norm, q, k, v, o, head_norms, mlp_norm, gate, up, down })
    }

    fn linear(&mut self, site: &LinearSite, bias: bool) -> Result<Linear> {
        let LinearSite { name, inputs, outputs, .. } = site;
        let weight = self.tensor(&format!("{name}.weight"), &[*outputs, *inputs])?;
        let bias = match bias {
            true => Some(self.tensor(&format!("{name}.bias"), &[*outputs])?),
            false => None,
        };
        Ok(Linear { weight, bias, inputs: *inputs, outputs: *outputs })
    }

    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<DeviceBuffer<bf16>> {
        self.tensor_in(name, shape, shape.iter().product())
    }

    /// `[V, H]` with rows of zeros up to `[P, H]`: the head's products take so many.
    fn vocabulary(
        &mut self,
        name: &str,
        vocab: usize,
        hidden: usize,
    ) -> Result<DeviceBuffer<bf16>> {
        self.tensor_in(name, &[vocab, hidden], padded_vocabulary(vocab) * hidden)
    }

    /// A tensor at the beginning of `room` numbers, zeros behind it.
    fn tensor_in(
        &mut self,
        name: &str,
        shape: &[usize],
        room: usize,
    ) -> Result<DeviceBuffer<bf16>> {
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
fn expect_widths(config: &ModelConfig) -> Result<()> {
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
    Schedule::new(&Layout::new(&[(1, Vec::new())]), heads, None)?;
    Ok(())
}

//! From a model directory to the decoder's weights.

use super::buffers::Pool;
use super::config::ModelConfig;
use super::decoder::{Decoder, Options};
use super::frozen::Frozen;
use super::layer::Layer;
use super::linear::Linear;
use super::shards::{Shards, Tensor};
use super::targets::{HEAD, LinearSite, Projection};
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::path::Path;

/// The embedding table, and the head where it is tied.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";

impl Decoder {
    /// Reads `config.json` and the weights (f32, f16 or bf16, one file or shards) in `dir`.
    ///
    /// Every tensor that the configuration asks for must be there with its shape, and no other, but
    /// for what is known to be without effect.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = ModelConfig::load(dir)?;
        let shards = Shards::open(dir)?;
        let mut reader = Reader::new(dir, &shards);
        let model = reader.model(config)?;
        reader.refuse_leftovers(&model.config)?;
        Ok(model)
    }
}

/// Reads what a configuration asks for, and knows what is left.
pub(super) struct Reader<'a> {
    dir: &'a Path,
    shards: &'a Shards,
    unread: BTreeSet<&'a str>,
}

impl<'a> Reader<'a> {
    pub fn new(dir: &'a Path, shards: &'a Shards) -> Self {
        Self { dir, shards, unread: shards.names().collect() }
    }

    fn model(&mut self, config: ModelConfig) -> Result<Decoder> {
        let hidden = config.hidden;
        let linears = config.linears();
        let layers = linears
            .chunks_exact(Projection::ALL.len())
            .enumerate()
            .map(|(index, linears)| self.layer(index, linears, &config))
            .collect::<Result<_>>()?;
        Ok(Decoder {
            embedding: self.hold(EMBEDDING, &[config.vocab, hidden])?,
            head: match config.tied {
                true => None,
                false => Some(self.hold(&format!("{HEAD}.weight"), &[config.vocab, hidden])?),
            },
            norm: self.read("model.norm.weight", &[hidden])?,
            rope: config.rope.rotation(config.heads.head_dim),
            pool: Pool::default(),
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
                self.read(&name("self_attn.q_norm"), &[head_dim])?,
                self.read(&name("self_attn.k_norm"), &[head_dim])?,
            ]),
        };
        let input_norm = self.read(&name("input_layernorm"), &[hidden])?;
        let mlp_norm = self.read(&name("post_attention_layernorm"), &[hidden])?;
        Ok(Layer { index, input_norm, q, k, v, o, head_norms, mlp_norm, gate, up, down })
    }

    fn linear(&mut self, site: &LinearSite, bias: bool) -> Result<Linear> {
        let LinearSite { name, inputs, outputs, .. } = site;
        let weight = self.hold(&format!("{name}.weight"), &[*outputs, *inputs])?;
        let bias = match bias {
            true => Some(self.read(&format!("{name}.bias"), &[*outputs])?),
            false => None,
        };
        Ok(Linear { weight, bias, inputs: *inputs, outputs: *outputs })
    }

    /// A large tensor, left in its file.
    pub fn hold(&mut self, name: &str, shape: &[usize]) -> Result<Frozen> {
        let tensor = self.tensor(name, shape)?;
        Frozen::hold(self.shards.file_of(&tensor), &tensor)
    }

    /// A small tensor, widened.
    fn read(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.tensor(name, shape)?.to_f32()
    }

    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor<'a>> {
        let tensor = self.shards.tensor(name).ok_or_else(|| {
            Error::model(format!(
                "{}: the tensor {name} {shape:?} is missing from the weights",
                self.dir.display()
            ))
        })?;
        self.unread.remove(name);
        tensor.expect_shape(shape)?;
        Ok(tensor)
    }

    /// A tensor that nothing reads would change the model in transformers, unless it is known not to.
    pub fn refuse_leftovers(&self, config: &ModelConfig) -> Result<()> {
        for name in &self.unread {
            // Old files hold the rotation's frequencies, which follow from the configuration.
            if name.ends_with(".rotary_emb.inv_freq") {
                continue;
            }
            let Some(tensor) = self.shards.tensor(name) else { continue };
            if config.tied && *name == "lm_head.weight" {
                let Some(embedding) = self.shards.tensor(EMBEDDING) else { continue };
                let same = match embedding.dtype == tensor.dtype {
                    true => embedding.bytes == tensor.bytes,
                    false => embedding.to_f32()? == tensor.to_f32()?,
                };
                if same {
                    continue;
                }
                return Err(tensor.error(format!(
                    "differs from {EMBEDDING}, although tie_word_embeddings is true in config.json"
                )));
            }
            return Err(tensor.error(format!(
                "not a tensor of a {} model with this config.json; it would have no effect",
                config.family.name()
            )));
        }
        Ok(())
    }
}

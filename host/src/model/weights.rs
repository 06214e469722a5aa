//! From a model directory to the decoder's weights.

use super::buffers::Pool;
use super::config::ModelConfig;
use super::decoder::{Decoder, Options};
use super::frozen::Frozen;
use super::shards::{Shards, Tensor};
use super::targets::{HEAD, LinearSite, Projection};
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::path::Path;

/// The embedding table, and the head where it is tied.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";

/// All weights of a decoder: matrices are `M`s and vectors `V`s, in memory or on a device.
pub(super) struct Weights<M, V> {
    /// `[V, H]`.
    pub embedding: M,
    /// `[V, H]`; none where it is the embedding.
    pub head: Option<M>,
    /// `[H]`, before the head.
    pub norm: V,
    pub layers: Vec<Layer<M, V>>,
}

/// The frozen weights of a block.
#[derive(Debug)]
pub struct Layer<M, V> {
    pub index: usize,
    /// `[H]`.
    pub input_norm: V,
    pub q: Linear<M, V>,
    pub k: Linear<M, V>,
    pub v: Linear<M, V>,
    pub o: Linear<M, V>,
    /// `[D]` for q and for k (Qwen3).
    pub head_norms: Option<[V; 2]>,
    /// `[H]`.
    pub mlp_norm: V,
    pub gate: Linear<M, V>,
    pub up: Linear<M, V>,
    pub down: Linear<M, V>,
}

/// A frozen linear layer.
#[derive(Debug)]
pub struct Linear<M, V> {
    /// W: `[out, in]`.
    pub weight: M,
    /// b: `[out]`.
    pub bias: Option<V>,
    pub inputs: usize,
    pub outputs: usize,
}

/// How tensors are read; which ones a model has is the same whatever they become.
pub(super) trait Read {
    type Matrix;
    type Vector;

    /// A linear layer's weight, `[out, in]`.
    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<Self::Matrix>;

    /// Embedding or head, `[V, H]`.
    fn vocabulary(&mut self, name: &str, shape: [usize; 2]) -> Result<Self::Matrix>;

    fn vector(&mut self, name: &str, len: usize) -> Result<Self::Vector>;

    /// All that a configuration asks for.
    fn weights(&mut self, config: &ModelConfig) -> Result<Weights<Self::Matrix, Self::Vector>> {
        let table = [config.vocab, config.hidden];
        let linears = config.linears();
        let layers = linears
            .chunks_exact(Projection::ALL.len())
            .enumerate()
            .map(|(index, linears)| self.layer(index, linears, config))
            .collect::<Result<_>>()?;
        Ok(Weights {
            embedding: self.vocabulary(EMBEDDING, table)?,
            head: match config.tied {
                true => None,
                false => Some(self.vocabulary(&format!("{HEAD}.weight"), table)?),
            },
            norm: self.vector("model.norm.weight", config.hidden)?,
            layers,
        })
    }

    fn layer(
        &mut self,
        index: usize,
        linears: &[LinearSite],
        config: &ModelConfig,
    ) -> Result<Layer<Self::Matrix, Self::Vector>> {
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
                self.vector(&name("self_attn.q_norm"), head_dim)?,
                self.vector(&name("self_attn.k_norm"), head_dim)?,
            ]),
        };
        let input_norm = self.vector(&name("input_layernorm"), hidden)?;
        let mlp_norm = self.vector(&name("post_attention_layernorm"), hidden)?;
        Ok(Layer { index, input_norm, q, k, v, o, head_norms, mlp_norm, gate, up, down })
    }

    fn linear(
        &mut self,
        site: &LinearSite,
        bias: bool,
    ) -> Result<Linear<Self::Matrix, Self::Vector>> {
        let LinearSite { name, inputs, outputs, .. } = site;
        let weight = self.matrix(&format!("{name}.weight"), [*outputs, *inputs])?;
        let bias = match bias {
            true => Some(self.vector(&format!("{name}.bias"), *outputs)?),
            false => None,
        };
        Ok(Linear { weight, bias, inputs: *inputs, outputs: *outputs })
    }
}

impl Decoder {
    /// Reads `config.json` and the weights (f32, f16 or bf16, one file or shards) in `dir`.
    ///
    /// Every tensor that the configuration asks for must be there with its shape, and no other, but
    /// for what is known to be without effect.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = ModelConfig::load(dir)?;
        let shards = Shards::open(dir)?;
        let mut reader = Reader::new(dir, &shards);
        let Weights { embedding, head, norm, layers } = reader.weights(&config)?;
        reader.refuse_leftovers(&config)?;
        Ok(Self {
            embedding,
            head,
            norm,
            layers,
            rope: config.rope.rotation(config.heads.head_dim),
            pool: Pool::default(),
            options: Options::default(),
            config,
        })
    }
}

/// Reads what a configuration asks for, and knows what is left.
pub(super) struct Reader<'a> {
    dir: &'a Path,
    shards: &'a Shards,
    unread: BTreeSet<&'a str>,
}

/// Matrices stay in their files, vectors are small and widened.
impl Read for Reader<'_> {
    type Matrix = Frozen;
    type Vector = Vec<f32>;

    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<Frozen> {
        self.hold(name, &shape)
    }

    fn vocabulary(&mut self, name: &str, shape: [usize; 2]) -> Result<Frozen> {
        self.hold(name, &shape)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.tensor(name, &[len])?.to_f32()
    }
}

impl<'a> Reader<'a> {
    pub fn new(dir: &'a Path, shards: &'a Shards) -> Self {
        Self { dir, shards, unread: shards.names().collect() }
    }

    /// A tensor, left in its file.
    pub fn hold(&mut self, name: &str, shape: &[usize]) -> Result<Frozen> {
        let tensor = self.tensor(name, shape)?;
        Frozen::hold(self.shards.file_of(&tensor), &tensor)
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

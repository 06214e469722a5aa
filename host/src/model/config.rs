//! The shape of a model, read from `config.json` as transformers writes it (generations 4 and 5).
//!
//! A value that this decoder does not compute is refused with the file, the key, the value and what
//! is supported: a model that loads is a model that is computed as transformers would.

use super::json::Keys;
use super::rope::RopeConfig;
use super::targets::Projection;
use crate::Result;
use serde_json::Value;
use std::path::Path;
use uft_kernels::attention::Heads;

/// The architectures; what differs between them is spelled out in [`ModelConfig`]'s fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

impl Family {
    /// Every family under its `model_type`.
    pub const ALL: [(Family, &'static str); 4] = [
        (Family::Llama, "llama"),
        (Family::Mistral, "mistral"),
        (Family::Qwen2, "qwen2"),
        (Family::Qwen3, "qwen3"),
    ];

    /// `model_type` in `config.json`.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(family, _)| *family == self).map_or("?", |(_, name)| name)
    }
}

/// Far beyond any model: what every layer gets before the weights are looked at stays small.
const MOST_LAYERS: usize = 4096;

/// Shapes and switches of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    /// V.
    pub vocab: usize,
    /// H.
    pub hidden: usize,
    /// I, the width of the feed-forward block.
    pub intermediate: usize,
    /// L.
    pub layers: usize,
    /// Query heads, key heads and D.
    pub heads: Heads,
    /// Added to the mean square in every norm.
    pub norm_eps: f32,
    pub rope: RopeConfig,
    /// `[L]`: how many positions back a row of the layer may look, itself included; `None` is all.
    pub windows: Vec<Option<usize>>,
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    /// Each head of q and k is normalised before the rotation (Qwen3).
    pub qk_norm: bool,
    /// `lm_head` is the embedding table.
    pub tied: bool,
    /// Longest text that the model was made for.
    pub max_positions: usize,
    /// Tokens that end a generation: of `generation_config.json` where it has any, or else of
    /// `config.json`.
    pub eos: Vec<u32>,
}

impl ModelConfig {
    /// Reads `config.json` (and `generation_config.json`, if there is one) in `dir`.
    pub fn load(dir: &Path) -> Result<Self> {
        let file = dir.join("config.json");
        let mut config = Self::parse(&Keys::read(&file)?)?;
        let generation = dir.join("generation_config.json");
        if generation.exists() {
            let eos = eos_ids(&Keys::read(&generation)?, config.vocab)?;
            if !eos.is_empty() {
                config.eos = eos;
            }
        }
        Ok(config)
    }

    /// Whether a linear layer adds a bias.
    pub fn has_bias(&self, projection: Projection) -> bool {
        match projection {
            Projection::Q | Projection::K | Projection::V => self.qkv_bias,
            Projection::O => self.o_bias,
            Projection::Gate | Projection::Up | Projection::Down => self.mlp_bias,
        }
    }

    /// Reads the keys of one `config.json`.
    pub fn parse(keys: &Keys) -> Result<Self> {
        let family = family(keys)?;
        refuse_unsupported(keys)?;
        let vocab = keys.positive("vocab_size")?;
        let hidden = keys.positive("hidden_size")?;
        let layers = keys.positive("num_hidden_layers")?;
        if layers > MOST_LAYERS {
            return Err(keys.refuse("num_hidden_layers", &format!("at most {MOST_LAYERS}")));
        }
        let heads = heads(keys, family, hidden)?;
        let attention_bias = keys.bool("attention_bias")?.unwrap_or(false);
        // What a key means depends on the family: Mistral and Qwen2 have no switch for biases.
        let (qkv_bias, o_bias) = match family {
            Family::Llama | Family::Qwen3 => (attention_bias, attention_bias),
            Family::Mistral => (false, false),
            Family::Qwen2 => (true, false),
        };
        let max_positions = keys.optional_positive("max_position_embeddings")?.unwrap_or(2048);
        Ok(Self {
            family,
            vocab,
            hidden,
            intermediate: keys.positive("intermediate_size")?,
            layers,
            heads,
            norm_eps: norm_eps(keys)?,
            rope: RopeConfig::parse(keys, max_positions)?,
            windows: windows(keys, family, layers)?,
            qkv_bias,
            o_bias,
            mlp_bias: family == Family::Llama && keys.bool("mlp_bias")?.unwrap_or(false),
            qk_norm: family == Family::Qwen3,
            tied: keys.bool("tie_word_embeddings")?.unwrap_or(false),
            max_positions,
            eos: eos_ids(keys, vocab)?,
        })
    }

    /// Width of q, and of the attention's output.
    pub fn query_width(&self) -> usize {
        self.heads.heads * self.heads.head_dim
    }

    /// Width of k and of v.
    pub fn key_width(&self) -> usize {
        self.heads.kv_heads * self.heads.head_dim
    }
}

fn family(keys: &Keys) -> Result<Family> {
    let name = keys.required_string("model_type")?;
    let known = Family::ALL.iter().find(|(_, known)| *known == name);
    known.map(|(family, _)| *family).ok_or_else(|| {
        let supported: Vec<&str> = Family::ALL.iter().map(|(_, name)| *name).collect();
        keys.refuse("model_type", &format!("supported are {}", supported.join(", ")))
    })
}

fn refuse_unsupported(keys: &Keys) -> Result<()> {
    if keys.get("quantization_config").is_some() {
        return Err(keys.refuse(
            "quantization_config",
            "quantised weights are not supported; use the model's f32, f16 or bf16 weights",
        ));
    }
    if keys.string("hidden_act")?.is_some_and(|act| act != "silu") {
        return Err(keys.refuse("hidden_act", "supported is silu"));
    }
    if keys.number("pretraining_tp")?.is_some_and(|tp| tp != 1.0) {
        return Err(keys.refuse("pretraining_tp", "supported is 1"));
    }
    if keys.number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(keys.refuse("partial_rotary_factor", "supported is 1"));
    }
    Ok(())
}

/// Query heads, key heads and D, with transformers' defaults for keys that are left out.
fn heads(keys: &Keys, family: Family, hidden: usize) -> Result<Heads> {
    let heads = keys.positive("num_attention_heads")?;
    let kv_heads = match keys.optional_positive("num_key_value_heads")? {
        Some(kv_heads) => kv_heads,
        None if keys.has("num_key_value_heads") => heads,
        None => match family {
            Family::Llama => heads,
            Family::Mistral => 8,
            Family::Qwen2 | Family::Qwen3 => 32,
        },
    };
    if !heads.is_multiple_of(kv_heads) {
        return Err(keys.error(
            "num_key_value_heads",
            format!("{kv_heads} does not divide num_attention_heads = {heads}"),
        ));
    }
    let head_dim = match keys.optional_positive("head_dim")? {
        Some(head_dim) => head_dim,
        None if family == Family::Qwen3 => 128,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(keys.error(
                "num_attention_heads",
                format!(
                    "{heads} does not divide hidden_size = {hidden}, and head_dim is not given"
                ),
            ));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(keys.error("head_dim", format!("{head_dim} is odd; a rotation needs pairs")));
    }
    Ok(Heads { heads, kv_heads, head_dim })
}

fn norm_eps(keys: &Keys) -> Result<f32> {
    match keys.number("rms_norm_eps")? {
        None => Ok(1e-6),
        Some(eps) if eps > 0.0 && eps < 1.0 => Ok(eps as f32),
        Some(_) => Err(keys.refuse("rms_norm_eps", "it must lie between 0 and 1")),
    }
}

/// The window of every layer. Mistral has one for all layers; Qwen has a switch and a list of kinds,
/// or in older files the first layer that has a window; Llama has none.
fn windows(keys: &Keys, family: Family, layers: usize) -> Result<Vec<Option<usize>>> {
    let given = keys.optional_positive("sliding_window")?;
    let window = match family {
        Family::Llama if given.is_some() => {
            return Err(keys.refuse("sliding_window", "llama has no window; remove the key"));
        }
        Family::Llama => None,
        Family::Mistral if keys.has("sliding_window") => given,
        Family::Mistral => Some(4096),
        Family::Qwen2 | Family::Qwen3 => match keys.bool("use_sliding_window")?.unwrap_or(false) {
            true if keys.has("sliding_window") => given,
            true => Some(4096),
            false => None,
        },
    };
    if let Some(kinds) = keys.get("layer_types") {
        return windows_by_kind(keys, kinds, family, layers, window);
    }
    let first_with_window = match family {
        Family::Llama | Family::Mistral => 0,
        Family::Qwen2 | Family::Qwen3 => keys.count("max_window_layers")?.unwrap_or(28),
    };
    Ok((0..layers).map(|layer| window.filter(|_| layer >= first_with_window)).collect())
}

fn windows_by_kind(
    keys: &Keys,
    kinds: &Value,
    family: Family,
    layers: usize,
    window: Option<usize>,
) -> Result<Vec<Option<usize>>> {
    const KEY: &str = "layer_types";
    let kinds = kinds.as_array().ok_or_else(|| keys.refuse(KEY, "it must be a list"))?;
    if kinds.len() != layers {
        let message = format!("{} entries for num_hidden_layers = {layers}", kinds.len());
        return Err(keys.error(KEY, message));
    }
    let each = kinds.iter().enumerate().map(|(layer, kind)| match (kind.as_str(), window) {
        // Mistral gives every layer its window, whatever this list says.
        (Some("full_attention"), Some(_)) if family == Family::Mistral => Err(keys.error(
            KEY,
            format!(
                "entry {layer} is full_attention, but mistral's sliding_window holds for all layers"
            ),
        )),
        (Some("full_attention"), _) => Ok(None),
        (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
        (Some("sliding_attention"), None) => Err(keys.error(
            KEY,
            format!("entry {layer} is sliding_attention, but no sliding_window is in use"),
        )),
        _ => Err(keys.error(
            KEY,
            format!("entry {layer} is {kind}; supported are full_attention and sliding_attention"),
        )),
    });
    each.collect()
}

/// `eos_token_id`: absent, a number or a list of numbers.
fn eos_ids(keys: &Keys, vocab: usize) -> Result<Vec<u32>> {
    const KEY: &str = "eos_token_id";
    let id = |value: &Value| match value.as_u64() {
        Some(id) if (id as usize) < vocab => Ok(id as u32),
        _ => Err(keys.refuse(KEY, &format!("ids are whole numbers below vocab_size = {vocab}"))),
    };
    match keys.get(KEY) {
        None => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;

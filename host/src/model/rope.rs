//! The rotary embedding's settings: which frequencies `config.json` asks for.

use super::json::Keys;
use crate::Result;
use serde_json::{Map, Value};
use std::f64::consts::PI;
use uft_kernels::rope::Rope;

/// How fast each pair of a head's dimensions turns with the position.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The slowest pair turns by about `1 / theta` radians per position.
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// What stretches the frequencies to texts longer than those of pretraining.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Nothing.
    Default,
    /// All frequencies divided by a factor.
    Linear { factor: f64 },
    /// Llama 3.1: slow frequencies divided by a factor, fast ones left, a ramp in between.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_positions: f64 },
}

impl RopeConfig {
    /// Reads `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (4), whose type
    /// is called `rope_type`, or `type` in old files.
    pub fn parse(keys: &Keys, max_positions: usize) -> Result<Self> {
        let theta = keys.number("rope_theta")?;
        // The order of transformers where a file has both.
        for key in ["rope_scaling", "rope_parameters"] {
            if let Some(map) = keys.object(key)?.filter(|map| !map.is_empty()) {
                let map = flat(keys, key, map)?;
                return Self::parse_object(keys, key, map, theta, max_positions);
            }
        }
        let theta = positive(keys, "rope_theta", theta.unwrap_or(10_000.0))?;
        Ok(Self { theta, scaling: RopeScaling::Default })
    }

    fn parse_object(
        keys: &Keys,
        key: &str,
        map: &Map<String, Value>,
        theta: Option<f64>,
        max_positions: usize,
    ) -> Result<Self> {
        let inner = Keys::new(keys.file(), map.clone());
        let in_object = |error: crate::Error| crate::Error::model(format!("{error} (in {key})"));
        let parse = || -> Result<Self> {
            let number = |name: &str| match inner.number(name)? {
                Some(value) => positive(&inner, name, value),
                None => Err(inner.missing(name)),
            };
            if inner.number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
                return Err(inner.refuse("partial_rotary_factor", "supported is 1"));
            }
            let kind = if inner.has("rope_type") { "rope_type" } else { "type" };
            let scaling = match inner.string(kind)?.unwrap_or("default") {
                "default" => RopeScaling::Default,
                "linear" => RopeScaling::Linear { factor: number("factor")? },
                "llama3" => RopeScaling::Llama3 {
                    factor: number("factor")?,
                    low_freq_factor: number("low_freq_factor")?,
                    high_freq_factor: number("high_freq_factor")?,
                    original_positions: match inner.has("original_max_position_embeddings") {
                        true => number("original_max_position_embeddings")?,
                        false => max_positions as f64,
                    },
                },
                _ => return Err(inner.refuse(kind, "supported are default, linear and llama3")),
            };
            if let RopeScaling::Llama3 { low_freq_factor, high_freq_factor, .. } = scaling
                && high_freq_factor <= low_freq_factor
            {
                return Err(inner.refuse("high_freq_factor", "it must exceed low_freq_factor"));
            }
            let theta = inner.number("rope_theta")?.or(theta).unwrap_or(10_000.0);
            Ok(Self { theta: positive(&inner, "rope_theta", theta)?, scaling })
        };
        parse().map_err(in_object)
    }

    /// `[D/2]`: radians per position.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|i| {
                let freq = self.theta.powf(-2.0 * i as f64 / head_dim as f64);
                match self.scaling {
                    RopeScaling::Default => freq,
                    RopeScaling::Linear { factor } => freq / factor,
                    RopeScaling::Llama3 {
                        factor,
                        low_freq_factor,
                        high_freq_factor,
                        original_positions,
                    } => {
                        // 1 where a turn is much shorter than the original texts, 0 where longer.
                        let turns = original_positions * freq / (2.0 * PI);
                        let ramp = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        let kept = ramp.clamp(0.0, 1.0);
                        kept * freq + (1.0 - kept) * freq / factor
                    }
                }
            })
            .collect()
    }

    /// The rotation of heads of width `head_dim`.
    pub fn rotation(&self, head_dim: usize) -> Rope {
        Rope::new(self.inv_freq(head_dim), 1.0)
    }
}

/// The settings themselves where they are given per kind of layer, as long as the kinds agree.
fn flat<'a>(keys: &Keys, key: &str, map: &'a Map<String, Value>) -> Result<&'a Map<String, Value>> {
    let kinds: Vec<&Map<String, Value>> = map.values().filter_map(Value::as_object).collect();
    match kinds.as_slice() {
        [] => Ok(map),
        [first, rest @ ..] if kinds.len() == map.len() && rest.iter().all(|kind| kind == first) => {
            Ok(first)
        }
        _ => Err(keys.refuse(key, "supported is one setting for all layers")),
    }
}

fn positive(keys: &Keys, key: &str, value: f64) -> Result<f64> {
    if value > 0.0 && value.is_finite() {
        return Ok(value);
    }
    Err(keys.error(key, format!("{value} must be positive")))
}

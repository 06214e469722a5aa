//! Adapter directories as PEFT writes and reads them: `adapter_config.json` and
//! `adapter_model.safetensors`.

use super::config::ModelConfig;
use super::files;
use super::json::{Keys, model_error};
use super::lora::{Lora, LoraConfig};
use super::shards::TensorFile;
use super::targets::{Patterns, Projection, Targets};
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::path::Path;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
/// The release whose set of keys is written: all that later ones need, and nothing that earlier
/// ones don't know.
const PEFT_VERSION: &str = "0.20.0";

/// Writes an adapter directory that PEFT loads: tensors, a short model card, and last the
/// configuration, without which PEFT does not take the directory for an adapter. An adapter that is
/// there already stays until all of the new one is on the disk.
///
/// `base` is the base model as the user names it.
///
/// # Errors
/// If anything cannot be written; half of an adapter is then never taken for one.
pub fn save(dir: &Path, lora: &Lora, base: &str) -> Result<()> {
    let config = config_json(&lora.config, base)?;
    files::create_dir(dir)?;
    let tensors = files::prepare_tensors(&dir.join(TENSORS), lora.tensors())?;
    let card = files::prepare_bytes(&dir.join("README.md"), model_card(lora, base).as_bytes())?;
    let at = dir.join(CONFIG);
    let config = files::prepare_bytes(&at, config.as_bytes())?;
    if at.exists() {
        // New tensors under an old configuration would be neither adapter.
        std::fs::remove_file(&at).map_err(|e| files::write_error(&at, &e))?;
        files::sync_dir(dir)?;
    }
    tensors.place()?;
    card.place()?;
    config.place()?;
    files::sync_dir(dir)
}

/// The keys in the order of Python's `json.dumps(…, indent=2, sort_keys=True)`.
fn config_json(config: &LoraConfig, base: &str) -> Result<String> {
    let targets = match &config.targets {
        Targets::List(entries) => sorted_list(entries.iter().map(String::as_str)),
        Targets::Regex(text) => json!(text),
        // As PEFT: the names instead of the shorthand.
        Targets::AllLinear => {
            let last = |(_, path): &(_, &'static str)| path.rsplit('.').next().unwrap_or(path);
            sorted_list(Projection::ALL.iter().map(last))
        }
    };
    let text = serde_json::to_string_pretty(&json!({
        "alora_invocation_tokens": null,
        "alpha_pattern": sorted_patterns("alpha_pattern", &config.alpha_pattern, |a| number(*a))?,
        "arrow_config": null,
        "auto_mapping": null,
        "base_model_name_or_path": base,
        "bias": "none",
        "corda_config": null,
        "ensure_weight_tying": false,
        "eva_config": null,
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": number(config.alpha),
        "lora_bias": false,
        "lora_dropout": 0.0,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": null,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "qalora_group_size": 16,
        "r": config.rank,
        "rank_pattern": sorted_patterns("rank_pattern", &config.rank_pattern, |r| json!(r))?,
        "revision": null,
        "target_modules": targets,
        "target_parameters": null,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": null,
        "use_dora": false,
        "use_qalora": false,
        "use_rslora": config.rslora,
    }));
    text.map_err(|e| Error::other(e.to_string()))
}

/// A whole number without a point, as Python writes an int.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

fn sorted_list<'a>(entries: impl Iterator<Item = &'a str>) -> Value {
    entries.collect::<BTreeSet<_>>().into_iter().collect()
}

/// A file's keys are sorted, and the first pattern that matches counts, so patterns whose order
/// matters cannot be written.
fn sorted_patterns<T: PartialEq>(
    key: &str,
    patterns: &Patterns<T>,
    value: impl Fn(&T) -> Value,
) -> Result<Value> {
    let mut entries: Vec<&(String, T)> = patterns.0.iter().collect();
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    let in_order = entries.iter().zip(&patterns.0).all(|(sorted, given)| *sorted == given);
    let values_differ = patterns.0.windows(2).any(|pair| pair[0].1 != pair[1].1);
    if !in_order && values_differ {
        return Err(Error::config(format!(
            "{key}: write the patterns in alphabetical order, in which PEFT keeps them: the first that matches counts"
        )));
    }
    Ok(Value::Object(entries.into_iter().map(|(name, v)| (name.clone(), value(v))).collect()))
}

fn model_card(lora: &Lora, base: &str) -> String {
    let LoraConfig { rank, alpha, .. } = lora.config;
    let (count, parameters) = (lora.adapters.len(), lora.parameters());
    format!(
        "---\nlibrary_name: peft\ntags:\n- lora\n- uft\n---\n\n# LoRA adapter\n\n\
         Base model: `{base}`. Rank {rank}, alpha {alpha}, {count} linear layers, {parameters} parameters.\n\n\
         ```python\nfrom peft import AutoPeftModelForCausalLM\n\n\
         model = AutoPeftModelForCausalLM.from_pretrained(\".\")\n```\n"
    )
}

/// Reads an adapter directory for a model.
///
/// Refused, by key and value, is what this program does not compute; every adapter that the
/// configuration means must have its tensors with their shapes, and every tensor an adapter.
pub fn load(dir: &Path, model: &ModelConfig) -> Result<Lora> {
    let keys = Keys::read(&dir.join(CONFIG))?;
    refuse_unsupported(&keys)?;
    let config = parse(&keys)?;
    let mut adapters =
        config.place(model, false).map_err(|e| model_error(keys.file(), e.message))?;

    let path = dir.join(TENSORS);
    if !path.exists() && dir.join("adapter_model.bin").exists() {
        let why =
            "adapter_model.bin is a pickle, which is not read; save it as safetensors with PEFT";
        return Err(model_error(dir, why));
    }
    let file = TensorFile::open(&path)?;
    let names = file.names();
    let mut unread: BTreeSet<&str> = names.iter().map(String::as_str).collect();
    for adapter in &mut adapters {
        let [a, b] = adapter.tensor_names();
        let shapes = [[adapter.rank, adapter.inputs], [adapter.outputs, adapter.rank]];
        let values = [&mut adapter.a, &mut adapter.b];
        for ((name, shape), values) in [&a, &b].into_iter().zip(shapes).zip(values) {
            let tensor = file.tensor(name).ok_or_else(|| {
                model_error(&path, format!("{name} is missing, which {CONFIG} asks for"))
            })?;
            tensor.expect_shape(&shape)?;
            *values = tensor.to_f32()?;
            unread.remove(name.as_str());
        }
    }
    // PEFT saves the frozen matrix along with an adapter on the head.
    let frozen_copy = |name: &str| name.ends_with(".base_layer.weight");
    if let Some(name) = unread.into_iter().find(|name| !frozen_copy(name)) {
        let message =
            format!("{name} belongs to no linear layer that {CONFIG} targets in this model");
        return Err(model_error(&path, message));
    }
    Ok(Lora::new(config, adapters, model.layers))
}

fn parse(keys: &Keys) -> Result<LoraConfig> {
    let targets = match keys.get("target_modules") {
        Some(Value::String(text)) => Targets::from_text(text),
        Some(Value::Array(entries)) => {
            let entry = |entry: &Value| entry.as_str().map(String::from);
            let entries: Option<Vec<String>> = entries.iter().map(entry).collect();
            Targets::List(entries.ok_or_else(|| keys.refuse("target_modules", "not all strings"))?)
        }
        Some(_) => return Err(keys.refuse("target_modules", "it must be a list or a string")),
        None => return Err(keys.missing("target_modules")),
    };
    let ranks = |keys: &Keys, key: &str| keys.positive(key);
    let alphas = |keys: &Keys, key: &str| keys.number(key)?.ok_or_else(|| keys.missing(key));
    Ok(LoraConfig {
        // PEFT's defaults where the keys are absent.
        rank: keys.optional_positive("r")?.unwrap_or(8),
        alpha: keys.number("lora_alpha")?.unwrap_or(8.0),
        targets,
        rank_pattern: parse_patterns(keys, "rank_pattern", ranks)?,
        alpha_pattern: parse_patterns(keys, "alpha_pattern", alphas)?,
        rslora: keys.bool("use_rslora")?.unwrap_or(false),
    })
}

fn parse_patterns<T>(
    keys: &Keys,
    key: &str,
    value: impl Fn(&Keys, &str) -> Result<T>,
) -> Result<Patterns<T>> {
    let empty = Map::new();
    let map = keys.object(key)?.unwrap_or(&empty);
    let inner = Keys::new(keys.file(), map.clone());
    let entry = |name: &String| Ok((name.clone(), value(&inner, name)?));
    let entries: Result<_> = map.keys().map(entry).collect();
    entries.map(Patterns).map_err(|e| Error::model(format!("{e} (in {key})")))
}

/// Keys that change nothing for a trained adapter.
const WITHOUT_EFFECT: [&str; 14] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
];

/// Keys that are read, here or in [`parse`].
const READ: [&str; 10] = [
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_rslora",
];

fn refuse_unsupported(keys: &Keys) -> Result<()> {
    let expect = |key: &str, supported: &str| match keys.string(key)? {
        Some(value) if value != supported => {
            Err(keys.refuse(key, &format!("supported is {supported}")))
        }
        _ => Ok(()),
    };
    expect("peft_type", "LORA")?;
    expect("bias", "none")?;
    expect("task_type", "CAUSAL_LM")?;
    // These ways to start change the base's weights as well, which an adapter file does not hold.
    if let Some(Value::String(init)) = keys.get("init_lora_weights") {
        let keeps_the_base = ["gaussian", "eva", "orthogonal", "true", "false"];
        if !keeps_the_base.contains(&init.to_lowercase().as_str()) {
            let why =
                "it trains on changed base weights; convert the adapter with PEFT when saving";
            return Err(keys.refuse("init_lora_weights", why));
        }
    }
    for (key, value) in keys.iter() {
        let known = WITHOUT_EFFECT.contains(&key) || READ.contains(&key);
        if !known && !is_off(value) {
            return Err(keys.refuse(key, "not supported"));
        }
    }
    Ok(())
}

/// Whether a switch that this program does not know is off.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(entries) => entries.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        _ => false,
    }
}

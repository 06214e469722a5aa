//! What a run was computed from, so that a checkpoint goes on with nothing else.

use super::setup::Run;
use crate::config::Config;
use crate::data::Example;
use crate::model::Device;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Bytes of a file that are hashed at a time.
const PIECE: usize = 1 << 20;

/// Hashes (BLAKE3) and settings that decide every number of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Of the base model's config.json and weights, by file name.
    pub model: BTreeMap<String, String>,
    /// Of the adapter that the run started from, if it continued one.
    pub adapter: Option<String>,
    /// Of every source's tokens, trained ranges and feedback: data, template and tokenizer.
    pub data: BTreeMap<String, String>,
    /// Of every plugin library, by file name.
    pub plugins: BTreeMap<String, String>,
    pub threads: usize,
    /// What it was computed on.
    #[serde(default = "cpu")]
    pub device: String,
    /// The configuration without what does not touch the numbers: where and when things are written.
    pub config: BTreeMap<String, String>,
}

impl Identity {
    /// # Errors
    /// If a file cannot be read.
    pub fn of(run: &Run) -> Result<Self> {
        let model_dir = Path::new(&run.config.model.path);
        let listing = std::fs::read_dir(model_dir)
            .map_err(|e| Error::model(format!("{}: cannot be read: {e}", model_dir.display())))?;
        let mut model = BTreeMap::new();
        for path in listing.flatten().map(|entry| entry.path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name == "config.json" || name.ends_with(".safetensors") {
                model.insert(name, file(&path)?);
            }
        }
        let adapter = match &run.config.model.adapter {
            Some(dir) => Some(file(&Path::new(dir).join("adapter_model.safetensors"))?),
            None => None,
        };
        let data = run.sources.iter().map(|s| (s.name.clone(), examples(&s.train))).collect();
        let mut plugins = BTreeMap::new();
        for path in &run.libraries {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            plugins.insert(name, file(path)?);
        }
        Ok(Self {
            model,
            adapter,
            data,
            plugins,
            threads: rayon::current_num_threads(),
            device: run.device.clone(),
            config: settings(&run.config),
        })
    }

    /// # Errors
    /// What differs between a checkpoint's identity and this run's, by name.
    pub fn expect(&self, saved: &Identity) -> Result<()> {
        let mut changed = Vec::new();
        let mut compare =
            |what: &str, ours: &BTreeMap<String, String>, theirs: &BTreeMap<String, String>| {
                let names = ours.keys().chain(theirs.keys().filter(|k| !ours.contains_key(*k)));
                let differ = names.filter(|name| ours.get(*name) != theirs.get(*name));
                changed.extend(differ.map(|name| format!("{what} {name}")));
            };
        compare("model file", &self.model, &saved.model);
        compare("the rows of source", &self.data, &saved.data);
        compare("plugin", &self.plugins, &saved.plugins);
        compare("configuration key", &self.config, &saved.config);
        if self.adapter != saved.adapter {
            changed.push("the adapter that the run started from".into());
        }
        if self.threads != saved.threads {
            changed.push(format!(
                "the number of threads ({} then, {} now)",
                saved.threads, self.threads
            ));
        }
        if self.device != saved.device {
            changed.push(format!("the device ({} then, {} now)", saved.device, self.device));
        }
        if changed.is_empty() {
            return Ok(());
        }
        Err(Error::config(format!(
            "the checkpoint belongs to another run: changed since: {}; restore what changed, or start anew with \
             another [train] output",
            changed.join(", ")
        )))
    }
}

/// Checkpoints of versions that had nothing else do not say it.
fn cpu() -> String {
    Device::Cpu.name()
}

fn file(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let fail = |e: std::io::Error| Error::other(format!("{}: cannot be read: {e}", path.display()));
    // Piece by piece: a mapped file would count as this process's memory, all of it at once.
    let mut file = File::open(path).map_err(fail)?;
    let mut piece = vec![0; PIECE];
    loop {
        match file.read(&mut piece).map_err(fail)? {
            0 => break,
            bytes => drop(hasher.update_rayon(&piece[..bytes])),
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn examples(examples: &[Example]) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut number = |n: usize| {
        hasher.update(&(n as u64).to_le_bytes());
    };
    for example in examples {
        let group = &example.group;
        number(group.prompt.len());
        group.prompt.iter().for_each(|id| number(*id as usize));
        for branch in &group.branches {
            number(branch.tokens.len());
            branch.tokens.iter().for_each(|id| number(*id as usize));
            for segment in &branch.segments {
                number(segment.feedback.kind() as usize);
                number(segment.feedback.value().to_bits() as usize);
                segment.trained.iter().for_each(|range| {
                    number(range.start);
                    number(range.end);
                });
            }
        }
    }
    hasher.finalize().to_hex().to_string()
}

/// Every configuration key that has a part in the numbers, as `section.key` = its TOML.
pub fn settings(config: &Config) -> BTreeMap<String, String> {
    // Places may move: what stands there is compared by hash, or is only written.
    // What decides how much memory is used changes no bit.
    // What computes is compared as it was found.
    const PLACES: [&str; 11] = [
        "train.device",
        "train.output",
        "train.reference_cache",
        "train.recompute",
        "train.memory",
        "train.save_every",
        "train.save_total_limit",
        "train.threads",
        "text.template",
        "model.adapter",
        "model.path",
    ];
    let table = toml::Table::try_from(config).expect("a configuration is TOML");
    let mut out = BTreeMap::new();
    for (section, value) in
        table.iter().filter(|(section, _)| *section != "eval" && *section != "plugins")
    {
        match value {
            toml::Value::Table(keys) => {
                out.extend(
                    keys.iter().map(|(key, value)| (format!("{section}.{key}"), value.to_string())),
                );
            }
            // Files may have moved: what stands in them is compared by hash.
            toml::Value::Array(entries) => {
                for (index, entry) in entries.iter().enumerate() {
                    let mut entry = entry.clone();
                    if let Some(keys) = entry.as_table_mut() {
                        keys.retain(|key, _| !key.ends_with("files"));
                    }
                    out.insert(format!("{section}[{index}]"), entry.to_string());
                }
            }
            other => {
                out.insert(section.clone(), other.to_string());
            }
        }
    }
    out.retain(|key, _| !PLACES.contains(&key.as_str()));
    out
}

//! Merging: a model directory whose weights hold the adapter, `W + s B A`, for programs that load no
//! adapters.

use super::config::ModelConfig;
use super::files::{create_dir, write_atomically, write_bytes, write_error};
use super::json::{Keys, model_error};
use super::lora::{Adapter, Lora};
use super::peft;
use super::shards::{INDEX, Shards, Tensor, TensorFile};
use super::targets::Site;
use super::weights::EMBEDDING;
use crate::{Error, Result};
use half::{bf16, f16};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use uft_kernels::matmul::nn;

/// The head's tensor.
const HEAD_WEIGHT: &str = "lm_head.weight";

/// Writes the model of `model_dir` with the adapter of `adapter_dir` merged into it to `out_dir`.
///
/// Products and sums are in f32; each tensor keeps its dtype, name and place in its file, and all
/// other files are copied. Where the adapter changes a head that is tied to the embedding, the head
/// becomes a tensor of its own. Tensors stream through memory one by one. `out_dir` must not exist
/// or be empty.
pub fn save(model_dir: &Path, adapter_dir: &Path, out_dir: &Path) -> Result<()> {
    let config = ModelConfig::load(model_dir)?;
    let lora = peft::load(adapter_dir, &config)?;
    let shards = Shards::open(model_dir)?;
    let merge = Merge {
        adapters: adapters_by_tensor(&lora),
        unties: unties(&lora, &config),
        head_bytes: shards.tensor(EMBEDDING).map_or(0, |tensor| tensor.bytes.len() as u64),
    };
    for (name, adapter) in &merge.adapters {
        let source = if merge.unties && name == HEAD_WEIGHT { EMBEDDING } else { name };
        let tensor = shards.tensor(source).ok_or_else(|| {
            model_error(model_dir, format!("the tensor {source} is missing from the weights"))
        })?;
        tensor.expect_shape(&[adapter.outputs, adapter.inputs])?;
    }

    if let Some(head) = shards.tensor(HEAD_WEIGHT).filter(|_| merge.unties) {
        return Err(head.error(
            "the weights hold the tied head twice; save the model with transformers first",
        ));
    }

    create_empty(out_dir)?;
    copy_other_files(model_dir, out_dir, &merge)?;
    for file in &shards.files {
        merge.write(file, &out_dir.join(file.path().file_name().unwrap_or_default()))?;
    }
    // Last, because a directory without it is no model.
    let config = model_dir.join("config.json");
    let mut text = fs::read_to_string(&config).map_err(|e| model_error(&config, e.to_string()))?;
    if merge.unties {
        text = changed(&config, |object| object["tie_word_embeddings"] = json!(false))?;
    }
    write_bytes(&out_dir.join("config.json"), text.as_bytes())
}

struct Merge<'a> {
    /// By the name of the tensor that they change.
    adapters: HashMap<String, &'a Adapter>,
    /// Whether the head has to become a tensor of its own.
    unties: bool,
    /// Size of that tensor.
    head_bytes: u64,
}

fn adapters_by_tensor(lora: &Lora) -> HashMap<String, &Adapter> {
    lora.adapters.iter().map(|adapter| (format!("{}.weight", adapter.name), adapter)).collect()
}

fn unties(lora: &Lora, config: &ModelConfig) -> bool {
    config.tied && lora.get(Site::Head).is_some()
}

impl Merge<'_> {
    /// Writes one safetensors file: the source's header, then its tensors in their order.
    fn write(&self, file: &TensorFile, path: &Path) -> Result<()> {
        let embedding = file.tensor(EMBEDDING).filter(|_| self.unties);
        let header = match &embedding {
            Some(embedding) => header_with_head(file, embedding)?,
            None => file.header().to_vec(),
        };
        write_atomically(path, |out| {
            let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(|e| write_error(path, &e));
            put(&header)?;
            for name in file.names() {
                let Some(tensor) = file.tensor(&name) else { continue };
                match self.adapters.get(&name) {
                    Some(adapter) => put(&merged(&tensor, adapter)?)?,
                    None => put(tensor.bytes)?,
                }
            }
            match (embedding, self.adapters.get(HEAD_WEIGHT)) {
                (Some(embedding), Some(adapter)) => put(&merged(&embedding, adapter)?),
                _ => Ok(()),
            }
        })
    }
}

/// `W + s B A` in W's dtype.
fn merged(tensor: &Tensor, adapter: &Adapter) -> Result<Vec<u8>> {
    let mut w = tensor.to_f32()?;
    let Adapter { outputs, rank, inputs, scale, a, b, .. } = adapter;
    nn(b, a, &mut w, *outputs, *rank, *inputs, *scale, 1.0);
    let bytes: Vec<u8> = match tensor.dtype {
        Dtype::F16 => w.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::BF16 => w.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => w.iter().flat_map(|x| x.to_le_bytes()).collect(),
    };
    let largest = if tensor.dtype == Dtype::F16 { f16::MAX.to_f32() } else { f32::MAX };
    match w.iter().find(|x| !x.is_finite() || x.abs() > largest) {
        None => Ok(bytes),
        Some(x) => {
            Err(tensor
                .error(format!("merged, an element is {x}, too large for {:?}", tensor.dtype)))
        }
    }
}

/// The header of a file that gets a head of its own as its last tensor, shaped like the embedding.
fn header_with_head(file: &TensorFile, embedding: &Tensor) -> Result<Vec<u8>> {
    let broken = |e: serde_json::Error| model_error(file.path(), format!("header: {e}"));
    let mut header: Value = serde_json::from_slice(&file.header()[8..]).map_err(broken)?;
    let mut end = 0;
    if let Some(object) = header.as_object_mut() {
        let ends = object.values().filter_map(|tensor| tensor["data_offsets"][1].as_u64());
        end = ends.max().unwrap_or(0);
    }
    let mut head = header[EMBEDDING].clone();
    head["data_offsets"] = json!([end, end + embedding.bytes.len() as u64]);
    header[HEAD_WEIGHT] = head;
    let mut text = serde_json::to_vec(&header).map_err(broken)?;
    // The tensors begin at a multiple of 8.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    Ok(bytes)
}

fn create_empty(dir: &Path) -> Result<()> {
    create_dir(dir)?;
    match fs::read_dir(dir).map_err(|e| write_error(dir, &e))?.next() {
        None => Ok(()),
        Some(_) => {
            Err(Error::config("the directory is not empty; name a new one").at(dir.display()))
        }
    }
}

/// Copies everything but weights and `config.json`: tokenizer, template, generation settings. The
/// index gets the head, if that becomes a tensor of its own.
fn copy_other_files(from: &Path, to: &Path, merge: &Merge) -> Result<()> {
    const WEIGHTS: [&str; 8] = ["safetensors", "bin", "pt", "pth", "gguf", "h5", "msgpack", "onnx"];
    let entries = fs::read_dir(from).map_err(|e| model_error(from, e.to_string()))?;
    for entry in entries {
        let path = entry.map_err(|e| model_error(from, e.to_string()))?.path();
        let name = path.file_name().unwrap_or_default();
        let is_weights =
            path.extension().is_some_and(|ext| WEIGHTS.iter().any(|weights| ext == *weights));
        if !path.is_file() || is_weights || name == "config.json" {
            continue;
        }
        let target = to.join(name);
        if name == INDEX && merge.unties {
            let text = changed(&path, |index| {
                index["weight_map"][HEAD_WEIGHT] = index["weight_map"][EMBEDDING].clone();
                if let Some(size) = index["metadata"]["total_size"].as_u64() {
                    index["metadata"]["total_size"] = json!(size + merge.head_bytes);
                }
            })?;
            write_bytes(&target, text.as_bytes())?;
        } else {
            let mut from = fs::File::open(&path).map_err(|e| model_error(&path, e.to_string()))?;
            write_atomically(&target, |to| {
                io::copy(&mut from, to).map(drop).map_err(|e| write_error(&target, &e))
            })?;
        }
    }
    Ok(())
}

/// The JSON object of a file after a change.
fn changed(file: &Path, change: impl FnOnce(&mut Value)) -> Result<String> {
    let keys = Keys::read(file)?;
    let mut value =
        Value::Object(keys.iter().map(|(key, value)| (key.into(), value.clone())).collect());
    change(&mut value);
    serde_json::to_string_pretty(&value)
        .map(|text| text + "\n")
        .map_err(|e| model_error(file, e.to_string()))
}

//! Tests of the whole decoder, on the small models of tests/golden.

mod adapters;
mod device;
mod generation;
mod golden;
mod gradients;
mod identities;
mod inference;
mod launches;
mod loading;
mod memory;
mod merging;
mod offload;
mod options;
mod plain;
mod wide;

use super::*;
use crate::group::{Branch, Group, Segment};
use serde_json::Value;
use std::path::{Path, PathBuf};
use uft_core::Feedback;

const MODELS: [&str; 5] = ["llama", "llama-bias", "mistral", "qwen2", "qwen3"];
const FILES: [&str; 5] = ["demos", "scores", "labels", "pairs", "turns"];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

fn model_dir(name: &str) -> PathBuf {
    golden().join("models").join(name)
}

fn expected(name: &str, file: &str) -> Value {
    let path = golden().join("expected").join(name).join(file);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// One response alone: the prompt and a branch that is trained as a whole.
fn group(response: &Value) -> Group {
    let (prompt, tokens) = (ids(&response["prompt_ids"]), ids(&response["ids"]));
    let trained = std::iter::once(0..tokens.len()).collect();
    let segments = vec![Segment { feedback: Feedback::Demonstration, trained }];
    Group { prompt, branches: vec![Branch { tokens, segments }] }
}

/// The responses of a data file, each as a group of its own.
fn responses(all: &Value, file: &str) -> Vec<Value> {
    all[file].as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap().clone()).collect()
}

/// A directory that is removed at the end of a test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("uft-model-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    /// A copy of the files of `dir`.
    fn copy_of(dir: &Path, name: &str) -> Self {
        let scratch = Self::new(name);
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                std::fs::copy(&path, scratch.0.join(path.file_name().unwrap())).unwrap();
            }
        }
        scratch
    }

    /// Changes a JSON file.
    fn edit(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let path = self.0.join(file);
        let mut value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        change(&mut value);
        std::fs::write(path, value.to_string()).unwrap();
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

/// A row of a data file as one group: the responses share the prompt.
fn shared_group(row: &Value) -> Group {
    let each: Vec<Group> = row.as_array().unwrap().iter().map(group).collect();
    let branches = each.iter().flat_map(|group| group.branches.clone()).collect();
    Group { prompt: each[0].prompt.clone(), branches }
}

fn pack(groups: &[Group]) -> Packed {
    Packed::new(&groups.iter().collect::<Vec<_>>())
}

/// Weights for a loss that is a sum of log-probs, different for every target.
fn uneven(count: usize) -> Vec<f32> {
    (0..count).map(|i| 0.01 * ((i * 7 % 11) as f32 - 4.0)).collect()
}

/// The gradient of `Σ dlogp logp`.
fn gradient(model: &Decoder, packed: &Packed, lora: &Lora, dlogp: &[f32]) -> LoraGrads {
    let mut grads = LoraGrads::zeros(lora);
    model.backward(model.forward(packed.clone(), lora).unwrap(), dlogp, lora, &mut grads).unwrap();
    grads
}

fn assert_close(what: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let error = |(a, b): (&f32, &f64)| (f64::from(*a) - b).abs();
    let worst = got.iter().zip(expected).map(error).fold(0.0, f64::max);
    println!("{what}: {worst:.2e}");
    assert!(worst < tolerance, "{what}: off by {worst:e}");
}

/// |a - b| / |b|.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let size: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    (difference / size).sqrt()
}

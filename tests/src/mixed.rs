//! A mixed run and what is left of it, for the tests that interrupt it.

use crate::run::RunFile;
use crate::{lines, tensors};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use uft::train::checkpoint;

/// A mixed run with everything that has state: shuffling, packing, several epochs, a batch statistic,
/// two stages with a reference each, held-out rows. Reference log-probs lie in its own output.
pub fn write_run(dir: &Path, extra: &str) -> String {
    let stages = r#"
[eval]
every = 3
[[stage]]
name = "first"
data = ["demos", "labels", "pairs"]
reference = "base"
[[stage]]
name = "second"
data = ["demos", "pairs"]
reference = "previous"
steps = 7
"#;
    RunFile::new(dir, "qwen2")
        .section("lora", "rank = 4\nalpha = 8")
        .golden("demos", r#"{ plugin = "uft-sft", beta = 0.1 }"#)
        .golden("labels", r#"{ plugin = "kto", beta = 0.1 }"#)
        .golden("pairs", r#"{ plugin = "una-pairwise", beta = 0.1 }"#)
        .eval_fraction(0.25)
        .own_references()
        .train("steps = 8\nbatch = 6\nmicro_tokens = 300\nlr = 5e-3\nsave_every = 3")
        .and(stages)
        .and(extra)
        .write()
}

/// What a finished run leaves that a resumed one must leave too.
pub struct Finished {
    /// Adapters, those of stages and checkpoints among them, and moments: path → bytes.
    files: BTreeMap<PathBuf, Vec<u8>>,
    /// Without what the clock decides.
    pub metrics: Vec<serde_json::Value>,
    held_out: Vec<serde_json::Value>,
}

pub fn finished(out: &Path) -> Finished {
    let log = |name: &str| {
        let text = std::fs::read_to_string(out.join(name)).expect("a log");
        let mut lines = lines(&text);
        lines
            .iter_mut()
            .for_each(|l| drop(l.as_object_mut().expect("an object").remove("tokens_per_second")));
        lines
    };
    let mut files = BTreeMap::new();
    let folders = entries(out).into_iter().filter(|path| path.is_dir());
    for folder in folders.chain([out.to_owned()]) {
        for name in ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"] {
            let path = folder.join(name);
            if let Ok(bytes) = std::fs::read(&path) {
                files.insert(path.strip_prefix(out).expect("below it").to_owned(), bytes);
            }
        }
    }
    Finished { files, metrics: log("metrics.jsonl"), held_out: log("eval.jsonl") }
}

/// Two runs that ended alike; the other one may lack early checkpoints and stages.
pub fn assert_same(run: &Finished, other: &Finished, what: &str) {
    assert_eq!(run.metrics, other.metrics, "{what}: metrics");
    assert_eq!(run.held_out, other.held_out, "{what}: held-out metrics");
    let adapter = Path::new("adapter_model.safetensors");
    assert!(other.files.contains_key(adapter), "{what}: no adapter");
    for (path, bytes) in &run.files {
        let same = other.files.get(path).is_none_or(|other| other == bytes);
        assert!(same, "{what}: {} differs", path.display());
    }
}

/// As [`assert_same`], with every checkpoint and stage, and nothing left that is not whole.
pub fn assert_recovered(run: &Finished, out: &Path, what: &str) {
    let other = finished(out);
    assert_same(run, &other, what);
    let missing: Vec<_> = run.files.keys().filter(|p| !other.files.contains_key(*p)).collect();
    assert!(missing.is_empty(), "{what}: {missing:?} are missing");
    let left = hidden(out);
    assert!(left.is_empty(), "{what}: {left:?} are left");
    assert_whole(out, what);
}

/// Every checkpoint is whole, and so is every adapter that passes for one.
pub fn assert_whole(out: &Path, what: &str) {
    for (_, path) in checkpoint::all(out).expect("the output can be read") {
        checkpoint::verify(&path).unwrap_or_else(|e| panic!("{what}: {}: {e}", path.display()));
    }
    for folder in [out.to_owned(), out.join("stage-first"), out.join("stage-second")] {
        if folder.join("adapter_config.json").exists() {
            assert_eq!(tensors(&folder.join("adapter_model.safetensors")).len(), 42, "{what}");
        }
    }
}

/// Unfinished files and folders.
pub fn hidden(out: &Path) -> Vec<PathBuf> {
    let folders = entries(out).into_iter().filter(|path| path.is_dir()).chain([out.to_owned()]);
    let is_hidden = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'))
    };
    folders.flat_map(|folder| entries(&folder)).filter(is_hidden).collect()
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

pub fn temporary() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().to_owned();
    (dir, path)
}

/// Copies the files of a folder.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for path in entries(from).into_iter().filter(|path| path.is_file()) {
        std::fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("a copy");
    }
}

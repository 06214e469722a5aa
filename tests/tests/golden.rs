//! The whole program against transformers, PEFT and TRL: log-probs, gradients of every objective,
//! and loss curves, for every model family. See tests/golden/README.md.

use serde_json::Value;
use std::path::{Path, PathBuf};
use uft_tests::{golden, json, lines, numbers, succeed, tensors};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");
const MODELS: [&str; 5] = ["llama", "llama-bias", "mistral", "qwen2", "qwen3"];
/// Data files with the adapter that reads them.
const FILES: [(&str, &str); 5] = [
    ("demos", "demonstrations"),
    ("scores", "scores"),
    ("labels", "labels"),
    ("pairs", "preferences"),
    ("turns", "{ plugin = \"demonstrations\", turns = \"each\" }"),
];

/// One `[[data]]` entry: file, adapter and objective as TOML.
struct Entry {
    file: &'static str,
    adapter: &'static str,
    objective: &'static str,
}

/// What a golden objective is in uft's configuration.
fn entry(objective: &str) -> Entry {
    let (file, adapter, objective) = match objective {
        "sft" => ("demos", "\"demonstrations\"", "\"sft\""),
        "sft-turns" => ("turns", "{ plugin = \"demonstrations\", turns = \"each\" }", "\"sft\""),
        "uft-sft-mse" => ("demos", "\"demonstrations\"", "{ plugin = \"uft-sft\", beta = 0.1 }"),
        "uft-sft-bce" => {
            ("demos", "\"demonstrations\"", "{ plugin = \"uft-sft\", beta = 0.1, loss = \"bce\" }")
        }
        "una-score-mse" => ("scores", "\"scores\"", "{ plugin = \"una-score\", beta = 0.1 }"),
        "una-score-bce" => {
            ("scores", "\"scores\"", "{ plugin = \"una-score\", beta = 0.1, loss = \"bce\" }")
        }
        "una-binary-mse" => ("labels", "\"labels\"", "{ plugin = \"una-binary\", beta = 0.1 }"),
        "una-binary-bce" => {
            ("labels", "\"labels\"", "{ plugin = \"una-binary\", beta = 0.1, loss = \"bce\" }")
        }
        "dpo" => ("pairs", "\"preferences\"", "{ plugin = \"una-pairwise\", beta = 0.1 }"),
        "dpo-smoothed" => (
            "pairs",
            "\"preferences\"",
            "{ plugin = \"una-pairwise\", beta = 0.1, label_smoothing = 0.1 }",
        ),
        "kto" => ("labels", "\"labels\"", "{ plugin = \"kto\", beta = 0.1 }"),
        other => panic!("golden objective {other} is not known here"),
    };
    Entry { file, adapter, objective }
}

/// A run on a golden model from its adapter, as TOML in `dir`.
fn write_run(dir: &Path, model: &str, objectives: &[&str], train: &str) -> PathBuf {
    let model_dir = golden(&format!("models/{model}"));
    let mut text = format!(
        "[model]\npath = \"{0}\"\nadapter = \"{0}/adapter\"\n[train]\noutput = \"{1}/out\"\nshuffle = false\nthreads = 2\n{train}\n",
        model_dir.display(),
        dir.display()
    );
    for (index, objective) in objectives.iter().enumerate() {
        let Entry { file, adapter, objective } = entry(objective);
        let path = golden(&format!("data/{file}.jsonl"));
        text.push_str(&format!(
            "[[data]]\nname = \"s{index}\"\nfiles = [\"{}\"]\nadapter = {adapter}\nobjective = {objective}\n",
            path.display()
        ));
    }
    let path = dir.join("run.toml");
    std::fs::write(&path, text).expect("the run is written");
    path
}

#[test]
fn token_ids_and_log_probs_are_those_of_transformers_and_peft() {
    for model in MODELS {
        let expected = json(&golden(&format!("expected/{model}/responses.json")));
        let first = &expected["demos"][0][0]["logps"];
        for variant in first.as_object().expect("log-probs by adapter").keys() {
            for (file, format) in FILES {
                check_log_probs(model, variant, file, format, &expected[file]);
            }
        }
    }
}

fn check_log_probs(model: &str, variant: &str, file: &str, format: &str, expected: &Value) {
    let model_dir = golden(&format!("models/{model}")).display().to_string();
    let adapter = format!("{model_dir}/{variant}");
    let data = golden(&format!("data/{file}.jsonl")).display().to_string();
    let mut arguments =
        vec!["score", "--model", &model_dir, "--data", &data, "--format", format, "--tokens"];
    if variant != "base" {
        arguments.extend(["--adapter", &adapter]);
    }
    let scored = lines(&succeed(UFT, &arguments));
    let rows = expected.as_array().expect("rows");
    let wanted: Vec<(usize, usize, &Value)> = rows
        .iter()
        .enumerate()
        .flat_map(|(row, r)| {
            r.as_array().expect("responses").iter().enumerate().map(move |(i, r)| (row, i, r))
        })
        .collect();
    assert_eq!(scored.len(), wanted.len(), "{model} {file}: number of responses");
    for (row, response, want) in wanted {
        let place = format!("{model} {variant} {file} row {row} response {response}");
        let found = scored.iter().find(|s| s["row"] == row && s["response"] == response);
        let found = found.unwrap_or_else(|| panic!("{place}: not scored"));
        assert_eq!(found["ids"], want["ids"], "{place}: trained tokens");
        let pairs = [("token_logps", variant), ("ref_token_logps", "base")];
        for (key, adapter) in pairs {
            let (ours, theirs) = (numbers(&found[key]), numbers(&want["logps"][adapter]));
            for (token, (a, b)) in ours.iter().zip(&theirs).enumerate() {
                assert!((a - b).abs() < 1e-4, "{place} {key} token {token}: {a} against {b}");
            }
        }
    }
}

/// The first step's gradient over a whole file, against the golden one: every tensor's difference
/// is below 1e-4 of its norm.
fn check_gradient(model: &str, name: &str, objectives: &[&str], batch: usize, micro_tokens: usize) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let run = write_run(
        dir.path(),
        model,
        objectives,
        &format!("batch = {batch}\nmicro_tokens = {micro_tokens}"),
    );
    let out = dir.path().join("grad.safetensors");
    let printed = succeed(
        UFT,
        &["grad", run.to_str().expect("a path"), "--out", out.to_str().expect("a path")],
    );
    let losses = json(&golden(&format!("expected/{model}/losses.json")));
    let (loss, want) = (&lines(&printed)[0]["loss"], &losses[name]["loss"]);
    let (loss, want) = (loss.as_f64().expect("a loss"), want.as_f64().expect("a loss"));
    assert!(
        (loss - want).abs() < 1e-5 * want.abs().max(1.0),
        "{model} {name}: loss {loss} against {want}"
    );

    let prefix = format!("{name}/");
    let expected = tensors(&golden(&format!("expected/{model}/grads.safetensors")));
    let expected: Vec<_> = expected
        .into_iter()
        .filter_map(|(n, t)| Some((n.strip_prefix(&prefix)?.to_owned(), t)))
        .collect();
    assert!(!expected.is_empty(), "{model} {name}: no golden gradient");
    let ours: std::collections::HashMap<String, Vec<f32>> = tensors(&out).into_iter().collect();
    assert_eq!(ours.len(), expected.len(), "{model} {name}: number of tensors");
    for (tensor, want) in expected {
        let have = ours.get(&tensor).unwrap_or_else(|| panic!("{model} {name}: no {tensor}"));
        let norm =
            |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let difference = norm(&mut have.iter().zip(&want).map(|(a, b)| f64::from(a - b)));
        let size = norm(&mut want.iter().map(|b| f64::from(*b)));
        assert!(
            difference <= 1e-4 * size,
            "{model} {name} {tensor}: off by {:.2e}",
            difference / size
        );
    }
}

#[test]
fn gradients_are_those_of_transformers_peft_and_trl() {
    for model in MODELS {
        for objective in ["sft", "una-score-mse", "dpo", "kto"] {
            check_gradient(model, objective, &[objective], 8, 4096);
        }
        // Unfolded, the turns of a conversation are one group, but with Qwen3's template, which drops
        // old thinking, one group each. The loss over all turns is the same either way.
        let groups = if model == "qwen3" { 6 } else { 3 };
        check_gradient(model, "sft-turns", &["sft-turns"], groups, 4096);
    }
    for objective in [
        "uft-sft-mse",
        "uft-sft-bce",
        "una-score-bce",
        "una-binary-mse",
        "una-binary-bce",
        "dpo-smoothed",
    ] {
        check_gradient("mistral", objective, &[objective], 8, 4096);
    }
}

#[test]
fn a_mixed_step_is_the_sum_of_its_objectives() {
    for model in ["mistral", "qwen3"] {
        let objectives = ["uft-sft-mse", "una-score-mse", "una-binary-mse", "dpo"];
        check_gradient(model, "mixed", &objectives, 32, 4096);
    }
}

#[test]
fn gradients_do_not_depend_on_the_micro_batches() {
    // One group at a time, KTO's batch statistic included.
    for objective in ["sft", "una-score-mse", "dpo", "kto"] {
        check_gradient("qwen2", objective, &[objective], 8, 1);
    }
}

#[test]
fn twenty_steps_follow_the_reference_curve() {
    let train = "steps = 20\nbatch = 4\nlr = 1e-3\nschedule = \"constant\"\nwarmup = 0.0\nweight_decay = 0.01\nclip = 1.0";
    for model in MODELS {
        let curves = json(&golden(&format!("expected/{model}/curves.json")));
        for objective in ["sft", "una-score-mse", "dpo"] {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let run = write_run(dir.path(), model, &[objective], train);
            succeed(UFT, &["train", run.to_str().expect("a path")]);
            let metrics =
                std::fs::read_to_string(dir.path().join("out/metrics.jsonl")).expect("metrics");
            let metrics = lines(&metrics);
            assert_eq!(metrics.len(), 20);
            for (key, name) in [("loss", "loss"), ("grad_norm", "grad_norm")] {
                let want = numbers(&curves[objective][name]);
                for (step, want) in want.iter().enumerate() {
                    let have = metrics[step][key].as_f64().expect("a number");
                    let near = (have - want).abs() < 1e-3 * want.abs().max(1.0);
                    assert!(near, "{model} {objective} step {step} {key}: {have} against {want}");
                }
            }
        }
    }
}

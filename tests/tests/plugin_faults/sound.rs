//! Plugins without a fault: listed, checked, several in one library, with statistics of the step and
//! with state.

use super::{NON_FINITE, PLUGIN, Source, UFT, faulty, library, refused, temporary, text};
use std::path::{Path, PathBuf};
use uft_tests::{golden, lines, succeed, tensors};

/// How many plugins come with uft.
fn bundled() -> usize {
    bundled::LIBRARIES.iter().map(|library| library.entries.len()).sum()
}

#[test]
fn the_bundled_plugins_are_listed_with_their_parameters() {
    let listed = succeed(UFT, &["plugin", "list"]);
    for (name, role, parameter) in [
        ("demonstrations", "adapter", "turns = \"together\""),
        ("scores", "adapter", "range = [0.0, 1.0]"),
        ("labels", "adapter", "columns = {}"),
        ("preferences", "adapter", "columns = {}"),
        ("sft", "objective", "per = \"token\""),
        ("uft-sft", "objective", "beta = 0.01"),
        ("una-score", "objective", "loss = \"mse\""),
        ("una-binary", "objective", "loss = \"mse\""),
        ("una-pairwise", "objective", "label_smoothing = 0.0"),
        ("kto", "objective", "desirable_weight = 1.0"),
    ] {
        let start = format!("{name} ({role}, {})", library(name).display());
        let entry = listed.split("\n\n").find(|entry| entry.starts_with(&start));
        let entry = entry.unwrap_or_else(|| panic!("no {start} in:\n{listed}"));
        assert!(entry.contains(&format!("\n    {parameter}  # ")), "{entry}");
    }
    assert_eq!(listed.matches("\n  ").count(), listed.matches("\n    ").count() + bundled());
}

#[test]
fn the_check_passes_sound_objectives_and_finds_a_wrong_gradient() {
    let report = succeed(UFT, &["plugin", "check"]);
    let objectives = report.matches("  ok    gradient: ").count();
    let adapters = report.matches("  ok    odd records: ").count();
    assert!(objectives > 6 && adapters > 4, "{report}");
    assert_eq!(objectives + adapters, bundled(), "{report}");
    assert!(!report.contains("FAIL"), "{report}");
    let report = succeed(UFT, &["plugin", "check", "sound"]);
    assert_eq!(report.matches("  ok    gradient: ").count(), 2, "{report}");
    assert!(report.contains("  ok    state: 8 bytes, restored"), "{report}");

    let report = succeed(UFT, &["plugin", "check", "scores"]);
    assert!(report.starts_with("scores\n  ok    declarations: offers score\n"), "{report}");
    assert!(report.contains("  ok    odd records: "), "{report}");

    let output = uft_tests::uft(UFT, &["plugin", "check", "sft", "faulty"]);
    assert_eq!(output.status.code(), Some(PLUGIN));
    let report = String::from_utf8(output.stdout).expect("text");
    assert!(report.contains("\n  FAIL  gradient: random step 1, response 0: "), "{report}");
    assert_eq!(report.matches("FAIL").count(), 2, "{report}");
    assert!(report.contains("  FAIL  odd records: {"), "{report}");
    assert_eq!(
        String::from_utf8_lossy(&output.stderr).trim_end(),
        "error: the check failed for: objective `faulty`, adapter `faulty`"
    );
}

#[test]
fn the_check_takes_parameters_and_records() {
    let sound = ["plugin", "check", "sound", "--entry", "settle"];
    let with = |more: &[&'static str]| [&sound[..], more].concat();
    let report = succeed(UFT, &with(&["--param", "momentum=0.25"]));
    assert!(report.starts_with("settle\n") && !report.contains("FAIL"), "{report}");
    let output = uft_tests::uft(UFT, &with(&["--param", "momentum=2"]));
    assert_eq!(output.status.code(), Some(PLUGIN));
    let report = String::from_utf8(output.stdout).expect("text");
    let says = "settle\n  FAIL  declarations: plugin `settle`: parameter `momentum` must be a number from 0 to 1, not 2\n";
    assert_eq!(report, says);

    let records = golden("data/scores.jsonl");
    let report = succeed(UFT, &["plugin", "check", "scores", "--records", text(&records)]);
    assert!(report.contains("  ok    its records: "), "{report}");
    let records = golden("data/pairs.jsonl");
    let arguments = ["plugin", "check", "scores", "--records", text(&records)];
    let output = uft_tests::uft(UFT, &arguments);
    assert_eq!(output.status.code(), Some(PLUGIN));
    let report = String::from_utf8(output.stdout).expect("text");
    assert!(report.contains("  FAIL  its records: {"), "{report}");

    for (arguments, says) in [
        (&["sound", "--param", "momentum=0"][..], "--param is for one entry, and there are "),
        (&["sft", "--records", "x.jsonl"], "x.jsonl: cannot be read: "),
        (
            &["sound", "--entry", "setle"],
            "--entry: no library exports `setle`; did you mean `settle`?",
        ),
        (&["sft", "--param", "per"], "--param per: expected key=value"),
    ] {
        let output = uft_tests::uft(UFT, &[&["plugin", "check"], arguments].concat());
        let line = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && line.contains(says), "{line}");
    }
}

#[test]
fn plugins_of_one_library_train_together() {
    let dir = temporary();
    let texts = dir.path().join("texts.jsonl");
    std::fs::write(&texts, "{\"text\": \"the storm is over\"}\n{\"text\": \"go inside\"}\n")
        .expect("written");
    let rated = dir.path().join("rated.jsonl");
    let row =
        r#"{"prompt": "Name a planet.", "answers": ["Jupiter.", "Monday."], "stars": [5, 2]}"#;
    std::fs::write(&rated, row).expect("written");
    let source = Source { data: &texts, adapter: "\"lines\"", objective: "\"settle\"" };
    let second = format!(
        "steps = 2\nbatch = 3\n[plugins]\nload = [\"sound\"]\n[[data]]\nname = \"rated\"\n\
         files = [\"{}\"]\nadapter = \"stars\"\nobjective = \"listwise\"",
        rated.display()
    );
    succeed(UFT, &["train", text(&source.write(dir.path(), &second))]);
    let metrics = std::fs::read_to_string(dir.path().join("out/metrics.jsonl")).expect("metrics");
    for step in lines(&metrics) {
        assert!(step["s/loss"].is_f64() && step["rated/loss"].is_f64(), "{step}");
    }
    assert!(dir.path().join("out/adapter_model.safetensors").is_file());
}

/// A run of `settle` over all of a file's rows, from an adapter whose log-ratios are not 0.
fn settle(dir: &Path, more: &str) -> PathBuf {
    let more = format!("batch = 8\nlr = 0.0\n{more}\n[plugins]\nload = [\"sound\"]");
    Source { data: &golden("data/scores.jsonl"), adapter: "\"scores\"", objective: "\"settle\"" }
        .write(dir, &more)
}

#[test]
fn log_ratios_are_of_the_whole_step_however_it_is_split() {
    let seen = [1, 4096].map(|micro_tokens| {
        let dir = temporary();
        let run = settle(dir.path(), &format!("steps = 1\nmicro_tokens = {micro_tokens}"));
        let out = dir.path().join("grad.safetensors");
        succeed(UFT, &["grad", text(&run), "--out", text(&out)]);
        succeed(UFT, &["train", text(&run)]);
        let metrics = std::fs::read_to_string(dir.path().join("out/metrics.jsonl"));
        (tensors(&out), lines(&metrics.expect("metrics")).remove(0))
    });
    let number = |value: &serde_json::Value| value.as_f64().expect("a number");
    let [(split, split_step), (whole, whole_step)] = &seen;
    for step in [split_step, whole_step] {
        assert!(number(&step["s/center"]).abs() > 1e-3, "the test would show nothing: {step}");
        assert!(number(&step["s/told_apart"]) < 1e-4, "{step}");
    }
    for key in ["loss", "s/center", "grad_norm"] {
        let (a, b) = (number(&split_step[key]), number(&whole_step[key]));
        assert!((a - b).abs() <= 1e-5 * b.abs(), "{key}: {a} against {b}");
    }
    assert_eq!(split.len(), whole.len());
    let whole: std::collections::HashMap<_, _> =
        whole.iter().map(|(n, t)| (n.as_str(), t)).collect();
    for (name, tensor) in split {
        let other = whole[name.as_str()];
        let largest = other.iter().fold(0.0f32, |most, g| most.max(g.abs()));
        for (a, b) in tensor.iter().zip(other) {
            assert!((a - b).abs() <= 1e-5 * largest, "{name}: {a} against {b}");
        }
    }
}

#[test]
fn state_lives_through_training_and_is_left_alone_by_evaluation() {
    let dir = temporary();
    let path = settle(dir.path(), "steps = 3\n[eval]\nevery = 1");
    succeed(
        UFT,
        &["train", text(&path), "--set", "data[s].eval_fraction=0.25", "--set", "train.batch=6"],
    );
    let metrics = std::fs::read_to_string(dir.path().join("out/metrics.jsonl")).expect("metrics");
    let center: Vec<f64> =
        lines(&metrics).iter().map(|s| s["s/center"].as_f64().expect("a number")).collect();
    let mean = 2.0 * center[0];
    for (step, share) in [0.5, 0.75, 0.875].into_iter().enumerate() {
        assert!((center[step] - share * mean).abs() < 1e-6 * mean.abs(), "{center:?}");
    }
}

#[test]
fn a_step_that_fails_is_no_part_of_the_saved_state() {
    let dir = temporary();
    let data = golden("data/demos.jsonl");
    let second = format!(
        "[[data]]\nname = \"t\"\nfiles = [\"{}\"]\nadapter = \"demonstrations\"\nobjective = {}",
        data.display(),
        faulty("infinite loss")
    );
    let path = settle(dir.path(), "steps = 3");
    let run = std::fs::read_to_string(&path).expect("the run");
    std::fs::write(&path, format!("{run}\n{second}\n")).expect("written");
    let line = refused(NON_FINITE, &["train", text(&path)]);
    assert!(line.contains("the state after step 0 is in "), "{line}");
    let state = uft_tests::json(&dir.path().join("out/checkpoint-0/uft_state.json"));
    assert_eq!(state["objectives"]["s"], serde_json::json!(vec![0; 8]), "the mean before any step");
}

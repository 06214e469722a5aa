//! Objectives as the configuration makes them: weighted sums over the same rows, and parameters that
//! change from step to step.

use serde_json::Value;
use std::path::{Path, PathBuf};
use uft_tests::mixed::temporary;
use uft_tests::run::RunFile;
use uft_tests::{fail, golden, lines, succeed, tensors};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");

const DPO: &str = r#"{ plugin = "una-pairwise", beta = 0.5 }"#;

/// A run over one file of pairs, or of demonstrations.
fn write_run(dir: &Path, data: &Path, adapter: &str, objective: &str, more: &str) -> String {
    RunFile::new(dir, "llama")
        .section("lora", "rank = 4\nalpha = 8")
        .section("plugins", "load = [\"sound\"]")
        .source("rows", data, adapter, objective)
        .own_references()
        .train("steps = 4\nbatch = 4\nmicro_tokens = 100\nshuffle = false")
        .and(more)
        .write()
}

/// The first step's loss, and its gradient as one list.
fn gradient(data: &Path, adapter: &str, objective: &str) -> (f64, Vec<f64>) {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, data, adapter, objective, "");
    let out = dir.join("grad.safetensors");
    let said = succeed(UFT, &["grad", &run, "--out", out.to_str().expect("text")]);
    let said: Value = serde_json::from_str(&said).expect("JSON");
    let all = tensors(&out).into_iter().flat_map(|(_, values)| values.into_iter().map(f64::from));
    (said["loss"].as_f64().expect("a loss"), all.collect())
}

fn train(objective: &str, more: &[&str]) -> (tempfile::TempDir, Vec<Value>) {
    let (guard, dir) = temporary();
    let run = write_run(&dir, &golden("data/pairs.jsonl"), "preferences", objective, "");
    succeed(UFT, &[&["train", &run], more].concat());
    let metrics = std::fs::read_to_string(dir.join("out/metrics.jsonl")).expect("metrics");
    (guard, lines(&metrics))
}

fn of(line: &Value, key: &str) -> f64 {
    line[key].as_f64().unwrap_or_else(|| panic!("no {key} in {line}"))
}

/// The golden pairs, and their chosen responses as demonstrations.
fn chosen(dir: &Path) -> PathBuf {
    let pairs = std::fs::read_to_string(golden("data/pairs.jsonl")).expect("the pairs");
    let demonstration = |mut row: Value| {
        let chosen = row["chosen"].take();
        format!("{}\n", serde_json::json!({ "prompt": row["prompt"], "completion": chosen }))
    };
    let path = dir.join("chosen.jsonl");
    let text: String = lines(&pairs).into_iter().map(demonstration).collect();
    std::fs::write(&path, text).expect("written");
    path
}

#[test]
fn a_sum_is_its_objectives_each_on_the_responses_that_it_takes() {
    let (_guard, dir) = temporary();
    let pairs = golden("data/pairs.jsonl");
    let dpo = gradient(&pairs, "preferences", DPO);
    let sft = gradient(&chosen(&dir), "demonstrations", "\"sft\"");
    let both = r#"[{ plugin = "una-pairwise", beta = 0.5, weight = 0.8 }, { plugin = "sft", weight = 0.25 }]"#;
    let sum = gradient(&pairs, "preferences", both);
    assert!(
        (sum.0 - (0.8 * dpo.0 + 0.25 * sft.0)).abs() < 1e-6 * sum.0,
        "{} {} {}",
        sum.0,
        dpo.0,
        sft.0
    );
    let largest = sum.1.iter().fold(0.0, |max: f64, g| max.max(g.abs()));
    assert!(largest > 0.0 && sum.1.len() == dpo.1.len() && sum.1.len() == sft.1.len());
    for ((sum, dpo), sft) in sum.1.iter().zip(&dpo.1).zip(&sft.1) {
        assert!((sum - (0.8 * dpo + 0.25 * sft)).abs() < 1e-5 * largest, "{sum} {dpo} {sft}");
    }
}

#[test]
fn a_sum_s_metrics_say_whose_they_are() {
    let both = r#"[{ plugin = "una-pairwise", weight = 0.5 }, { plugin = "sft", weight = 2 }]"#;
    let (_guard, steps) = train(both, &[]);
    for line in &steps {
        let sum = 0.5 * of(line, "rows/una-pairwise/loss") + 2.0 * of(line, "rows/sft/loss");
        assert!((of(line, "loss") - sum).abs() < 1e-9 * sum, "{line}");
        assert!((of(line, "rows/sft/nll_loss") - of(line, "rows/sft/loss")).abs() < 1e-9, "{line}");
        assert!(line["rows/rewards/margins"].is_f64() && line["rows/nll_loss"].is_null(), "{line}");
    }
    assert!((of(&steps[0], "rows/una-pairwise/loss") - std::f64::consts::LN_2).abs() < 1e-9);
}

#[test]
fn a_sum_of_one_and_a_schedule_that_stands_still_change_no_bit() {
    let bytes = |objective: &str| {
        let (guard, _) = train(objective, &[]);
        std::fs::read(guard.path().join("out/adapter_model.safetensors")).expect("an adapter")
    };
    let plain = bytes(DPO);
    assert_eq!(bytes(&format!("[{DPO}]")), plain, "a list of one");
    let still = r#"{ schedule = "linear", from = 0.5, to = 0.5 }"#;
    assert_eq!(bytes(&format!(r#"{{ plugin = "una-pairwise", beta = {still} }}"#)), plain);
    assert_ne!(
        bytes(r#"{ plugin = "una-pairwise", beta = 0.4 }"#),
        plain,
        "the test shows nothing"
    );
}

#[test]
fn a_parameter_follows_its_schedule() {
    let beta = r#"{ schedule = "linear", from = 0.1, to = 0.5, over = 2 }"#;
    let objective = format!(r#"{{ plugin = "una-pairwise", beta = {beta} }}"#);
    let (guard, steps) = train(&objective, &[]);
    let seen: Vec<f64> = steps.iter().map(|line| of(line, "rows/una-pairwise/beta")).collect();
    let apart = seen.iter().zip([0.1, 0.3, 0.5, 0.5]).map(|(seen, beta)| (seen - beta).abs());
    assert!(seen.len() == 4 && apart.fold(0.0, f64::max) < 1e-12, "{seen:?}");
    // A trained adapter that stands still, all rows in every step: each loss is that of a run whose beta
    // never was another.
    let (adapter, pairs) = (guard.path().join("out"), golden("data/pairs.jsonl"));
    let rows = std::fs::read_to_string(&pairs).expect("the pairs").lines().count();
    let losses = |objective: &str| -> Vec<f64> {
        let (_guard, dir) = temporary();
        let run = write_run(&dir, &pairs, "preferences", objective, "");
        let set = [
            format!("model.adapter={}", adapter.display()),
            format!("train.batch={rows}"),
            "train.lr=0.0".to_owned(),
        ];
        let set = set.iter().flat_map(|set| ["--set", set]);
        succeed(UFT, &["train", &run].into_iter().chain(set).collect::<Vec<_>>());
        let metrics = std::fs::read_to_string(dir.join("out/metrics.jsonl")).expect("metrics");
        lines(&metrics).iter().map(|line| of(line, "loss")).collect()
    };
    let seen = losses(&objective);
    let fixed = [0.1, 0.3, 0.5].map(|beta| {
        let losses = losses(&format!(r#"{{ plugin = "una-pairwise", beta = {beta} }}"#));
        assert!(losses.iter().all(|loss| *loss == losses[0]), "{losses:?}");
        losses[0]
    });
    assert!(fixed[0] != fixed[1] && fixed[1] != fixed[2], "{fixed:?}");
    for (seen, fixed) in seen.iter().zip([fixed[0], fixed[1], fixed[2], fixed[2]]) {
        assert!((seen - fixed).abs() < 1e-12, "{seen} {fixed}");
    }
}

#[test]
fn a_weight_may_change_too() {
    let objective = r#"[{ plugin = "una-pairwise" },
        { plugin = "sft", weight = { schedule = "cosine", from = 1, to = 0, over = 2 } }]"#
        .replace('\n', " ");
    let (_guard, steps) = train(&objective, &[]);
    for (line, weight) in steps.iter().zip([1.0, 0.5, 0.0, 0.0]) {
        let sum = of(line, "rows/una-pairwise/loss") + weight * of(line, "rows/sft/loss");
        assert!((of(line, "loss") - sum).abs() < 1e-9, "{weight} {line}");
    }
}

#[test]
fn a_run_with_schedules_sums_and_state_is_resumed_bit_for_bit() {
    let (_guard, dir) = temporary();
    let objective = r#"[{ plugin = "settle", momentum = { schedule = "linear", from = 0.9, to = 0.1 } }, { plugin = "una-score", weight = 0.5, beta = { schedule = "cosine", from = 0.01, to = 0.5, over = 0.75 } }]"#;
    let run = write_run(&dir, &golden("data/scores.jsonl"), "scores", objective, "save_every = 1");
    let report = succeed(UFT, &["verify-resume", &run, "--set", "train.steps=6"]);
    assert!(report.contains("bit for bit"), "{report}");
    // What it changes to is part of what the run is.
    succeed(UFT, &["train", &run]);
    let other = objective.replace("to = 0.1", "to = 0.2");
    let set = format!("data[rows].objective={other}");
    let why = fail(UFT, 2, &["train", &run, "--resume", "--set", &set]);
    assert!(why.contains("changed since: configuration key data[0]"), "{why}");
}

#[test]
fn what_cannot_be_summed_or_scheduled_is_refused() {
    let (_guard, dir) = temporary();
    let pairs = golden("data/pairs.jsonl");
    let beta = |text: &str| format!(r#"{{ plugin = "una-pairwise", beta = {text} }}"#);
    for (objective, says) in [
        ("[]".to_owned(), "at least one objective is needed"),
        (format!("[{DPO}, {DPO}]"), "`una-pairwise` is named twice"),
        (r#"[{ plugin = "sft", weight = -1 }]"#.into(), "the weight of `sft` must not be negative"),
        (
            r#"[{ plugin = "sft", weight = "much" }]"#.into(),
            "the weight of `sft`: expected a number or {",
        ),
        (beta(r#"{ schedule = "linear", from = 0.1 }"#), "parameter `beta`: missing field `to`"),
        (beta(r#"{ from = 0.1, to = 1 }"#), "parameter `beta` must be a number above 0, not {"),
        (
            beta(r#"{ schedule = "linear", from = -1, to = 1 }"#),
            "parameter `beta` must be a number above 0, not -1",
        ),
        // Rejected responses would have no objective.
        ("\"sft\"".into(), "a rejected response, but objective `sft` takes demonstration, chosen"),
        (
            r#"["una-pairwise", "uft-sft", "kto"]"#.into(),
            "objective `una-pairwise + uft-sft + kto`: no row has feedback for `uft-sft`",
        ),
    ] {
        let run = write_run(&dir, &pairs, "preferences", &objective, "");
        let output = uft_tests::uft(UFT, &["check", &run]);
        let why = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && why.contains(says), "{objective}: {why}");
        assert_eq!(why.lines().count(), 1, "{why}");
    }
}

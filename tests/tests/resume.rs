//! Interrupted runs: a resumed one is the uninterrupted one, bit for bit.

use uft_tests::mixed::{assert_same, copy, finished, temporary, write_run};
use uft_tests::{fail, golden, lines, succeed, uft};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");

#[test]
fn from_every_checkpoint_the_same_bytes_follow() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "");
    succeed(UFT, &["train", &run]);
    let whole = finished(&dir.join("out"));
    assert_eq!(whole.metrics.len(), 15);
    // Multiples of 3 within each stage, numbered through: 3, 6, and in the second stage 11, 14.
    for step in [3, 6, 11, 14] {
        let (_guard, other) = temporary();
        let run = write_run(&other, "");
        let name = format!("checkpoint-{step}");
        copy(&dir.join("out").join(&name), &other.join("out").join(&name));
        succeed(UFT, &["train", &run, "--resume"]);
        assert_same(&whole, &finished(&other.join("out")), &name);
    }
}

#[test]
fn broken_checkpoints_are_passed_over_by_name() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "");
    succeed(UFT, &["train", &run]);
    let whole = finished(&dir.join("out"));
    std::fs::remove_file(dir.join("out/checkpoint-14/manifest.json")).expect("removed");
    let optimizer = dir.join("out/checkpoint-11/optimizer.safetensors");
    let mut bytes = std::fs::read(&optimizer).expect("read");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&optimizer, bytes).expect("written");

    let output = uft(UFT, &["train", &run, "--resume"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("checkpoint-14: no manifest.json"), "{stderr}");
    assert!(stderr.contains("checkpoint-11: optimizer.safetensors is damaged"), "{stderr}");
    assert_same(&whole, &finished(&dir.join("out")), "from checkpoint-6");
}

#[test]
fn another_run_s_checkpoint_is_refused_by_name() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "");
    succeed(UFT, &["train", &run, "--set", "stage[0].steps=4", "--set", "stage[1].steps=1"]);
    assert!(
        fail(UFT, 2, &["train", &run]).contains("--resume"),
        "a finished run is not overwritten"
    );
    let metrics = || std::fs::read(dir.join("out/metrics.jsonl")).expect("metrics");
    let before = metrics();
    let refused = |set: &[&str], says: &str| {
        let mut arguments = vec!["train", &run, "--resume"];
        set.iter().for_each(|s| arguments.extend(["--set", s]));
        let stderr = fail(UFT, 2, &arguments);
        assert!(stderr.contains(says), "{stderr}");
    };
    let same = ["stage[0].steps=4", "stage[1].steps=1"];
    refused(&[&same[..], &["train.lr=1e-3"]].concat(), "configuration key train.lr");
    let rows = golden("data/turns.jsonl").display().to_string();
    let files = format!("data[demos].files=[\"{rows}\"]");
    refused(&[&same[..], &[&files]].concat(), "the rows of source demos");
    let model = golden("models/llama").display().to_string();
    refused(
        &[&same[..], &[&format!("model.path={model}")]].concat(),
        "model file model.safetensors",
    );
    assert!(metrics() == before, "a refused run leaves the logs as they are");
}

#[test]
fn a_limit_keeps_the_newest_and_the_best_checkpoint() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "");
    succeed(
        UFT,
        &["train", &run, "--set", "train.save_total_limit=2", "--set", "train.save_every=1"],
    );
    let kept = uft::train::checkpoint::all(&dir.join("out")).expect("the output can be read");
    let kept: Vec<u64> = kept.into_iter().map(|(step, _)| step).collect();
    assert_eq!(kept.len(), 2, "{kept:?}");
    assert_eq!(kept[1], 15);
    let state = uft_tests::json(&dir.join("out/checkpoint-15/trainer_state.json"));
    assert_eq!(state["global_step"], 15);
    let history = state["log_history"].as_array().expect("a history");
    assert_eq!(history.iter().filter(|line| line.get("loss").is_some()).count(), 15);
    let losses = history.iter().filter_map(|line| Some((line.get("eval_loss")?.as_f64()?, line)));
    let (_, best) = losses.min_by(|a, b| a.0.total_cmp(&b.0)).expect("evaluations");
    assert_eq!(state["best_global_step"], best["step"]);
    assert!(kept.contains(&best["step"].as_u64().expect("a step")), "{kept:?}");
    assert!(history[0].get("learning_rate").is_some());
}

#[test]
fn verify_resume_proves_it_on_a_run() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "");
    let report = succeed(UFT, &["verify-resume", &run]);
    assert!(
        report.contains("resumed after step 4 of 8") && report.contains("bit for bit"),
        "{report}"
    );
    assert!(!dir.join("out/metrics.jsonl").exists(), "the run's own output is not touched");
}

#[test]
fn a_step_that_is_not_finite_stops_with_its_rows_or_is_left_out() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "");
    // A learning rate at which the adapter overflows within a few steps.
    let wild = ["--set", "train.lr=1e30", "--set", "train.warmup=0.0", "--set", "train.clip=0.0"];
    let stderr = fail(UFT, 6, &[&["train", &run][..], &wild].concat());
    for part in ["not finite", ".jsonl:", "checkpoint-"] {
        assert!(stderr.contains(part), "{stderr} does not say {part}");
    }
    // A gradient that overflows though every log-prob is finite: of the step's rows only those of the
    // micro-batch are named, here one.
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "");
    let heavy = ["--set", "data[pairs].weight=1e300", "--set", "train.micro_tokens=1"];
    let stderr = fail(UFT, 6, &[&["train", &run][..], &heavy].concat());
    assert!(stderr.contains("gradient is not finite after") && stderr.contains("checkpoint-0"));
    assert!(stderr.contains("pairs.jsonl:") && stderr.matches(".jsonl:").count() == 1, "{stderr}");
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "");
    // Every step after the first is left out; the held-out rows then have no finite log-prob either.
    let skip = ["--set", "train.non_finite=skip", "--set", "data[pairs].eval_fraction=0"];
    let output = uft(UFT, &[&["train", &run][..], &wild, &skip].concat());
    let metrics = std::fs::read_to_string(dir.join("out/metrics.jsonl")).expect("metrics");
    let skipped = lines(&metrics).iter().filter(|line| line["loss"].is_null()).count();
    assert!(skipped > 0, "{metrics}{}", String::from_utf8_lossy(&output.stderr));
}

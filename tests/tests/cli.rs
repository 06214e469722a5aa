//! The command line as a user meets it: outputs, refusals, exit codes.

use std::path::{Path, PathBuf};
use uft_tests::run::RunFile;
use uft_tests::{fail, golden, lines, succeed, tensors};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");

/// A run of two sources on a golden model, its output in `dir`.
fn write_run(dir: &Path, extra: &str) -> String {
    RunFile::new(dir, "llama")
        .section("lora", "rank = 4\nalpha = 8")
        .golden("demos", r#"{ plugin = "uft-sft", beta = 0.1 }"#)
        .eval_fraction(0.25)
        .golden("pairs", r#"{ plugin = "una-pairwise", beta = 0.1 }"#)
        .eval_fraction(0.25)
        .train("steps = 4\nbatch = 4\nlr = 5e-3")
        .and(extra)
        .write()
}

fn temporary() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().to_owned();
    (dir, path)
}

fn text(bytes: std::io::Result<String>) -> String {
    bytes.expect("the file is there")
}

#[test]
fn train_writes_metrics_adapter_and_report() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "[eval]\nevery = 2\nsamples = 1\nsample_tokens = 5");
    let report = succeed(UFT, &["train", &run]);
    assert!(
        report.contains("Held-out rows") && report.contains("demos") && report.contains("before:"),
        "{report}"
    );

    let metrics = lines(&text(std::fs::read_to_string(dir.join("out/metrics.jsonl"))));
    assert_eq!(metrics.len(), 4);
    for (step, line) in metrics.iter().enumerate() {
        assert_eq!(line["step"], step + 1);
        for key in [
            "loss",
            "grad_norm",
            "lr",
            "tokens",
            "demos/loss",
            "pairs/rewards/margins",
            "rewards/accuracies",
        ] {
            assert!(line[key].is_number(), "step {step}: {key} in {line}");
        }
    }
    let first = &metrics[0];
    assert_eq!(first["demos/loss"], 0.25, "sigmoid(0) is half a reward of 1 away");
    assert!((first["pairs/loss"].as_f64().expect("a loss") - std::f64::consts::LN_2).abs() < 1e-12);
    assert_eq!(first["rewards/chosen"], 0.0, "with B = 0 every reward is exactly 0");

    let held_out = lines(&text(std::fs::read_to_string(dir.join("out/eval.jsonl"))));
    assert_eq!(
        held_out.iter().map(|l| l["step"].as_u64().expect("a step")).collect::<Vec<_>>(),
        [2, 4]
    );
    assert!(held_out[1]["eval_demos/loss"].as_f64() < Some(0.25));
    assert_eq!(tensors(&dir.join("out/adapter_model.safetensors")).len(), 3 * 7 * 2);
    assert!(dir.join("out/adapter_config.json").is_file());
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let adapter = |extra: &str| {
        let (_guard, dir) = temporary();
        succeed(UFT, &["train", &write_run(&dir, extra)]);
        std::fs::read(dir.join("out/adapter_model.safetensors")).expect("an adapter")
    };
    assert!(adapter("seed = 7") == adapter("seed = 7"));
    assert!(adapter("seed = 7") != adapter("seed = 8"));
}

#[test]
fn stages_run_in_sequence_each_with_its_own_reference() {
    let (_guard, dir) = temporary();
    let stages = r#"
[[stage]]
name = "sft"
data = ["demos"]
reference = "base"
steps = 3
[[stage]]
name = "dpo"
data = ["pairs"]
reference = "previous"
lr = 1e-3
warmup = 0.0
"#;
    let run = write_run(&dir, stages);
    let one = ["check", &run, "--set", "stage[0].data=[\"pairs\"]"];
    assert!(succeed(UFT, &one).contains("source `demos`: no [[stage]] trains it"));
    succeed(UFT, &["train", &run]);
    let metrics = lines(&text(std::fs::read_to_string(dir.join("out/metrics.jsonl"))));
    let stages: Vec<&str> = metrics.iter().map(|l| l["stage"].as_str().expect("a stage")).collect();
    assert_eq!(stages, ["sft", "sft", "sft", "dpo", "dpo", "dpo", "dpo"]);
    // The second stage begins with the first one's adapter, which is then its own reference.
    assert_eq!(metrics[3]["rewards/chosen"], 0.0);
    assert!(metrics[3].get("demos/loss").is_none());
    let first = tensors(&dir.join("out/stage-sft/adapter_model.safetensors"));
    let last = tensors(&dir.join("out/adapter_model.safetensors"));
    assert!(first != last);
    assert!(last == tensors(&dir.join("out/stage-dpo/adapter_model.safetensors")));
}

#[test]
fn weights_and_mixing_scale_the_losses() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "shuffle = false");
    let out = dir.join("g.safetensors").display().to_string();
    let loss = |set: &[&str]| {
        let mut arguments = vec!["grad", &run, "--out", &out];
        set.iter().for_each(|s| arguments.extend(["--set", s]));
        lines(&succeed(UFT, &arguments))[0]["loss"].as_f64().expect("a loss")
    };
    let (demos, pairs) = (0.25, std::f64::consts::LN_2);
    assert!((loss(&[]) - (demos + pairs)).abs() < 1e-9);
    assert!((loss(&["data[pairs].weight=0.5"]) - (demos + 0.5 * pairs)).abs() < 1e-9);
    // A batch of four holds two demonstrations and two pairs.
    assert!((loss(&["train.mixing=items"]) - (demos + pairs) / 2.0).abs() < 1e-9);
}

#[test]
fn check_accounts_for_every_row_and_shows_the_mask() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "max_length = 60");
    let report = succeed(UFT, &["check", &run]);
    assert!(report.contains("rows left out: too-long"), "{report}");
    assert!(report.contains("demos.jsonl:"), "places: {report}");
    assert!(report.contains("every implicit reward is exactly 0"), "{report}");
    assert!(!dir.join("out").exists(), "check writes nothing");

    let mask = succeed(UFT, &["check", &run, "--row", "1", "--set", "train.max_length=500"]);
    assert!(mask.contains("[Because light is faster than sound."), "{mask}");
    assert!(
        fail(UFT, 2, &["check", &run, "--row", "1", "--source", "demo"])
            .contains("did you mean `demos`?")
    );
}

#[test]
fn what_is_wrong_is_said_in_one_line_with_its_exit_code() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "");
    let one_line = |code: i32, arguments: &[&str], says: &[&str]| {
        let stderr = fail(UFT, code, arguments);
        assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
        for part in says {
            assert!(stderr.contains(part), "{stderr:?} does not say {part:?}");
        }
    };
    one_line(2, &["train", "nowhere.toml"], &["nowhere.toml", "cannot be read"]);
    one_line(
        2,
        &["train", &run, "--set", "train.stepz=1"],
        &["unknown key `stepz`", "did you mean `steps`?"],
    );
    one_line(2, &["train", &run, "--set", "train.device=cuda"], &["device", "cpu"]);
    one_line(2, &["train", &run, "--set", "lora.targets=[\"q_prog\"]"], &["q_prog", "q_proj"]);
    one_line(
        3,
        &["train", &run, "--set", "data[demos].files=[\"no.jsonl\"]"],
        &["demos", "no.jsonl", "cannot be read"],
    );
    one_line(
        2,
        &["train", &run, "--set", "lora.rank_pattern={nope=2}"],
        &["rank_pattern", "\"nope\" matches no adapted module"],
    );
    one_line(5, &["train", &run, "--set", "model.path=/nowhere"], &["/nowhere", "config.json"]);
    one_line(
        2,
        &["train", &run, "--set", "data[demos].objective=una-score"],
        &["demonstration", "score", "una-score"],
    );
    one_line(2, &["train", &run, "--set", "stage=[]", "--set", "data[demos].ratio=1"], &["ratio"]);
    assert!(!dir.join("out/adapter_model.safetensors").exists());
}

#[test]
fn rows_that_cannot_be_used_are_listed_with_their_places() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "");
    let bad = dir.join("bad.jsonl");
    let good = r#"{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}"#;
    std::fs::write(&bad, format!("{good}\n{{\"prompt\": \"x\"}}\n\nnot json\n{good}\n"))
        .expect("written");
    let files = format!("data[demos].files=[\"{}\"]", bad.display());
    let arguments = ["check", &run, "--set", &files, "--set", "data[demos].eval_fraction=0"];
    let stderr = fail(UFT, 3, &arguments);
    for part in ["bad.jsonl:2", "completion", "bad.jsonl:4", "not valid JSON", "bad_rows"] {
        assert!(stderr.contains(part), "{stderr} does not say {part}");
    }
    let mut skipping = arguments.to_vec();
    skipping.extend(["--set", "text.bad_rows=skip"]);
    let report = succeed(UFT, &skipping);
    assert!(
        report.contains("2 of 4 rows used") && report.contains("2 of 4 rows left out"),
        "{report}"
    );
}

#[test]
fn score_and_generate_and_merge() {
    let (_guard, dir) = temporary();
    let model = golden("models/qwen2").display().to_string();
    let adapter = format!("{model}/adapter");
    let data = golden("data/pairs.jsonl").display().to_string();
    let base = ["score", "--model", &model, "--data", &data, "--format", "preferences"];
    let scored = lines(&succeed(UFT, &base));
    assert!(scored.iter().all(|s| s["reward"] == 0.0 && s.get("ids").is_none()));
    let with = |model: &str, adapter: Option<&str>| {
        let mut arguments =
            vec!["score", "--model", model, "--data", &data, "--format", "preferences"];
        adapter.iter().for_each(|a| arguments.extend(["--adapter", a]));
        let logps = lines(&succeed(UFT, &arguments))
            .into_iter()
            .map(|s| s["logp"].as_f64().expect("a log-prob"));
        logps.collect::<Vec<f64>>()
    };
    let merged = dir.join("merged").display().to_string();
    succeed(UFT, &["merge", "--model", &model, "--adapter", &adapter, "--out", &merged]);
    for (adapted, merged) in with(&model, Some(&adapter)).iter().zip(with(&merged, None)) {
        assert!((adapted - merged).abs() < 1e-3, "{adapted} against {merged} merged");
    }
    let generate = ["generate", "--model", &model, "--prompt", "Hello", "--max-tokens", "8"];
    assert_eq!(succeed(UFT, &generate), succeed(UFT, &generate));
    let hot = |seed: &str| {
        succeed(UFT, &[&generate[..], &["--temperature", "1.5", "--seed", seed]].concat())
    };
    assert_eq!(hot("1"), hot("1"));
    assert_ne!(hot("1"), hot("2"));
    fail(UFT, 2, &[&generate[..], &["--top-p", "0"]].concat());
    fail(UFT, 5, &["generate", "--model", "nowhere", "--prompt", "Hello"]);
    fail(UFT, 2, &[&base[..], &["--beta", "nan"]].concat());
}

#[test]
fn config_prints_a_file_that_is_the_default() {
    assert_eq!(succeed(UFT, &["config"]), uft::config::docs::annotated());
    let page =
        std::fs::read_to_string(uft_tests::root().join("docs/command-line.md")).expect("the page");
    for (_, code, meaning) in uft::ErrorKind::ALL {
        assert!(
            page.contains(&format!("| {code} | {meaning} |")),
            "docs/command-line.md lacks exit code {code}"
        );
    }
}

#[test]
fn device_says_what_was_found_and_what_to_do_about_the_rest() {
    let lines = succeed(UFT, &["device"]);
    let said = |what: &str| {
        let line = lines.lines().find_map(|line| line.strip_prefix(&format!("{what}: ")));
        line.unwrap_or_else(|| panic!("no {what} in {lines}")).to_owned()
    };
    let driver = said("driver");
    assert!(driver.starts_with("CUDA 1") || driver.contains("; install") || driver.contains("see"));
    let nvrtc = said("NVRTC");
    assert!(nvrtc.contains("libnvrtc") || nvrtc.contains("pip install"), "{nvrtc}");
    assert!(said("compiled kernels").contains(" files, "), "{lines}");
    said("C++ compiler for device = \"emulated\"");
}

#[test]
fn rows_that_come_more_than_once_in_a_step_still_have_no_reward_before_it() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "");
    let first_rows = |name: &str| {
        let file = dir.join(format!("{name}.jsonl"));
        let all = text(std::fs::read_to_string(golden(&format!("data/{name}.jsonl"))));
        let rows: Vec<&str> = all.lines().take(3).collect();
        std::fs::write(&file, rows.join("\n")).expect("the rows are written");
        format!("data[{name}].files=[\"{}\"]", file.display())
    };
    let files = ["demos", "pairs"].map(first_rows);
    // In some of these splits the copies of a row differ in the last bits.
    for micro_tokens in [350, 400, 500, 600, 900] {
        let split = format!("train.micro_tokens={micro_tokens}");
        let set = [&files[0], &files[1], &split, "train.batch=64"].map(|s| ["--set", s]);
        let report = succeed(UFT, &[&["check", &run][..], set.as_flattened()].concat());
        assert!(report.contains("every implicit reward is exactly 0"), "{report}");
    }
}

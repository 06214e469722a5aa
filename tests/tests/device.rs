//! A GPU's whole path through the command line, on the emulated device: the same kernels, launches and
//! bookkeeping as on a real one.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Output;
use uft::config::Config;
use uft::train::{setup::Run, train};
use uft_tests::mixed::{assert_same, copy, finished, temporary};
use uft_tests::{command, golden, lines, tensors};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");

/// Runs the command line, with compiled kernels kept from one test to the next.
fn uft(arguments: &[&str]) -> Output {
    let kernels = concat!(env!("CARGO_TARGET_TMPDIR"), "/device");
    command(UFT, arguments).env("UFT_CACHE_DIR", kernels).output().expect("the program runs")
}

fn succeed(arguments: &[&str]) -> String {
    let output = uft(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "uft {}: {stderr}", arguments.join(" "));
    String::from_utf8(output.stdout).expect("stdout is text")
}

fn fail(code: i32, arguments: &[&str]) -> String {
    let output = uft(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "uft {}: {stderr}", arguments.join(" "));
    stderr
}

/// The first rows of a data file.
fn some_rows(dir: &Path, name: &str, count: usize) -> String {
    let all = std::fs::read_to_string(golden(&format!("data/{name}.jsonl"))).expect("the data");
    let some: String = all.lines().take(count).map(|line| format!("{line}\n")).collect();
    let path = dir.join(format!("{name}.jsonl"));
    std::fs::write(&path, some).expect("the rows are written");
    path.display().to_string()
}

/// A model's folder with nothing in it that a plan does not need.
fn without_weights(dir: &Path, name: &str) -> PathBuf {
    let model = dir.join("model");
    std::fs::create_dir(&model).expect("a folder");
    for file in ["config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"] {
        let from = golden(&format!("models/{name}/{file}"));
        std::fs::copy(from, model.join(file)).expect("a copy");
    }
    model
}

/// MiB of a part of a plan.
fn on_the_gpu(plan: &str, part: &str) -> f64 {
    let named = format!("on the GPU: {part}");
    let line = plan.lines().find(|line| line.contains(&named)).expect("the part");
    let cells: Vec<&str> = line.split(['│', '┆', '|']).map(str::trim).collect();
    cells.iter().find_map(|cell| cell.parse().ok()).expect("a number")
}

/// A short run with a reference, several micro-batches in a step, and held-out rows.
fn write_run(dir: &Path) -> String {
    let text = format!(
        r#"
[model]
path = "{model}"
[lora]
rank = 4
alpha = 8
targets = ["q_proj", "o_proj", "gate_proj", "down_proj", "lm_head"]
[[data]]
name = "demos"
files = ["{demos}"]
adapter = "demonstrations"
objective = {{ plugin = "uft-sft", beta = 0.1 }}
[[data]]
name = "pairs"
files = ["{pairs}"]
eval_fraction = 0.34
adapter = "preferences"
objective = {{ plugin = "una-pairwise", beta = 0.1 }}
[train]
output = "{out}"
reference_cache = "{out}/reference"
device = "emulated"
steps = 4
batch = 3
micro_tokens = 100
lr = 5e-3
threads = 2
save_every = 2
"#,
        model = golden("models/qwen3").display(),
        demos = some_rows(dir, "demos", 2),
        pairs = some_rows(dir, "pairs", 3),
        out = dir.join("out").display(),
    );
    let path = dir.join("run.toml");
    std::fs::write(&path, text).expect("the run is written");
    path.display().to_string()
}

#[test]
fn a_run_is_the_same_when_resumed_and_the_processor_s_but_for_rounding() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir);
    succeed(&["train", &run]);
    let whole = finished(&dir.join("out"));
    assert_eq!(whole.metrics.len(), 4);

    let (_guard, other) = temporary();
    let resumed = write_run(&other);
    copy(&dir.join("out/checkpoint-2"), &other.join("out/checkpoint-2"));
    let refused = fail(2, &["train", &resumed, "--resume", "--set", "train.device=\"cpu\""]);
    assert!(refused.contains("the device (emulated then, the CPU now)"), "{refused}");
    succeed(&["train", &resumed, "--resume"]);
    assert_same(&whole, &finished(&other.join("out")), "from checkpoint-2");

    let (_guard, other) = temporary();
    let run = write_run(&other);
    succeed(&["train", &run, "--set", "train.device=\"cpu\""]);
    for (device, cpu) in whole.metrics.iter().zip(&finished(&other.join("out")).metrics) {
        for (what, tolerance) in [("loss", 0.01), ("grad_norm", 0.05)] {
            let [device, cpu] = [device, cpu].map(|m| m[what].as_f64().expect("a number"));
            assert!((device - cpu).abs() < tolerance * cpu.abs(), "{what}: {device}, CPU {cpu}");
        }
    }
}

/// Two stages in sequence, the second with the first's adapter as its reference and statistics over the step.
#[test]
fn a_stage_after_another_goes_on_from_its_middle() {
    let (_guard, dir) = temporary();
    let write = |dir: &Path| {
        let text = format!(
            r#"
[model]
path = "{model}"
[lora]
rank = 4
[[data]]
name = "demos"
files = ["{demos}"]
adapter = "demonstrations"
objective = {{ plugin = "sft" }}
[[data]]
name = "labels"
files = ["{labels}"]
adapter = "labels"
objective = {{ plugin = "kto", beta = 0.1 }}
[train]
output = "{out}"
reference_cache = "{out}/reference"
device = "emulated"
steps = 2
batch = 3
micro_tokens = 100
lr = 5e-3
threads = 2
save_every = 1
[[stage]]
name = "first"
data = ["demos"]
reference = "base"
[[stage]]
name = "second"
data = ["labels"]
reference = "previous"
"#,
            model = golden("models/llama").display(),
            demos = some_rows(dir, "demos", 3),
            labels = some_rows(dir, "labels", 3),
            out = dir.join("out").display(),
        );
        let path = dir.join("run.toml");
        std::fs::write(&path, text).expect("the run is written");
        path.display().to_string()
    };
    succeed(&["train", &write(&dir)]);
    let whole = finished(&dir.join("out"));
    assert_eq!(whole.metrics.len(), 4);

    let (_guard, other) = temporary();
    let resumed = write(&other);
    copy(&dir.join("out/checkpoint-3"), &other.join("out/checkpoint-3"));
    assert!(other.join("out/checkpoint-3/reference.safetensors").exists());
    succeed(&["train", &resumed, "--resume"]);
    assert_same(&whole, &finished(&other.join("out")), "from checkpoint-3");
}

/// In this process, to see what the device was asked for.
#[test]
fn nothing_is_allocated_or_compiled_after_the_first_step() {
    let made = |steps: u32| {
        let (_guard, dir) = temporary();
        let path = write_run(&dir);
        let set = [format!("train.steps={steps}")];
        let config = Config::load(Path::new(&path), &set).expect("a configuration");
        let mut run = Run::prepare(config).expect("a run");
        let before = run.model.made();
        train(&mut run, false).expect("the run ends");
        assert_eq!(run.model.activations().max(run.memory.activations), run.memory.activations);
        (before, run.model.made())
    };
    let (before, one) = made(1);
    assert_eq!(before.1, one.1, "every kernel is compiled before the first step");
    assert!(
        before.0 < one.0,
        "gradients and moments are allocated by the stage, so counting works"
    );
    assert_eq!(one, made(4).1);
}

/// As docs/cuda.md says: once for the log-probs of each micro-batch, and once for the gradient's norm.
#[test]
fn a_step_waits_for_nothing_but_log_probs_and_the_norm() {
    let waits = |steps: u32, micro_tokens: u32| {
        let (_guard, dir) = temporary();
        let path = write_run(&dir);
        let set = [
            format!("train.steps={steps}"),
            format!("train.micro_tokens={micro_tokens}"),
            "train.save_every=0".into(),
            "train.recompute=\"offload\"".into(),
        ];
        let config = Config::load(Path::new(&path), &set).expect("a configuration");
        let mut run = Run::prepare(config).expect("a run");
        train(&mut run, false).expect("the run ends");
        run.model.waits()
    };
    // Every row has been met by then, so that its reference log-probs are known.
    let of_a_step = |micro_tokens| waits(5, micro_tokens) - waits(4, micro_tokens);
    assert_eq!(of_a_step(10_000), 1 + 1);
    assert_eq!(of_a_step(1), 3 + 1, "three groups are a batch, each a micro-batch of its own");
}

#[test]
fn a_gradient_that_is_not_finite_stops_with_the_rows_of_its_micro_batch() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir);
    // Every log-prob is finite, and each row has a micro-batch of its own.
    let heavy = ["--set", "data[pairs].weight=1e300", "--set", "train.micro_tokens=1"];
    let stderr = fail(6, &[&["train", &run][..], &heavy].concat());
    assert!(stderr.contains("gradient is not finite after"), "{stderr}");
    assert!(stderr.contains("pairs.jsonl:") && stderr.matches(".jsonl:").count() == 1, "{stderr}");
    assert!(stderr.contains("checkpoint-0"), "{stderr}");
}

#[test]
fn check_and_grad_agree_with_the_processor_and_the_plan_is_of_the_gpu() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir);
    let checked = succeed(&["check", &run]);
    assert!(checked.contains("every implicit reward is exactly 0"), "{checked}");
    assert!(checked.contains("on the GPU: activations"), "{checked}");
    assert!(checked.contains("available on emulated"), "{checked}");
    assert!(checked.contains("no layer computed again"), "{checked}");

    // Where no weights are, for a GPU that is not there.
    let path = format!("model.path=\"{}\"", without_weights(&dir, "qwen3").display());
    let planned = succeed(&["check", &run, "--gpu", "24", "--set", &path]);
    assert!(planned.contains("of 24576.0 MiB available on such a GPU"), "{planned}");
    fail(2, &["check", &run, "--gpu", "0"]);

    // Less than all activations, more than none.
    let all = on_the_gpu(&checked, "total");
    let memory = |share: f64| format!("train.memory={}", share * all / 1024.0);
    // With less and less, first gate and up alone are computed again, then whole layers.
    let plans: Vec<String> = (10..40)
        .map(|part| all * f64::from(50 - part) / 40.0 / 1024.0)
        .map(|gib| uft(&["check", &run, "--gpu", &gib.to_string()]))
        .filter(|output| output.status.success())
        .map(|output| String::from_utf8(output.stdout).expect("stdout is text"))
        .collect();
    let first = |what: &str| plans.iter().position(|plan| plan.contains(what)).expect(what);
    let levels = [
        "no layer computed again",
        "1 of 2 layers computed again on the way back, of 1 gate and up alone",
        "2 of 2 layers computed again on the way back, of 2 gate and up alone",
        "2 of 2 layers computed again on the way back, of 1 gate and up alone",
    ];
    let found = levels.map(first);
    assert!(found.is_sorted() && found[0] < found[3], "{found:?}: {plans:?}");
    let refused = fail(7, &["check", &run, "--set", &memory(0.2)]);
    assert!(refused.contains("of the GPU's memory"), "{refused}");

    let gradient = |device: &str| {
        let out = dir.join(format!("{device}.safetensors"));
        let set = format!("train.device=\"{device}\"");
        succeed(&["grad", &run, "--out", &out.display().to_string(), "--set", &set]);
        tensors(&out)
    };
    for ((name, device), (_, cpu)) in gradient("emulated").into_iter().zip(gradient("cpu")) {
        let square = |values: &mut dyn Iterator<Item = f32>| -> f64 {
            values.map(|x| f64::from(x).powi(2)).sum()
        };
        let difference = square(&mut device.iter().zip(&cpu).map(|(a, b)| a - b));
        let error = (difference / square(&mut cpu.iter().copied()).max(1e-30)).sqrt();
        // At B = 0 the gradient of A is exactly 0.
        let same = cpu.iter().all(|x| *x == 0.0) && device == cpu;
        assert!(same || error < 0.05, "{name}: off by {error}");
    }
}

/// Where even the inputs of layers are too many, they wait in the machine's memory.
#[test]
fn inputs_of_layers_are_offloaded_where_that_is_what_fits() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir);
    // A plan of a model with more and wider layers; nothing of it is computed.
    let model = without_weights(&dir, "qwen3");
    let config = std::fs::read_to_string(model.join("config.json")).expect("a configuration");
    let mut config: Value = serde_json::from_str(&config).expect("JSON");
    for (key, value) in [("hidden_size", 512), ("num_hidden_layers", 24)] {
        config[key] = value.into();
    }
    config["layer_types"] = vec!["full_attention"; 24].into();
    std::fs::write(model.join("config.json"), config.to_string()).expect("it is written");
    let plan = |gib: f64, recompute: &str| {
        let (path, gib) = (format!("model.path=\"{}\"", model.display()), gib.to_string());
        let recompute = format!("train.recompute=\"{recompute}\"");
        succeed(&["check", &run, "--gpu", &gib, "--set", &path, "--set", &recompute])
    };
    let (all, forced) = (plan(8.0, "all"), plan(8.0, "offload"));
    assert!(!all.contains("inputs of layers"), "{all}");
    let level = "24 of 24 layers computed again on the way back, with the input of 23 in the machine's memory meanwhile";
    assert!(forced.contains(level) && forced.contains("│ inputs of layers "), "{forced}");
    // Between what the two take the plan offloads some by itself, and 2 % stay free.
    let [most, least] = [&all, &forced].map(|plan| on_the_gpu(plan, "total"));
    assert!(least < most, "{least} of {most} MiB");
    let between = (most + least) / 2.0 / 1024.0 / 0.98;
    for recompute in ["auto", "all"] {
        let chosen = plan(between, recompute);
        let (_, inputs) = chosen.split_once("with the input of ").expect("some are offloaded");
        let inputs: usize = inputs.split_once(' ').expect("a number").0.parse().expect("a number");
        assert!((1..23).contains(&inputs), "{chosen}");
    }

    let gradient = |recompute: &str| {
        let out = dir.join(format!("{recompute}.safetensors")).display().to_string();
        let path = format!("model.path=\"{}\"", golden("models/llama").display());
        let set = format!("train.recompute=\"{recompute}\"");
        succeed(&["grad", &run, "--out", &out, "--set", &path, "--set", &set]);
        tensors(Path::new(&out))
    };
    assert_eq!(gradient("offload"), gradient("none"));
    let on_cpu = ["--set", "train.device=\"cpu\"", "--set", "train.recompute=\"offload\""];
    let refused = fail(2, &[&["check", &run][..], &on_cpu].concat());
    assert!(refused.contains("recompute = \"offload\" takes from a GPU"), "{refused}");
}

#[test]
fn score_and_generate_run_on_a_device() {
    let (_guard, dir) = temporary();
    let model = golden("models/mistral").display().to_string();
    let adapter = format!("{model}/adapter");
    let data = some_rows(&dir, "pairs", 2);
    let score = |device: &str, adapter: &[&str]| {
        let arguments = [
            "score",
            "--model",
            &model,
            "--data",
            &data,
            "--format",
            "preferences",
            "--device",
            device,
        ];
        lines(&succeed(&[&arguments[..], adapter].concat()))
    };
    let base = score("emulated", &[]);
    assert!(base.iter().all(|line| line["reward"] == 0.0));
    let adapter = ["--adapter", adapter.as_str()];
    let (device, cpu) = (score("emulated", &adapter), score("cpu", &adapter));
    assert_eq!(device.len(), cpu.len());
    for (device, cpu) in device.iter().zip(&cpu) {
        for what in ["logp", "ref_logp"] {
            let [device, cpu] = [device, cpu].map(|line| line[what].as_f64().expect("a log-prob"));
            assert!((device - cpu).abs() < 0.01 * cpu.abs(), "{what}: {device}, CPU {cpu}");
        }
    }
    let generate = ["generate", "--model", &model, "--prompt", "Hello", "--max-tokens", "4"];
    let on = |device: &str| succeed(&[&generate[..], &["--device", device]].concat());
    assert_eq!(on("emulated"), on("emulated"));
    assert!(!on("emulated").trim().is_empty());
}

#[test]
fn what_is_missing_for_a_gpu_is_said_with_the_remedy() {
    if !succeed(&["device"]).contains("GPUs: none") {
        return;
    }
    let model = golden("models/llama").display().to_string();
    let refused =
        fail(2, &["generate", "--model", &model, "--prompt", "Hello", "--device", "cuda"]);
    assert!(refused.contains("--device: device = \"cuda\": "), "{refused}");
    assert_eq!(refused.trim().lines().count(), 1, "{refused}");
    let (_guard, dir) = temporary();
    let run = write_run(&dir);
    let refused = fail(2, &["check", &run, "--set", "train.device=\"cuda\""]);
    assert!(refused.contains("[train]: device = \"cuda\": "), "{refused}");
}

//! A GPU's whole path through the command line, on the emulated device: the same kernels, launches and
//! bookkeeping as on a real one.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use uft::config::Config;
use uft::train::{setup::Run, train};
use uft_tests::mixed::{assert_same, copy, finished, temporary};
use uft_tests::run::RunFile;
use uft_tests::unrounded::{expect_rounded, unrounded};
use uft_tests::{command, failed, golden, lines, numbers, succeeded, tensors};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");

/// The command line, with compiled kernels kept from one test to the next.
fn uft(arguments: &[&str]) -> Command {
    let mut command = command(UFT, arguments);
    command.env("UFT_CACHE_DIR", concat!(env!("CARGO_TARGET_TMPDIR"), "/device"));
    command
}

fn succeed(arguments: &[&str]) -> String {
    succeeded(uft(arguments))
}

fn fail(code: i32, arguments: &[&str]) -> String {
    failed(code, uft(arguments))
}

/// The first rows of a data file.
fn some_rows(dir: &Path, name: &str, count: usize) -> PathBuf {
    let all = std::fs::read_to_string(golden(&format!("data/{name}.jsonl"))).expect("the data");
    let some: String = all.lines().take(count).map(|line| format!("{line}\n")).collect();
    let path = dir.join(format!("{name}.jsonl"));
    std::fs::write(&path, some).expect("the rows are written");
    path
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
    let targets = "[\"q_proj\", \"o_proj\", \"gate_proj\", \"down_proj\", \"lm_head\"]";
    RunFile::new(dir, "qwen3")
        .section("lora", &format!("rank = 4\nalpha = 8\ntargets = {targets}"))
        .rows("demos", &some_rows(dir, "demos", 2), r#"{ plugin = "sft" }"#)
        .rows("pairs", &some_rows(dir, "pairs", 3), r#"{ plugin = "una-pairwise", beta = 0.1 }"#)
        .eval_fraction(0.34)
        .own_references()
        .train("device = \"emulated\"\nsteps = 4\nbatch = 3\nmicro_tokens = 100\nlr = 5e-3\nsave_every = 2")
        .write()
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

    let on_cpu = |model: &[&str]| {
        let (_guard, dir) = temporary();
        let run = write_run(&dir);
        succeed(&[&["train", &run, "--set", "train.device=\"cpu\""], model].concat());
        finished(&dir.join("out")).metrics
    };
    let model = dir.join("unrounded");
    unrounded("qwen3", &model);
    let set = format!("model.path=\"{}\"", model.display());
    let (cpu, unrounded) = (on_cpu(&[]), on_cpu(&["--set", &set]));
    for what in ["loss", "grad_norm"] {
        let [device, unrounded, cpu] = [&whole.metrics, &unrounded, &cpu].map(|metrics| {
            let of_step = |line: &Value| line[what].as_f64().expect("a number");
            metrics.iter().map(of_step).collect::<Vec<_>>()
        });
        expect_rounded(what, &device, &unrounded, &cpu);
    }
}

/// Two stages in sequence, the second with the first's adapter as its reference and statistics over the step.
#[test]
fn a_stage_after_another_goes_on_from_its_middle() {
    let (_guard, dir) = temporary();
    let stages = r#"
[[stage]]
name = "first"
data = ["demos"]
reference = "base"
[[stage]]
name = "second"
data = ["labels"]
reference = "previous"
"#;
    let write = |dir: &Path| {
        RunFile::new(dir, "llama")
            .section("lora", "rank = 4")
            .rows("demos", &some_rows(dir, "demos", 3), r#"{ plugin = "sft" }"#)
            .rows("labels", &some_rows(dir, "labels", 3), r#"{ plugin = "kto", beta = 0.1 }"#)
            .own_references()
            .train("device = \"emulated\"\nsteps = 2\nbatch = 3\nmicro_tokens = 100\nlr = 5e-3\nsave_every = 1")
            .and(stages)
            .write()
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
    let made = |steps: u32, recompute: &str| {
        let (_guard, dir) = temporary();
        let path = write_run(&dir);
        let set = [format!("train.steps={steps}"), format!("train.recompute={recompute}")];
        let config = Config::load(Path::new(&path), &set).expect("a configuration");
        let mut run = Run::prepare(config).expect("a run");
        let more = run.memory.reference_tokens > run.config.train.micro_tokens;
        assert!(more || recompute != "none", "a step that keeps everything has room for more rows");
        let before = run.model.made();
        train(&mut run, false).expect("the run ends");
        assert_eq!(run.model.activations().max(run.memory.activations), run.memory.activations);
        (before, run.model.made())
    };
    let (before, one) = made(1, "none");
    assert_eq!(before.1, one.1, "every kernel is compiled before the first step");
    assert!(
        before.0 < one.0,
        "gradients and moments are allocated by the stage, so counting works"
    );
    assert_eq!(one, made(4, "none").1);
    // Where buffers of smaller micro-batches may lie farther apart.
    made(3, "all");
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
    assert!(checked.contains(" targets, of the reference's log-probs "), "{checked}");
    // Each group's reference log-probs in a micro-batch of their own, told before those of the one before have come.
    let apart = succeed(&["check", &run, "--set", "train.without=[\"packing\"]"]);
    assert!(apart.contains("every implicit reward is exactly 0"), "{apart}");

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
        .map(|gib| uft(&["check", &run, "--gpu", &gib.to_string()]).output().expect("it runs"))
        .filter(|output| output.status.success())
        .map(|output| String::from_utf8(output.stdout).expect("stdout is text"))
        .collect();
    // Whole layers, and gate and up alone.
    let levels = plans.iter().map(|plan| {
        let before = |mark: &str| -> usize {
            let number = plan.split_once(mark).and_then(|(head, _)| head.rsplit(' ').next());
            number.map_or(0, |number| number.parse().expect("a number"))
        };
        let alone = before(" gate and up alone");
        [before(" of 2 layers computed again on the way back") - alone, alone]
    });
    let levels: Vec<[usize; 2]> = levels.collect();
    assert!(levels.is_sorted() && levels[0] == [0, 0], "{levels:?}");
    let some = |level: fn(&[usize; 2]) -> bool| levels.iter().any(level);
    assert!(some(|level| level[0] == 0 && level[1] > 0), "{levels:?}");
    assert!(some(|level| level[0] > 0), "{levels:?}");
    let refused = fail(7, &["check", &run, "--set", &memory(0.2)]);
    assert!(refused.contains("of the GPU's memory"), "{refused}");

    let gradient = |device: &str, model: &Path| -> Vec<(String, Vec<f64>)> {
        let out = dir.join("gradient.safetensors");
        let device = format!("train.device=\"{device}\"");
        let model = format!("model.path=\"{}\"", model.display());
        let set = ["--set", &device, "--set", &model];
        succeed(&[&["grad", &run, "--out", &out.display().to_string()][..], &set].concat());
        let wide = |numbers: Vec<f32>| numbers.into_iter().map(f64::from).collect();
        tensors(&out).into_iter().map(|(name, numbers)| (name, wide(numbers))).collect()
    };
    let (rounded, wide) = (golden("models/qwen3"), dir.join("unrounded"));
    unrounded("qwen3", &wide);
    let (device, cpu) = (gradient("emulated", &rounded), gradient("cpu", &rounded));
    for (((name, device), (_, unrounded)), (_, cpu)) in
        device.iter().zip(&gradient("cpu", &wide)).zip(&cpu)
    {
        // At B = 0 the gradient of A is exactly 0.
        match cpu.iter().all(|x| *x == 0.0) {
            true => assert_eq!(device, cpu, "{name}"),
            false => expect_rounded(name, device, unrounded, cpu),
        }
    }
}

/// What succeeds without a word, such as one of more memory than was planned.
fn quiet(arguments: &[&str]) -> String {
    let output = uft(arguments).output().expect("the program runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.is_empty(), "{}: {stderr}", arguments.join(" "));
    String::from_utf8(output.stdout).expect("stdout is text")
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
    let data = some_rows(&dir, "pairs", 2).display().to_string();
    let score = |model: &str, device: &str, more: &[&str]| {
        let of_what = ["--data", &data, "--format", "preferences", "--device", device, "--tokens"];
        let arguments = [&["score", "--model", model][..], &of_what, more].concat();
        lines(&quiet(&arguments))
    };
    let base = score(&model, "emulated", &[]);
    assert!(base.iter().all(|line| line["reward"] == 0.0));
    let adapter = ["--adapter", adapter.as_str(), "--micro-tokens", "50"];
    let wide = dir.join("unrounded");
    unrounded("mistral", &wide);
    let scored = [(&model, "emulated"), (&wide.display().to_string(), "cpu"), (&model, "cpu")]
        .map(|(model, device)| score(model, device, &adapter));
    for what in ["token_logps", "ref_token_logps"] {
        let [device, unrounded, cpu] = scored
            .each_ref()
            .map(|lines| lines.iter().flat_map(|line| numbers(&line[what])).collect::<Vec<_>>());
        expect_rounded(what, &device, &unrounded, &cpu);
    }
    let generate = ["generate", "--model", &model, "--prompt", "Hello", "--max-tokens", "4"];
    let on = |device: &str| quiet(&[&generate[..], &["--device", device]].concat());
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

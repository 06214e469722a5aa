//! The plan of memory as a user meets it, and the switches that trade memory and time.

use std::path::Path;
use uft_tests::run::RunFile;
use uft_tests::{fail, golden, succeed, tensors, uft};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");

/// A run over pairs on a golden model, its output in `dir`.
fn write_run(dir: &Path) -> String {
    RunFile::new(dir, "llama")
        .golden("pairs", r#"{ plugin = "una-pairwise", beta = 0.1 }"#)
        .eval_fraction(0.25)
        .train("steps = 4\nbatch = 4\nlr = 5e-3")
        .write()
}

#[test]
fn check_prints_the_plan() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let report = succeed(UFT, &["check", &write_run(dir.path())]);
    for part in ["weights", "adapter and optimizer", "activations", "data", "total"] {
        assert!(report.contains(&format!("│ {part} ")), "{part}: {report}");
    }
    assert!(report.contains("no layer computed again"), "{report}");
    let again = ["--set", "train.recompute=all"];
    let report = succeed(UFT, &[&["check", &write_run(dir.path())][..], &again].concat());
    assert!(report.contains("3 of 3 layers computed again"), "{report}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_run_that_does_not_fit_is_refused_with_what_would() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let run = write_run(dir.path());
    let refused = |set: &[&str]| {
        let set = set.iter().flat_map(|assignment| ["--set", assignment]);
        fail(UFT, 7, &["check", &run].into_iter().chain(set).collect::<Vec<_>>())
    };
    let message = refused(&["train.memory=0.001"]);
    assert!(message.contains("of memory and 1.0 MiB are available: the weights and"), "{message}");

    let large = ["train.memory=0.0625", "train.batch=500", "train.micro_tokens=50000"];
    let message = refused(&large);
    let (_, rest) = message.split_once("micro_tokens = ").expect("a smaller micro-batch");
    let smaller: usize = rest.split_once(' ').expect("a number").0.parse().expect("a number");
    assert!((100..50_000).contains(&smaller), "{message}");
    // A little less, since what the process itself takes is measured anew.
    let fitting = format!("train.micro_tokens={}", smaller * 9 / 10);
    let set = ["--set", large[0], "--set", "train.batch=500", "--set", &fitting];
    succeed(UFT, &[&["check", &run][..], &set].concat());
}

#[test]
fn what_is_switched_off_changes_last_bits_only() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let run = write_run(dir.path());
    let gradient = |set: &str| {
        let out = dir.path().join("gradient").display().to_string();
        succeed(UFT, &["grad", &run, "--out", &out, "--set", set]);
        tensors(Path::new(&out))
    };
    let expected = gradient("train.recompute=none");
    assert_eq!(gradient("train.recompute=all"), expected);
    let gains =
        ["packing", "shared-prompts", "fused-log-probs", "skipped-gradients", "reference-cache"];
    for gain in gains {
        for ((name, got), (_, expected)) in
            gradient(&format!("train.without=[\"{gain}\"]")).iter().zip(&expected)
        {
            let length = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
            let difference = length(&mut got.iter().zip(expected).map(|(a, b)| a - b));
            let size = length(&mut expected.iter().copied());
            assert!(difference <= 1e-4 * size, "{gain}: {name}: {difference} of {size}");
        }
    }
    let message =
        fail(UFT, 2, &["grad", &run, "--out", "x", "--set", "train.without=[\"pakking\"]"]);
    assert!(message.contains("did you mean `packing`?"), "{message}");
}

#[test]
fn a_resumed_run_may_compute_layers_again() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let run = write_run(dir.path());
    let out = dir.path().join("out");
    let train = |extra: &[&str]| {
        succeed(UFT, &[&["train", &run, "--set", "train.save_every=2"][..], extra].concat())
    };
    train(&["--set", "train.recompute=none"]);
    let whole = tensors(&out.join("adapter_model.safetensors"));
    std::fs::remove_dir_all(out.join("checkpoint-4")).expect("the last checkpoint is there");
    train(&["--set", "train.recompute=all", "--resume"]);
    assert_eq!(tensors(&out.join("adapter_model.safetensors")), whole);
    // Without a switch the bits are others, so that is another run.
    let other = [
        "train",
        &run,
        "--resume",
        "--set",
        "train.save_every=2",
        "--set",
        "train.without=[\"packing\"]",
    ];
    let message = String::from_utf8_lossy(&uft(UFT, &other).stderr).into_owned();
    assert!(message.contains("train.without"), "{message}");
}

/// Every kind of pass: mismatched completions, evaluation, answers, several stages.
#[test]
fn no_pass_takes_more_than_was_planned() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let run = write_run(dir.path());
    let text = std::fs::read_to_string(&run).expect("the run is there");
    let more = format!(
        r#"
[[data]]
name = "labels"
files = ["{labels}"]
eval_fraction = 0.25
adapter = "labels"
objective = {{ plugin = "kto", beta = 0.1 }}
[eval]
samples = 2
sample_tokens = 5
[[stage]]
name = "one"
data = ["pairs"]
reference = "base"
[[stage]]
name = "two"
data = ["labels", "pairs"]
reference = "previous"
"#,
        labels = golden("data/labels.jsonl").display(),
    );
    std::fs::write(&run, text + &more).expect("the run is written");
    for set in
        ["train.micro_tokens=100", "train.recompute=all", "train.without=[\"shared-prompts\"]"]
    {
        let out = format!("train.output={}", dir.path().join(set.replace('"', "")).display());
        let output = uft(UFT, &["train", &run, "--set", set, "--set", &out]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && stderr.is_empty(), "{set}: {stderr}");
    }
}

//! Plugins whose numbers are right and whose manners are not: the run is bit for bit that of the plain
//! plugin, and stdout holds nothing but its results.

use super::{PLUGIN, Source, UFT, refused, temporary, text};
use std::path::Path;
use uft_tests::{c, golden, lines};

/// What a run leaves: its adapter and the numbers of its steps; and the gradient of its first step with
/// what `grad` prints.
#[derive(PartialEq)]
struct Left {
    adapter: Vec<u8>,
    steps: Vec<[String; 3]>,
    gradient: Vec<u8>,
    printed: String,
}

/// Runs `uft` and gives stdout; stderr may hold anything.
fn quiet(arguments: &[&str]) -> String {
    let output = uft_tests::uft(UFT, arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).expect("text")
}

/// A run with an adapter and an objective, each a TOML value; libraries are looked for in `plugins`.
fn run(plugins: &Path, adapter: &str, objective: &str) -> Left {
    let dir = temporary();
    let data = dir.path().join("data.jsonl");
    let rows = "{\"prompt\": \"Name a planet.\", \"completion\": \"Jupiter is one of them.\"}\n\
                {\"prompt\": \"Is it late?\", \"completion\": \"It is.\"}\n";
    std::fs::write(&data, rows).expect("written");
    let more =
        format!("steps = 2\nbatch = 2\nlr = 1e-2\n[plugins]\ndirs = [\"{}\"]", plugins.display());
    let path = Source { data: &data, adapter, objective }.write(dir.path(), &more);
    let out = dir.path().join("grad.safetensors");
    let printed = quiet(&["grad", text(&path), "--out", text(&out)]);
    assert_eq!(lines(&printed).len(), 1, "one JSON object: {printed}");
    let trained = quiet(&["train", text(&path)]);
    assert_eq!(trained.lines().count(), 3, "no held-out rows, an empty line, a summary: {trained}");
    let output = dir.path().join("out");
    let metrics = std::fs::read_to_string(output.join("metrics.jsonl")).expect("metrics");
    let numbers =
        |step: &serde_json::Value| ["loss", "grad_norm", "lr"].map(|k| step[k].to_string());
    Left {
        adapter: std::fs::read(output.join("adapter_model.safetensors")).expect("an adapter"),
        steps: lines(&metrics).iter().map(numbers).collect(),
        gradient: std::fs::read(&out).expect("a gradient"),
        printed,
    }
}

fn assert_same(seen: &Left, plain: &Left, habit: &str) {
    assert_eq!(seen.steps, plain.steps, "{habit}");
    assert_eq!(seen.printed, plain.printed, "{habit}");
    assert!(seen == plain, "{habit}: adapter or gradient differ");
}

#[test]
fn objectives_in_rust_with_bad_manners_change_nothing() {
    let dir = temporary();
    let with = |habit: &str| {
        let objective = format!("{{ plugin = \"nuisance\", habit = \"{habit}\" }}");
        run(dir.path(), "\"demonstrations\"", &objective)
    };
    let plain = with("none");
    assert_ne!(plain.steps[0], plain.steps[1], "it learns");
    for habit in ["prints", "allocates", "sleeps", "starts threads", "panics in a thread"] {
        assert_same(&with(habit), &plain, habit);
    }
}

#[test]
fn adapters_with_bad_manners_change_nothing() {
    let dir = temporary();
    let with = |habit: &str| {
        let adapter = format!("{{ plugin = \"nuisance\", habit = \"{habit}\" }}");
        run(dir.path(), &adapter, "\"sft\"")
    };
    let plain = with("none");
    for habit in ["prints", "allocates", "starts threads", "panics in a thread"] {
        assert_same(&with(habit), &plain, habit);
    }
}

#[test]
fn objectives_in_c_with_bad_manners_change_nothing() {
    let (dir, at_load) = (temporary(), temporary());
    let source = "tests/c/nuisance.c";
    c::build_as("c_nuisance", source, dir.path(), &[]);
    c::build_as("c_nuisance", source, at_load.path(), &["-DAT_LOAD"]);
    let with = |plugins: &Path, habit: &str| {
        let objective = format!("{{ plugin = \"c-nuisance\", habit = \"{habit}\" }}");
        run(plugins, "\"demonstrations\"", &objective)
    };
    let plain = with(dir.path(), "none");
    for habit in [
        "prints",
        "allocates",
        "sleeps",
        "starts threads",
        "locale",
        "rounding",
        "denormals",
        "traps",
        "errno",
    ] {
        assert_same(&with(dir.path(), habit), &plain, habit);
    }
    assert_same(&with(at_load.path(), "none"), &plain, "when it is loaded");
}

#[test]
fn memory_that_is_not_there_is_one_line() {
    let dir = temporary();
    c::build_as("c_nuisance", "tests/c/nuisance.c", dir.path(), &[]);
    let objective = "{ plugin = \"c-nuisance\", habit = \"allocates too much\" }";
    let data = golden("data/demos.jsonl");
    let run = Source { data: &data, adapter: "\"demonstrations\"", objective };
    let path = run.write(dir.path(), &format!("[plugins]\ndirs = [\"{}\"]", dir.path().display()));
    let line = refused(PLUGIN, &["train", text(&path)]);
    assert!(line.ends_with("plugin `c-nuisance`: there is not that much memory"), "{line}");
}

#[test]
fn a_plugin_that_ends_the_process_does_not_make_half_a_run_look_whole() {
    let dir = temporary();
    let library = c::build_as("c_nuisance", "tests/c/nuisance.c", dir.path(), &[]);
    let says = |name: &str| {
        format!(
            "plugin `{name}` ended the process; this is a bug of the plugin, report it to its author"
        )
    };
    for name in ["c-nuisance", "nuisance"] {
        let objective = format!("{{ plugin = \"{name}\", habit = \"exits\" }}");
        let data = golden("data/demos.jsonl");
        let run = Source { data: &data, adapter: "\"demonstrations\"", objective: &objective };
        let more = format!("steps = 2\n[plugins]\ndirs = [\"{}\"]", dir.path().display());
        let path = run.write(dir.path(), &more);
        assert_eq!(refused(PLUGIN, &["train", text(&path)]), says(name));
        assert!(!dir.path().join("out/adapter_model.safetensors").exists());
    }
    // While it is loaded it has no name but its file's.
    let at_load = temporary();
    let library = library.file_name().expect("a file");
    c::build_as("c_nuisance", "tests/c/nuisance.c", at_load.path(), &["-DEXIT_AT_LOAD"]);
    let library = at_load.path().canonicalize().expect("there").join(library);
    assert_eq!(refused(PLUGIN, &["plugin", "list", text(&library)]), says(text(&library)));
}

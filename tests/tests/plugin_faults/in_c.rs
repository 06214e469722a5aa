//! Objectives in C: tables that are wrong, and everything that comes back from them.

use super::{CONFIG, NON_FINITE, PLUGIN, Source, UFT, refused, said, temporary, text};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use uft::config::PluginRef;
use uft::plugins::Registry;
use uft_core::check::Case;
use uft_core::sample::Feedback;
use uft_tests::{c, golden, json, lines, succeed};

/// A folder with `c-faulty`, built once.
static FAULTY: LazyLock<PathBuf> = LazyLock::new(|| {
    let dir = std::env::current_exe().expect("a running program has a path").with_extension("in_c");
    std::fs::create_dir_all(&dir).expect("a folder");
    c::build_as("c_faulty", "tests/c/faulty.c", &dir, &[]);
    dir.canonicalize().expect("it is there")
});

fn library() -> PathBuf {
    FAULTY.join("libc_faulty.so")
}

/// A run of `c-faulty`.
fn run(dir: &Path, params: &str, more: &str) -> PathBuf {
    let objective = format!("{{ plugin = \"c-faulty\", {params} }}");
    let data = golden("data/demos.jsonl");
    let run = Source { data: &data, adapter: "\"demonstrations\"", objective: &objective };
    run.write(dir, &format!("{more}\n[plugins]\ndirs = [\"{}\"]", FAULTY.display()))
}

/// What `uft check` says of a run of `c-faulty`.
fn check(code: i32, params: &str) -> String {
    let dir = temporary();
    refused(code, &["check", text(&run(dir.path(), params, ""))])
}

#[test]
fn a_table_that_is_wrong_is_refused_in_one_line() {
    let library = library();
    let bug = "this is a bug of the plugin, report it to its author";
    let refused = |table: u32, what: &str| {
        let mut command = uft_tests::command(UFT, &["plugin", what, text(&library)]);
        command.env("UFT_TABLE", table.to_string());
        command
    };
    for (table, says) in [
        (1, "`c-faulty`: parameter 0: `name` is NULL"),
        (2, "`c-faulty`: parameter 0: `fault`: no parameter has the kind 99"),
        (3, "`c-faulty`: parameter 0: `fault`: its default `no such` is none of its words"),
        (4, "`c-faulty`: it has two parameters `fault`"),
        (5, "`c-faulty`: parameter 1: `scale`: its default must be a number from 2 to 3, not 1"),
        (6, "`c-faulty`: parameter 3: `halve`: its default must be 0 or 1, not 2"),
        (7, "it has a size of 64 bytes, less than the 96 of revision 1; `size` must be its sizeof"),
        (8, "`name` is NULL"),
        (9, "`name` is not UTF-8"),
        (10, "`c-faulty`: `about` is empty"),
        (
            11,
            "`c-faulty`: with UFT_NEEDS_STATE it has to have `save_state` and `load_state`, without it neither",
        ),
        (12, "`c-faulty`: it has 4 parameters, but `params` is NULL"),
        (13, "`c-faulty`: it has 5000 parameters, more than 1024"),
        (14, "`c-faulty`: `create` or `evaluate` is NULL"),
        (15, "it is NULL"),
        (16, "it speaks revision 2 of the interface in C, this host speaks 1"),
        (
            17,
            "its table has a size of 8 bytes, less than the 24 of revision 1; `size` must be its sizeof",
        ),
        (18, "its table's `objectives` is NULL"),
        (19, "its table has 0 objectives, not from 1 to 1024"),
        (20, "its table is NULL"),
    ] {
        let place = if table < 16 { "objective 0 of its table: " } else { "" };
        let remedy = "build it with this host's uft_plugin.h, or report it to its author";
        let expected = format!("plugin {}: {place}{says}; {remedy}", library.display());
        assert_eq!(said(PLUGIN, refused(table, "list")), expected, "{table}");
    }
    // What a plugin in Rust is asked, too.
    let twice =
        format!("plugin {}: it exports the objective `c-faulty` twice; {bug}", library.display());
    assert_eq!(said(PLUGIN, refused(23, "list")), twice);
    for (table, says) in [
        (
            21,
            "it needs something that this host does not know (bits 0x10000000000); use a newer host",
        ),
        (22, "it accepts no feedback; this is a bug of the plugin, report it to its author"),
    ] {
        let output = refused(table, "check").output().expect("it runs");
        let report = String::from_utf8(output.stdout).expect("text");
        assert!(report.contains(&format!("plugin `c-faulty`: {says}")), "{report}");
    }
}

#[test]
fn without_a_fault_it_passes_the_check_and_trains() {
    let library = library();
    let report = succeed(UFT, &["plugin", "check", text(&library)]);
    assert!(!report.contains("FAIL"), "{report}");
    assert!(report.contains("  ok    state: 8 bytes, restored"), "{report}");
    let dir = temporary();
    let path = run(dir.path(), "scale = 0.5", "steps = 3\nbatch = 4\nsave_every = 2");
    succeed(UFT, &["train", text(&path)]);
    let metrics = std::fs::read_to_string(dir.path().join("out/metrics.jsonl")).expect("metrics");
    let steps: Vec<_> = lines(&metrics).iter().map(|s| s["steps"].as_f64()).collect();
    assert_eq!(steps, [Some(1.0), Some(2.0), Some(3.0)]);
    let state = json(&dir.path().join("out/checkpoint-2/uft_state.json"));
    assert_eq!(state["objectives"]["s"], serde_json::json!([2, 0, 0, 0, 0, 0, 0, 0]));
    // It goes on with the state that it had.
    let whole = std::fs::read(dir.path().join("out/adapter_model.safetensors")).expect("it");
    std::fs::remove_dir_all(dir.path().join("out/checkpoint-3")).ok();
    succeed(UFT, &["train", text(&path), "--resume"]);
    let again = std::fs::read_to_string(dir.path().join("out/metrics.jsonl")).expect("metrics");
    assert_eq!(lines(&again)[2]["steps"], 3.0);
    assert_eq!(std::fs::read(dir.path().join("out/adapter_model.safetensors")).expect("it"), whole);
}

#[test]
fn its_parameters_are_read_as_those_of_rust() {
    for (params, says) in [
        ("scale = 0", "parameter `scale` must be a number above 0, not 0"),
        ("scle = 1", "unknown parameter `scle`; did you mean `scale`?"),
        ("halve = 1", "parameter `halve` must be true or false, not 1"),
        ("note = 3", "parameter `note` must be a text, not 3"),
        ("note = \"a\\u0000b\"", "parameter `note` must not have a zero character"),
        ("fault = \"create says why\", note = \"a \u{2713}\"", "`a \u{2713}` is no reason"),
        ("fault = \"create gives NULL\"", "`create` failed without a word"),
    ] {
        assert_eq!(check(CONFIG, params), format!("[[data]] `s`: plugin `c-faulty`: {says}"));
    }
    let line = check(CONFIG, "fault = \"nothing\"");
    assert!(
        line.contains("parameter `fault` must be \"none\" or \"create gives NULL\" or "),
        "{line}"
    );
    // What it is given arrives.
    let mut registry = Registry::new([FAULTY.clone()]);
    let mut loss = |params: &str| {
        let json = format!("{{\"plugin\": \"c-faulty\", {params}}}");
        let plugin: PluginRef = serde_json::from_str(&json).expect("a plugin with parameters");
        let mut object = registry.objective(&plugin).expect("an objective").into_object();
        let step = Case::new().group(&[(Feedback::Score(0.5), &[-1.0, -2.0], &[0.0, 0.0])]);
        step.run(&mut object).expect("numbers").loss
    };
    assert_eq!([loss("\"scale\": 1"), loss("\"scale\": 3, \"halve\": true")], [3.0, 4.5]);
}

#[test]
fn what_comes_back_is_checked() {
    let bug = "this is a bug of the plugin, report it to its author";
    let faults = [
        ("refuses the step", "plugin `c-faulty`: a step of 8 is too small"),
        ("refuses the batch", "plugin `c-faulty`: no token is long enough"),
        ("without a word", "plugin `c-faulty`: `evaluate` failed without a word"),
        ("message not UTF-8", "plugin `c-faulty`: too \u{fffd} small"),
        (
            "unwritten gradient",
            "tokens is unwritten or not finite, though every log-prob is finite",
        ),
    ];
    for (fault, says) in faults {
        let line = check(PLUGIN, &format!("fault = \"{fault}\""));
        assert!(line.contains(says), "{fault}: {line}");
    }
    for (fault, says) in [
        ("endless message", "wrote a message that does not end"),
        ("long message", "wrote a longer message than there is room for"),
        ("unwritten loss", "did not write its loss"),
        ("beyond its gradient", "wrote outside of its gradient of "),
        ("before its gradient", "wrote outside of its gradient of "),
        ("many metrics", "gives 101 metrics, and there is room for 64"),
        ("metric without a name", "gives a metric without a name"),
        ("endless name", "gives a metric whose name does not end"),
        ("name not UTF-8", "gives a metric whose name is not UTF-8"),
        ("unwritten metric", "gives `lost` as NaN over NaN observations"),
        ("beyond its metrics", "wrote outside of its room for 64 metrics"),
    ] {
        let line = check(PLUGIN, &format!("fault = \"{fault}\""));
        assert!(line.contains(&format!("plugin `c-faulty` {says}")), "{fault}: {line}");
        assert!(line.ends_with(bug), "{fault}: {line}");
    }
    let line = check(NON_FINITE, "fault = \"NaN loss\"");
    assert!(
        line.contains("plugin `c-faulty`: the loss is NaN, though its gradient is finite"),
        "{line}"
    );
}

#[test]
fn a_state_that_cannot_be_is_no_part_of_a_checkpoint() {
    for (fault, says) in [
        ("long state", "has a state of 1099511627776 bytes, over 1073741824"),
        ("growing state", "has a state of 8 bytes, then of 9"),
        ("beyond its state", "wrote outside of its state of 8 bytes"),
    ] {
        let dir = temporary();
        let path = run(
            dir.path(),
            &format!("fault = \"{fault}\""),
            "steps = 2\nbatch = 4\nsave_every = 1",
        );
        let line = refused(PLUGIN, &["train", text(&path)]);
        assert!(line.contains(&format!("plugin `c-faulty` {says}")), "{fault}: {line}");
        assert!(!dir.path().join("out/checkpoint-1").exists(), "{fault}");
    }
}

#[test]
fn adapters_are_not_written_in_c() {
    let dir = temporary();
    let run =
        Source { data: &golden("data/demos.jsonl"), adapter: "\"c-faulty\"", objective: "\"sft\"" };
    let path = run.write(dir.path(), &format!("[plugins]\ndirs = [\"{}\"]", FAULTY.display()));
    let line = refused(PLUGIN, &["check", text(&path)]);
    assert!(
        line.ends_with("exports no adapter `c-faulty`; it has: objective `c-faulty`"),
        "{line}"
    );
}

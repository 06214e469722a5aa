//! Everything that can be wrong with a plugin, through a real `dlopen` and the command line: one
//! line on stderr that names the plugin and says what to do, and the documented exit code. The
//! plugins are those that are bundled, and those in tests/plugins.

use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;
use uft::config::PluginRef;
use uft::plugins::Registry;
use uft_tests::{golden, lines, succeed, tensors};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");
const CONFIG: i32 = 2;
const DATA: i32 = 3;
const PLUGIN: i32 = 4;
const NON_FINITE: i32 = 6;

fn temporary() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// Where cargo puts the plugins.
fn deps() -> PathBuf {
    Path::new(UFT).parent().expect("a folder").join("deps").canonicalize().expect("it is there")
}

/// The library of a plugin.
fn library(name: &str) -> PathBuf {
    let (prefix, suffix) = (std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    deps().join(format!("{prefix}{}{suffix}", name.replace('-', "_")))
}

/// Runs the command line, expects the exit code, and gives the single line on stderr without
/// `error: `.
fn refused(code: i32, arguments: &[&str]) -> String {
    let mut command = Command::new(UFT);
    // With RUST_BACKTRACE a panic of a plugin is printed in full before the line.
    command.args(arguments).env("RUST_LOG", "warn").env_remove("RUST_BACKTRACE");
    let output = command.output().expect("the binary under test runs");
    let stderr = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(code), "uft {}: {stderr}", arguments.join(" "));
    let line = stderr.trim_end().strip_prefix("error: ").map(str::to_owned);
    let line = line.unwrap_or_else(|| panic!("not one error line:\n{stderr}"));
    assert!(!line.contains('\n'), "more than one line:\n{stderr}");
    line
}

/// A run with one source on a tiny model; adapter and objective are TOML values.
struct Source<'a> {
    data: &'a Path,
    adapter: &'a str,
    objective: &'a str,
}

impl Source<'_> {
    /// Writes the run's file; `more` goes into `[train]`.
    fn write(&self, dir: &Path, more: &str) -> PathBuf {
        let model = golden("models/qwen2");
        let run = format!(
            "[model]\npath = \"{0}\"\nadapter = \"{0}/adapter\"\n\
             [[data]]\nname = \"s\"\nfiles = [\"{1}\"]\nadapter = {2}\nobjective = {3}\n\
             [train]\noutput = \"{4}/out\"\nshuffle = false\nthreads = 2\nwarmup = 0\n{more}\n",
            model.display(),
            self.data.display(),
            self.adapter,
            self.objective,
            dir.display(),
        );
        let path = dir.join("run.toml");
        std::fs::write(&path, run).expect("the run is written");
        path
    }

    /// What `uft check` says of the run.
    fn check(&self, code: i32) -> String {
        let dir = temporary();
        refused(code, &["check", text(&self.write(dir.path(), ""))])
    }
}

/// What `uft check` says of a run of demonstrations.
fn check(code: i32, adapter: &str, objective: &str) -> String {
    Source { data: &golden("data/demos.jsonl"), adapter, objective }.check(code)
}

/// The `faulty` objective or adapter with a fault.
fn faulty(fault: &str) -> String {
    format!("{{ plugin = \"faulty\", fault = \"{fault}\" }}")
}

#[test]
fn a_plugin_that_is_not_there_is_told_with_the_folders_searched() {
    let dir = temporary();
    let line = refused(PLUGIN, &["plugins", "list", "no-such", "--plugin-dir", text(dir.path())]);
    let own = Path::new(UFT).parent().expect("a folder").display();
    let expected = format!(
        "plugin `no-such`: no libno_such.so in {}, {own}/deps, {own}; build it, add its folder to \
         [plugins] dirs, or give its path",
        dir.path().display()
    );
    assert_eq!(line, expected);

    let line = check(PLUGIN, "\"demonstrations\"", "\"no-such\"");
    assert!(line.starts_with("[[data]] `s`: plugin `no-such`: no libno_such.so in "), "{line}");

    let path = dir.path().join("libmine.so");
    assert_eq!(
        refused(PLUGIN, &["plugins", "list", text(&path)]),
        format!("plugin `{}`: no such file; build the plugin or correct the path", path.display())
    );
}

#[test]
fn a_file_that_is_no_plugin_is_refused() {
    let dir = temporary();
    let path = dir.path().join("libtext.so");
    std::fs::write(&path, "a text of more than sixty-four bytes ".repeat(4)).expect("written");
    assert_eq!(
        refused(PLUGIN, &["plugins", "list", text(&path)]),
        format!(
            "plugin {}: it is not a shared library (ELF, 64 bit); give the library that cargo \
             built for the plugin",
            path.display()
        )
    );
    assert_eq!(
        refused(PLUGIN, &["plugins", "list", "no-plugin"]),
        format!(
            "plugin {}: it is a shared library, but not a uft plugin; a plugin exports its \
             objectives and adapters with `uft_core::plugin!`",
            library("no-plugin").display()
        )
    );
}

#[test]
fn a_library_that_is_cut_short_does_not_kill_the_process() {
    let whole = std::fs::read(library("sft")).expect("the library");
    let dir = temporary();
    let path = dir.path().join("libsft.so");
    let sizes = [64, 4096, 100_000, whole.len() / 4, whole.len() / 2, whole.len() - 1];
    for size in sizes {
        std::fs::write(&path, &whole[..size]).expect("written");
        assert_eq!(
            refused(PLUGIN, &["plugins", "list", text(&path)]),
            format!(
                "plugin {}: the file is cut short ({size} bytes); build or copy it again",
                path.display()
            )
        );
    }
    for size in [0, 63] {
        std::fs::write(&path, &whole[..size]).expect("written");
        let line = refused(PLUGIN, &["plugins", "list", text(&path)]);
        assert!(line.contains("it is not a shared library"), "{size} bytes: {line}");
    }
    std::fs::write(&path, &whole).expect("written");
    assert!(succeed(UFT, &["plugins", "list", text(&path)]).starts_with("sft (objective"));
}

#[test]
fn a_library_for_another_machine_is_refused() {
    let whole = std::fs::read(library("sft")).expect("the library");
    let dir = temporary();
    let path = dir.path().join("libsft.so");
    let mut other = whole.clone();
    // `e_machine`: 8 is MIPS.
    other[18..20].copy_from_slice(&[8, 0]);
    std::fs::write(&path, other).expect("written");
    assert_eq!(
        refused(PLUGIN, &["plugins", "list", text(&path)]),
        format!(
            "plugin {}: it is built for another processor (ELF machine 8); build it for this one",
            path.display()
        )
    );
    // A library that it is linked to is not there.
    let name = whole.windows(9).position(|w| w == b"libc.so.6").expect("linked to libc");
    let mut lost = whole;
    lost[name..name + 9].copy_from_slice(b"no-such.6");
    std::fs::write(&path, lost).expect("written");
    assert_eq!(
        refused(PLUGIN, &["plugins", "list", text(&path)]),
        format!(
            "plugin {}: the loader refuses it (no-such.6: cannot open shared object file: No such \
             file or directory); build it on this machine",
            path.display()
        )
    );
}

#[test]
fn another_abi_revision_and_another_layout_are_refused() {
    assert_eq!(
        refused(PLUGIN, &["plugins", "list", "other-abi"]),
        format!(
            "plugin {}: it speaks ABI revision 99, this host speaks 1; rebuild it against this \
             uft-core",
            library("other-abi").display()
        )
    );
    assert_eq!(
        refused(PLUGIN, &["plugins", "list", "other-layout"]),
        format!(
            "plugin {}: its types differ from this host's uft-core (Entry.about: mismatched type, \
             expected RString, found u64); rebuild it against this uft-core",
            library("other-layout").display()
        )
    );
}

#[test]
fn a_name_that_is_taken_is_refused() {
    let (sft, namesakes) = (library("sft"), library("namesakes"));
    assert_eq!(
        refused(PLUGIN, &["plugins", "list", "sft", "namesakes"]),
        format!(
            "plugin {}: the objective `sft` is exported by {} too; load only one of them",
            namesakes.display(),
            sft.display()
        )
    );
    assert_eq!(
        refused(PLUGIN, &["plugins", "list", "namesakes"]),
        format!(
            "plugin {}: it exports the objective `sft` twice; this is a bug of the plugin, report \
             it to its author",
            namesakes.display()
        )
    );
    // The same library under two names is one.
    let listed = succeed(UFT, &["plugins", "list", "sft", text(&sft)]);
    assert_eq!(listed.matches("(objective").count(), 1, "{listed}");
}

#[test]
fn what_a_library_does_not_export_is_told_with_what_it_does() {
    assert_eq!(
        check(PLUGIN, "\"demonstrations\"", "\"sound\""),
        format!(
            "[[data]] `s`: plugin {} exports no objective `sound`; it has: objective `settle`, \
             objective `listwise`, adapter `lines`, adapter `stars`",
            library("sound").display()
        )
    );
    assert_eq!(
        check(PLUGIN, "\"sft\"", "\"sft\""),
        format!(
            "[[data]] `s`: plugin {} exports no adapter `sft`; it has: objective `sft`",
            library("sft").display()
        )
    );
}

#[test]
fn wrong_parameters_are_refused() {
    for (adapter, objective, says) in [
        (
            "\"demonstrations\"",
            "{ plugin = \"uft-sft\", bta = 0.5 }",
            "plugin `uft-sft`: unknown parameter `bta`; did you mean `beta`?",
        ),
        (
            "\"demonstrations\"",
            "{ plugin = \"sft\", temperature = 2 }",
            "plugin `sft`: unknown parameter `temperature`; known: per",
        ),
        (
            "\"demonstrations\"",
            "{ plugin = \"listwise\", beta = 1 }",
            "plugin `listwise`: unknown parameter `beta`; it has none",
        ),
        (
            "\"demonstrations\"",
            "{ plugin = \"uft-sft\", beta = 0 }",
            "plugin `uft-sft`: parameter `beta` must be a number above 0, not 0",
        ),
        (
            "\"demonstrations\"",
            "{ plugin = \"uft-sft\", loss = \"hinge\" }",
            "plugin `uft-sft`: parameter `loss` must be \"mse\" or \"bce\", not \"hinge\"",
        ),
        (
            "{ plugin = \"scores\", rnge = [0, 4] }",
            "\"una-score\"",
            "plugin `scores`: unknown parameter `rnge`; did you mean `range`?",
        ),
        (
            "{ plugin = \"scores\", range = [4, 0] }",
            "\"una-score\"",
            "plugin `scores`: parameter `range` must be two numbers [low, high] in rising order, \
             not [4,0]",
        ),
    ] {
        let dir = temporary();
        let source = Source { data: &golden("data/demos.jsonl"), adapter, objective };
        let path = source.write(dir.path(), "[plugins]\nload = [\"sound\"]");
        let line = refused(CONFIG, &["check", text(&path)]);
        assert_eq!(line, format!("[[data]] `s`: {says}"));
    }
}

#[test]
fn a_panic_in_any_call_is_one_line_with_its_place() {
    let bug = "this is a bug of the plugin, report it to its author";
    for call in ["new", "needs", "begin_step", "evaluate"] {
        let line = check(PLUGIN, "\"demonstrations\"", &faulty(&format!("panic in {call}")));
        let panicked = "plugin `faulty` panicked at tests/plugins/faulty/src/lib.rs:";
        assert!(line.contains(panicked) && line.ends_with(bug), "{line}");
    }
    let line = check(PLUGIN, "\"demonstrations\"", &faulty("panic in evaluate"));
    assert!(line.contains(": on purpose; "), "{line}");
    for call in ["new", "offers", "adapt"] {
        let line = check(PLUGIN, &faulty(&format!("panic in {call}")), "\"una-score\"");
        assert!(line.starts_with("[[data]] `s`: "), "{line}");
        assert!(line.contains("plugin `faulty` panicked at "), "{line}");
        assert!(line.ends_with(&format!(": on purpose; {bug}")), "{line}");
    }
}

#[test]
fn a_panic_around_saved_state_is_a_fault() {
    let mut registry = Registry::new([deps()]);
    let mut object = |fault: &str| {
        let json = format!("{{\"plugin\": \"faulty\", \"fault\": \"{fault}\"}}");
        let plugin: PluginRef = serde_json::from_str(&json).expect("a plugin with parameters");
        registry.objective(&plugin).expect("an objective").into_object()
    };
    let saved = object("panic in save_state").save_state().into_result();
    let loaded = object("panic in load_state").load_state((&[] as &[u8]).into()).into_result();
    for fault in [saved.map(drop).unwrap_err(), loaded.unwrap_err()] {
        assert!(fault.message.starts_with("`faulty` panicked at "), "{fault}");
        assert!(fault.message.ends_with(": on purpose"), "{fault}");
    }
}

#[test]
fn what_an_objective_gives_back_is_checked() {
    let rows = "source `s`, rows";
    for (fault, code, says) in [
        ("refuses the step", PLUGIN, "plugin `faulty`: the step is too small"),
        ("refuses the batch", PLUGIN, "plugin `faulty`: no token is long enough"),
        ("unwritten gradient", PLUGIN, "tokens is unwritten or not finite, though every log-prob"),
        ("NaN gradient", PLUGIN, "tokens is unwritten or not finite, though every log-prob"),
        ("infinite loss", NON_FINITE, "plugin `faulty`: the loss is inf"),
        (
            "unknown need",
            PLUGIN,
            "plugin `faulty`: it needs something that this host does not know (bits \
             0x10000000000); use a newer host",
        ),
        ("accepts nothing", PLUGIN, "plugin `faulty`: it accepts no feedback"),
    ] {
        let line = check(code, "\"demonstrations\"", &faulty(fault));
        assert!(line.contains(says), "{fault}: {line}");
        let made = ["unknown need", "accepts nothing"].contains(&fault);
        assert_eq!(line.starts_with("[[data]] `s`: "), made, "{line}");
        assert_eq!(line.starts_with(rows), !made && fault != "refuses the step", "{line}");
    }
}

#[test]
fn training_stops_before_a_bad_gradient_reaches_the_adapter() {
    let dir = temporary();
    let data = golden("data/demos.jsonl");
    let objective = faulty("NaN gradient");
    let run = Source { data: &data, adapter: "\"demonstrations\"", objective: &objective };
    let line = refused(PLUGIN, &["train", text(&run.write(dir.path(), "batch = 1"))]);
    let start = format!("source `s`, rows {}:1: plugin `faulty`: the gradient of ", data.display());
    assert!(line.starts_with(&start), "{line}");
    assert!(!dir.path().join("out/adapter_model.safetensors").exists());
}

#[test]
fn what_an_adapter_gives_back_is_checked() {
    let data = golden("data/demos.jsonl");
    let bug = "this is a bug of the plugin, report it to its author";
    for (fault, says) in [
        ("no response", "a sample without a response"),
        ("score of 7", "a score of 7, outside of 0 to 1"),
        ("another kind", "a demonstration response, which it does not offer"),
    ] {
        let line = check(PLUGIN, &faulty(fault), "\"una-score\"");
        let place = data.display();
        assert_eq!(line, format!("[[data]] `s`: {place}:1: plugin `faulty` gave {says}; {bug}"));
    }
}

#[test]
fn an_adapter_and_an_objective_that_do_not_fit_are_refused() {
    assert_eq!(
        check(CONFIG, "\"demonstrations\"", "\"una-pairwise\""),
        "[[data]] `s`: adapter `demonstrations` gives demonstration, but objective `una-pairwise` \
         takes chosen, rejected; choose another of the two"
    );
    assert_eq!(
        check(CONFIG, "\"labels\"", "\"una-score\""),
        "[[data]] `s`: adapter `labels` gives binary, but objective `una-score` takes score; \
         choose another of the two"
    );
    assert_eq!(
        check(CONFIG, "\"demonstrations\"", &faulty("needs pairs")),
        "[[data]] `s`: objective `faulty` needs pairs, but adapter `demonstrations` gives \
         demonstration; an adapter such as `preferences` gives pairs"
    );
}

#[test]
fn data_that_lack_what_an_objective_needs_are_refused() {
    let dir = temporary();
    let first = |file: &str| {
        let all = std::fs::read_to_string(golden(file)).expect("data");
        let path = dir.path().join("one.jsonl");
        std::fs::write(&path, all.lines().next().expect("a row")).expect("written");
        path
    };
    let data = first("data/labels.jsonl");
    let line = Source { data: &data, adapter: "\"labels\"", objective: "\"kto\"" }.check(DATA);
    assert_eq!(
        line,
        "[[data]] `s`: objective `kto` pairs prompts with completions of other rows, and there is \
         only one of the rows"
    );
    let data = golden("data/scores.jsonl");
    let objective = "{ plugin = \"listwise\" }";
    let run = Source { data: &data, adapter: "\"scores\"", objective };
    let path = run.write(dir.path(), "[plugins]\nload = [\"sound\"]");
    assert_eq!(
        refused(DATA, &["check", text(&path)]),
        format!(
            "[[data]] `s`: {}:1: objective `listwise` needs at least two responses to every prompt",
            data.display()
        )
    );
}

#[test]
fn the_bundled_plugins_are_listed_with_their_parameters() {
    let listed = succeed(UFT, &["plugins", "list"]);
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
    assert_eq!(listed.matches("\n  ").count(), listed.matches("\n    ").count() + 10);
}

#[test]
fn the_check_passes_sound_objectives_and_finds_a_wrong_gradient() {
    let report = succeed(UFT, &["plugins", "check"]);
    assert_eq!(report.matches("  ok    gradient: ").count(), 6, "{report}");
    assert!(!report.contains("FAIL"), "{report}");
    let report = succeed(UFT, &["plugins", "check", "sound"]);
    assert_eq!(report.matches("  ok    gradient: ").count(), 2, "{report}");
    assert!(report.contains("  ok    state: 8 bytes, restored"), "{report}");

    let output = uft_tests::uft(UFT, &["plugins", "check", "sft", "faulty"]);
    assert_eq!(output.status.code(), Some(PLUGIN));
    let report = String::from_utf8(output.stdout).expect("text");
    assert!(report.contains("\n  FAIL  gradient: random step 1, response 0: "), "{report}");
    assert_eq!(report.matches("FAIL").count(), 1, "{report}");
    assert_eq!(
        String::from_utf8_lossy(&output.stderr).trim_end(),
        "error: the check failed for: faulty"
    );
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

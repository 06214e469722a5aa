//! What a run says of a plugin: parameters, panics, what comes back from it, data that do not fit.

use super::{
    CONFIG, DATA, NON_FINITE, PLUGIN, Source, check, deps, faulty, library, refused, temporary,
    text,
};
use uft::config::PluginRef;
use uft::plugins::Registry;
use uft_tests::golden;

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
        (
            "infinite loss",
            NON_FINITE,
            "plugin `faulty`: the loss is inf, though its gradient is finite; check its \
             parameters, and the plugin itself with `uft plugin check faulty`",
        ),
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
         only one of the rows; add rows or choose another objective"
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

//! `uft plugin new`: what it makes builds, passes its own tests and the check, and trains, outside of
//! the workspace and without a change.

use std::fs;
use uft_tests::outside::Outside;
use uft_tests::{fail, lines, root};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");

/// Makes a plugin, follows what the command says to do next, and gives what all of it printed.
fn follow(outside: &Outside, name: &str, flags: &str) -> String {
    let said = outside.shell(&format!("uft plugin new {name} {flags}"));
    let next: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("  ")).collect();
    assert_eq!(next.len(), if flags.contains("--c") { 4 } else { 5 }, "{said}");
    let all = outside.shell(&next.join("\n"));
    let folder = outside.folder.join(name);
    let metrics = fs::read_to_string(folder.join("out/first/metrics.jsonl")).expect("metrics");
    let steps = lines(&metrics);
    assert_eq!(steps.len(), 20, "{metrics}");
    let loss = |step: usize| steps[step]["loss"].as_f64().expect("a number");
    assert!(loss(19) < loss(0), "{metrics}");
    assert!(folder.join("out/first/adapter_model.safetensors").is_file());
    let own = format!("{}.c", name.replace('-', "_"));
    let files = match flags.contains("--c") {
        true => [own.as_str(), "uft_plugin.h", "run.toml", "example.jsonl"],
        false => ["Cargo.toml", "src/lib.rs", "run.toml", "example.jsonl"],
    };
    for file in files {
        let text = fs::read_to_string(folder.join(file)).expect("written");
        for placeholder in ["my-plugin", "my_plugin", "MyPlugin"] {
            assert!(!text.contains(placeholder), "{file}: {text}");
        }
        assert!(!text.contains("path/of"), "{file}: {text}");
    }
    all
}

#[test]
fn every_kind_of_plugin_works_as_it_is_made() {
    let outside = Outside::new("scaffold", UFT);
    let said = follow(&outside, "mean-squares", "--objective");
    assert!(said.contains("2 passed") && said.contains("  ok    gradient: "), "{said}");
    let said = follow(&outside, "focal", "--objective --token-level");
    assert!(said.contains("2 passed") && said.contains("  ok    gradient: "), "{said}");
    let said = follow(&outside, "tickets", "--adapter");
    assert!(said.contains("2 passed") && said.contains("  ok    odd records: "), "{said}");
    // They are written as rustfmt writes them where nothing is set.
    for name in ["mean-squares", "focal", "tickets"] {
        outside.shell(&format!("cd {name}; cargo fmt --check"));
    }
}

#[test]
fn an_objective_in_c_works_as_it_is_made() {
    let outside = Outside::new("scaffold-c", UFT);
    let said = follow(&outside, "squares-of-c", "--objective --c");
    assert!(said.contains("  ok    gradient: ") && !said.contains("FAIL"), "{said}");
    let made = outside.folder.join("squares-of-c");
    // A strict compiler has nothing to say, and git ignores what was built.
    outside
        .shell("cd squares-of-c; cc -std=c99 -Wall -Wextra -Wpedantic -Werror -fsyntax-only *.c");
    let header = fs::read_to_string(made.join("uft_plugin.h")).expect("written");
    assert_eq!(header, fs::read_to_string(root().join("core/include/uft_plugin.h")).expect("it"));
    let ignored = fs::read_to_string(made.join(".gitignore")).expect("written");
    assert_eq!(ignored, "/libsquares_of_c.so\n/out\n");
    assert!(made.join("libsquares_of_c.so").is_file());
}

#[test]
fn what_cannot_be_made_is_refused() {
    let outside = Outside::new("refused", UFT);
    let dir = outside.folder.to_str().expect("text");
    let new = |more: &[&str]| fail(UFT, 2, &[&["plugin", "new", "--dir", dir], more].concat());
    fs::create_dir(outside.folder.join("there")).expect("a folder");
    assert!(new(&["there", "--adapter"]).contains("there is there already; choose another name"));
    assert!(new(&["Own", "--objective"]).contains("cannot be called `Own`: lower-case letters"));
    assert!(new(&["own", "--objective", "--core", dir]).contains("there is no uft-core in it"));
    assert!(new(&["own"]).contains("--objective|--adapter"));
    assert!(new(&["own", "--objective", "--adapter"]).contains("cannot be used with"));
    assert!(new(&["own", "--adapter", "--token-level"]).contains("--objective"));
    assert!(new(&["own", "--adapter", "--c"]).contains("cannot be used with"));
    assert!(new(&["own", "--objective", "--c", "--token-level"]).contains("cannot be used with"));
    assert!(!outside.folder.join("own").exists());
    // A version that is published needs a model: there is none beside it.
    let published = ["own", "--objective", "--core", "0.1"];
    assert!(new(&published).contains("give a model's folder with --model"));
    let model = root().join("examples/base").display().to_string();
    let arguments =
        ["plugin", "new", "--dir", dir, "own", "--objective", "--core", "0.1", "--model", &model];
    uft_tests::succeed(UFT, &arguments);
    let manifest = fs::read_to_string(outside.folder.join("own/Cargo.toml")).expect("written");
    assert!(manifest.contains("\nuft-core = \"0.1\"\n"), "{manifest}");
}

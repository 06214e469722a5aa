//! docs/plugins.md, word for word: its files are written into a folder outside of the workspace and
//! its commands are run there, against the host that is there already.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use uft_tests::{lines, root};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");

/// A fenced block of the page, with the file name that stands before it as "`name`:".
struct Block {
    language: String,
    file: Option<String>,
    text: String,
}

fn blocks(page: &str) -> Vec<Block> {
    let (mut blocks, mut before) = (Vec::<Block>::new(), "");
    let mut inside = false;
    for line in page.lines() {
        match (line.strip_prefix("```"), inside) {
            (Some(language), false) => {
                let file = before.strip_suffix("`:").and_then(|b| b.rsplit_once('`')).map(|b| b.1);
                let (language, file) = (language.to_owned(), file.map(str::to_owned));
                blocks.push(Block { language, file, text: String::new() });
                inside = true;
            }
            (Some(_), true) => inside = false,
            (None, true) => {
                let block = blocks.last_mut().expect("inside of one");
                block.text.push_str(line);
                block.text.push('\n');
            }
            (None, false) if !line.is_empty() => before = line,
            (None, false) => {}
        }
    }
    blocks
}

/// The reader's folder, outside of the workspace, with the repository as `uft`. It stays from run to
/// run, as does what is built in `target/outside`, so that only the first one builds uft-core.
fn folder() -> PathBuf {
    let mut hasher = DefaultHasher::new();
    root().hash(&mut hasher);
    let folder = std::env::temp_dir().join(format!("uft-outside-{:016x}", hasher.finish()));
    fs::create_dir_all(&folder).expect("a temporary directory");
    link(&root(), &folder.join("uft"));
    folder
}

fn link(to: &Path, at: &Path) {
    if fs::read_link(at).ok().as_deref() != Some(to) {
        symlink(to, at).unwrap_or_else(|e| panic!("{}: {e}", at.display()));
    }
}

/// Writes a file unless it is as it should be: cargo goes by its time.
fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder is made");
    if fs::read_to_string(path).ok().as_deref() != Some(text) {
        fs::write(path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}

/// Runs a command line of the page and gives its stdout.
fn run(folder: &Path, line: &str) -> String {
    let mut words = line.split_whitespace();
    let mut command = match words.next() {
        Some("cargo") => {
            let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or(env!("CARGO").into()));
            cargo.env("CARGO_TARGET_DIR", root().join("target/outside"));
            cargo.env("CARGO_INCREMENTAL", "0");
            cargo.args(words).arg("--offline");
            cargo
        }
        Some("uft") => {
            let mut uft = uft_tests::command(UFT, &words.collect::<Vec<_>>());
            if line.starts_with("uft train ") {
                uft.args(["--set", "train.steps=2"]);
            }
            uft
        }
        _ => panic!("not a command of this page: {line}"),
    };
    let output = command.current_dir(folder).env("NO_COLOR", "1").output();
    let output = output.unwrap_or_else(|e| panic!("{line}: {e}"));
    let (out, err) = (&output.stdout, String::from_utf8_lossy(&output.stderr));
    let out = String::from_utf8_lossy(out).into_owned();
    assert!(output.status.success(), "{line}\n{out}\n{err}");
    out
}

#[test]
fn the_page_on_plugins_is_true() {
    let page = fs::read_to_string(root().join("docs/plugins.md")).expect("the page");
    let folder = folder();
    assert!(!folder.starts_with(root()), "{} must be outside", folder.display());
    let (mut files, mut commands) = (Vec::new(), Vec::new());
    for block in blocks(&page) {
        match (block.language.as_str(), block.file) {
            ("sh", _) => commands.extend(block.text.lines().map(str::to_owned)),
            (_, Some(file)) => {
                write(&folder.join(&file), &block.text);
                files.push(file);
            }
            _ => {}
        }
    }
    for plugin in ["ipo", "tickets"] {
        for file in ["Cargo.toml", "src/lib.rs"] {
            assert!(files.contains(&format!("{plugin}/{file}")), "{plugin}/{file} in {files:?}");
        }
        let source = fs::read_to_string(folder.join(plugin).join("src/lib.rs")).expect("written");
        let own = source.split("#[cfg(test)]").next().expect("a part").lines();
        assert!(own.filter(|line| !line.is_empty()).count() <= 45, "{plugin}: about 40 lines");
        // The versions that are on this machine, and the page's `target` where cargo is told to build.
        let lock = fs::read_to_string(root().join("Cargo.lock")).expect("the lock file");
        fs::write(folder.join(plugin).join("Cargo.lock"), lock).expect("written");
        link(&root().join("target/outside"), &folder.join(plugin).join("target"));
        let _ = fs::remove_dir_all(folder.join("out").join(plugin));
    }

    let said: Vec<(&str, String)> =
        commands.iter().map(|line| (line.as_str(), run(&folder, line))).collect();
    let of = |start: &str| -> &str {
        let found = said.iter().find(|(line, _)| line.starts_with(start));
        &found.unwrap_or_else(|| panic!("the page has no `{start}`")).1
    };
    assert!(of("cargo test --manifest-path ipo").contains("2 passed"));
    assert!(of("cargo test --manifest-path tickets").contains("1 passed"));
    assert!(of("uft plugins check ipo").contains("  ok    gradient: "));
    assert!(of("uft plugins list tickets").contains("    most = 5.0  # a number from 2 to 100: "));
    for (plugin, source) in [("ipo", "pairs"), ("tickets", "tickets")] {
        let out = folder.join("out").join(plugin);
        let metrics = fs::read_to_string(out.join("metrics.jsonl")).expect("metrics");
        let steps = lines(&metrics);
        assert_eq!(steps.len(), 2, "{metrics}");
        assert!(steps[1]["grad_norm"].as_f64().expect("a number") > 0.0, "{metrics}");
        assert!(steps[1][format!("{source}/loss")].is_f64(), "{metrics}");
        assert!(out.join("adapter_model.safetensors").is_file());
    }
    // With a new adapter every log-ratio is 0, so IPO starts at (1 / (2 beta))^2.
    let metrics = fs::read_to_string(folder.join("out/ipo/metrics.jsonl")).expect("metrics");
    assert_eq!(lines(&metrics)[0]["loss"], 25.0);
}

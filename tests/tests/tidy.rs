//! What the architecture promises and a machine can check.

use std::path::{Path, PathBuf};
use uft_tests::root;

/// Longest source file; most are far below.
const LONGEST: usize = 500;

fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("a folder").map(|e| e.expect("an entry").path()) {
        if entry.is_dir() && !entry.ends_with("target") {
            sources(&entry, out);
        } else if entry.extension().is_some_and(|e| e == "rs" || e == "py") {
            out.push(entry);
        }
    }
}

fn all() -> Vec<(String, String)> {
    let mut files = Vec::new();
    for folder in ["core", "plugins", "kernels", "host", "tests", "examples"] {
        sources(&root().join(folder), &mut files);
    }
    let named = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).expect("a source file is text");
        let name = path.strip_prefix(root()).expect("below the root").display().to_string();
        (name, text)
    };
    files.into_iter().map(named).collect()
}

#[test]
fn no_file_outgrows_its_name() {
    let long: Vec<_> = all()
        .into_iter()
        .map(|(name, text)| (name, text.lines().count()))
        .filter(|f| f.1 > LONGEST)
        .collect();
    assert!(long.is_empty(), "over {LONGEST} lines: {long:?}");
}

#[test]
fn abi_stable_stays_in_core() {
    for (name, text) in all() {
        let allowed = name.starts_with("core/") || name.starts_with("tests/");
        let uses =
            text.lines().any(|l| !l.trim_start().starts_with("//") && l.contains("abi_stable"));
        assert!(allowed || !uses, "{name} uses abi_stable");
    }
}

#[test]
fn arrows_point_where_the_map_says() {
    for (name, text) in all() {
        let imports = |what: &str| {
            text.lines().any(|l| !l.trim_start().starts_with("//") && l.contains(what))
        };
        if name.starts_with("kernels/src") || name.starts_with("core/src") {
            let other = if name.starts_with("core") { "uft_kernels" } else { "uft_core" };
            assert!(!imports(other), "{name} imports {other}");
        }
        let may_train = name.starts_with("host/src/train") || name.starts_with("host/src/cli");
        if name.starts_with("host/src") && !may_train {
            assert!(!imports("crate::train"), "{name} imports the training loop");
        }
        if name.starts_with("plugins/") {
            assert!(!imports("unsafe"), "{name} has unsafe code");
        }
    }
}

#[test]
fn nothing_is_left_unfinished() {
    for (name, text) in all() {
        // This file names the marks.
        if name != "tests/tests/tidy.rs" {
            // What CI cannot run for want of a GPU is the only thing that it may leave out.
            let text = text.replace("#[ignore = \"needs a GPU\"]", "");
            for mark in ["todo!(", "unimplemented!(", "FIXME", "#[ignore"] {
                assert!(!text.contains(mark), "{name} has {mark}");
            }
        }
    }
}

//! Everything that can be wrong with a plugin, through a real `dlopen` and the command line: one
//! line on stderr that names the plugin and says what to do, and the documented exit code. The
//! plugins are those that are bundled, those in tests/plugins, and those in C in tests/c.

mod in_c;
mod libraries;
mod nuisances;
mod runs;
mod sound;

use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;
use uft_tests::golden;

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
    said(code, uft_tests::command(UFT, arguments))
}

/// [`refused`] of a command that is about to run.
fn said(code: i32, mut command: Command) -> String {
    let output = command.output().expect("the binary under test runs");
    let stderr = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(code), "{command:?}: {stderr}");
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

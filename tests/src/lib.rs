//! What the tests of this package share: running the command line, and the golden references.

pub mod beside;
pub mod c;
pub mod fuzz;
pub mod mixed;
pub mod outside;
pub mod run;
pub mod scripts;
pub mod unrounded;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the repository").to_owned()
}

/// A path below `tests/golden`.
pub fn golden(path: &str) -> PathBuf {
    root().join("tests/golden").join(path)
}

/// The command line, to be run in the repository's root, with a cache directory of this test program
/// that is empty when it starts.
pub fn command(binary: &str, arguments: &[&str]) -> Command {
    static CACHE: LazyLock<PathBuf> = LazyLock::new(|| {
        let program = std::env::current_exe().expect("a running program has a path");
        let dir = program.with_extension("cache");
        let _ = std::fs::remove_dir_all(&dir);
        dir
    });
    let mut command = Command::new(binary);
    command.args(arguments).current_dir(root()).env("RUST_LOG", "warn").env("NO_COLOR", "1");
    command.env_remove("RUST_BACKTRACE").env("XDG_CACHE_HOME", &*CACHE);
    command
}

/// Runs the command line.
pub fn uft(binary: &str, arguments: &[&str]) -> Output {
    command(binary, arguments).output().expect("the binary under test runs")
}

/// Runs it and gives stdout, or panics with stderr.
pub fn succeed(binary: &str, arguments: &[&str]) -> String {
    succeeded(command(binary, arguments))
}

/// As [`succeed`], of a command that is ready to run.
pub fn succeeded(mut command: Command) -> String {
    let output = command.output().expect("the binary under test runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
    String::from_utf8(output.stdout).expect("stdout is text")
}

/// Runs it, expects the exit code, and gives stderr.
pub fn fail(binary: &str, code: i32, arguments: &[&str]) -> String {
    failed(code, command(binary, arguments))
}

/// As [`fail`], of a command that is ready to run.
pub fn failed(code: i32, mut command: Command) -> String {
    let output = command.output().expect("the binary under test runs");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{command:?}: {stderr}");
    stderr
}

/// A JSON file.
pub fn json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The objects of JSON Lines.
pub fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("a line is a JSON object")).collect()
}

/// The numbers of a JSON list.
pub fn numbers(list: &Value) -> Vec<f64> {
    list.as_array().expect("a list").iter().map(|n| n.as_f64().expect("a number")).collect()
}

/// `f32` tensors of a safetensors file, sorted by name.
pub fn tensors(path: &Path) -> Vec<(String, Vec<f32>)> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let floats = |data: &[u8]| {
        data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    };
    let mut named: Vec<_> =
        file.tensors().into_iter().map(|(name, view)| (name, floats(view.data()))).collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    named
}

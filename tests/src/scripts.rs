//! Running the scripts of tests/gpu.

use crate::root;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Python on a script of tests/gpu, which leaves nothing behind there.
pub fn python(script: &Path) -> Command {
    let mut command = Command::new("python3");
    command.arg(script).env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

/// Where a script is.
pub fn here(script: &str) -> PathBuf {
    root().join("tests/gpu").join(script)
}

/// What a program printed that must end well.
///
/// # Panics
/// It did not.
#[track_caller]
pub fn stdout(output: Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout).expect("stdout is text")
}

/// What a snippet prints that runs with tests/gpu to import from.
pub fn snippet(text: &str) -> String {
    let mut command = Command::new("python3");
    command.args(["-c", text]).env("PYTHONPATH", here("")).env("PYTHONDONTWRITEBYTECODE", "1");
    stdout(command.output().expect("python3 runs"))
}

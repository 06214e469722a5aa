//! Plugins in C, built with the system's compiler.

use crate::root;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds a library from a C file of the repository and gives its path, `lib<file>.so` in `dir`. What a
/// strict compiler would remark is an error.
///
/// # Panics
/// If the compiler is not there or refuses the file.
pub fn build(source: &str, dir: &Path, flags: &[&str]) -> PathBuf {
    let name = Path::new(source).file_stem().expect("a file").to_str().expect("text");
    build_as(name, source, dir, flags)
}

/// [`build`] with another name for the library.
///
/// # Panics
/// As [`build`].
pub fn build_as(name: &str, source: &str, dir: &Path, flags: &[&str]) -> PathBuf {
    let (prefix, suffix) = (std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let library = dir.join(format!("{prefix}{name}{suffix}"));
    let mut cc = Command::new("cc");
    cc.args(["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O2", "-shared", "-fPIC"]);
    cc.arg("-I").arg(root().join("core/include")).args(flags);
    cc.arg("-o").arg(&library).arg(root().join(source)).args(["-lm", "-pthread"]);
    let output = cc.output().expect("a C compiler, `cc`");
    assert!(output.status.success(), "{source}: {}", String::from_utf8_lossy(&output.stderr));
    library
}

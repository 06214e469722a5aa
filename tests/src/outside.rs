//! A reader's folder outside of the workspace, and the commands that are typed there.

use crate::{command, root};
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A folder outside of the workspace where `uft` is the repository and the program under test is on
/// the path.
pub struct Outside {
    pub folder: PathBuf,
    programs: PathBuf,
}

impl Outside {
    /// An empty folder for one test, named after it. What cargo builds in it is kept in
    /// `target/outside`, so that only the first test builds uft-core.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn new(test: &str, binary: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        root().hash(&mut hasher);
        let parent = std::env::temp_dir().join(format!("uft-outside-{:016x}", hasher.finish()));
        let (folder, programs) = (parent.join(test), parent.join(format!("{test}.programs")));
        for new in [&folder, &programs] {
            let _ = fs::remove_dir_all(new);
            fs::create_dir_all(new).unwrap_or_else(|e| panic!("{}: {e}", new.display()));
        }
        assert!(!folder.starts_with(root()), "{} must be outside", folder.display());
        symlink(root(), folder.join("uft")).expect("the repository");
        symlink(binary, programs.join("uft")).expect("the program under test");
        Self { folder, programs }
    }

    /// Writes a file of the folder.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write(&self, file: &str, text: &str) {
        let path = self.folder.join(file);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder is made");
        fs::write(&path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }

    /// Runs lines of a shell in the folder and gives what they print.
    ///
    /// # Panics
    /// If one of them fails.
    pub fn shell(&self, lines: &str) -> String {
        let output = self.command(lines).output().expect("a shell");
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{lines}\n{out}\n{err}");
        out
    }

    /// A shell that is about to run some lines in the folder.
    pub fn command(&self, lines: &str) -> Command {
        let cargo = PathBuf::from(std::env::var_os("CARGO").unwrap_or(env!("CARGO").into()));
        let cargo = cargo.parent().map(Path::to_owned).unwrap_or_default();
        let before = std::env::var_os("PATH").unwrap_or_default();
        let own = [self.programs.clone(), cargo].into_iter();
        let path = std::env::join_paths(own.chain(std::env::split_paths(&before)));
        let mut shell = command("bash", &["-euo", "pipefail", "-c", lines]);
        shell.current_dir(&self.folder).env("PATH", path.expect("folders without `:`"));
        // Everything but the libraries themselves is shared by all crates outside.
        shell.env("CARGO_BUILD_BUILD_DIR", root().join("target/outside"));
        shell.env_remove("CARGO_TARGET_DIR");
        shell.env("CARGO_NET_OFFLINE", "true").env("CARGO_INCREMENTAL", "0");
        shell
    }
}

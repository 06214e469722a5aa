//! Fuzzing: what the program reads from outside must never make it panic, hang, or allocate out of
//! proportion. Here is one function for each kind of input; libFuzzer drives them
//! (`tests/fuzz/`), and `tests/fuzz.rs` drives the same ones with a few thousand seeded mutations.

pub mod adapter_config;
pub mod checkpoint;
pub mod config;
pub mod directory;
pub mod mutate;
pub mod plugin_file;
pub mod records;
pub mod safetensors;
pub mod templates;
pub mod tokenizer;

use std::path::Path;

/// One kind of input.
pub struct Target {
    pub name: &'static str,
    /// Handles one input as the program would. That it returns is all that it shows.
    pub run: fn(&[u8]),
    /// Inputs to start from, most of them valid.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Pieces worth putting into an input, for the mutations here and libFuzzer's dictionary.
    pub tokens: &'static [&'static str],
}

/// Every kind of input.
pub const TARGETS: [Target; 8] = [
    config::TARGET,
    records::TARGET,
    templates::TARGET,
    tokenizer::TARGET,
    safetensors::TARGET,
    adapter_config::TARGET,
    checkpoint::TARGET,
    plugin_file::TARGET,
];

/// Numbers that types and sizes end at, for inputs in JSON and TOML.
const NUMBERS: [&str; 10] = [
    "0",
    "-1",
    "65536",
    "1073741824",
    "4294967295",
    "9223372036854775807",
    "18446744073709551615",
    "1e308",
    "1e999",
    "-0.0",
];

/// A committed file that is a seed.
fn committed(path: &str) -> Vec<u8> {
    let path = crate::root().join(path);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Committed files with one ending, in the order of their names.
fn committed_in(dir: &str, extension: &str) -> Vec<Vec<u8>> {
    let mut files: Vec<_> = std::fs::read_dir(crate::root().join(dir))
        .expect("a folder of the repository")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    files.sort();
    files.iter().map(|path| std::fs::read(path).expect("a file of the repository")).collect()
}

/// A new folder in memory where there is one, so that the disk does not set the pace.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    made.expect("a temporary folder")
}

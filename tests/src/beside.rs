//! What lies beside the plugins of plugins/, found by walking that folder: whose numbers an objective has to
//! have, and records that an adapter has to understand.

use crate::{json, root};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use toml::Table;

/// The folders of the bundled plugins, in the order of their names.
///
/// # Panics
/// If plugins/ cannot be read.
pub fn folders() -> Vec<PathBuf> {
    let all = fs::read_dir(root().join("plugins")).expect("a folder").map(|e| e.expect("an entry"));
    let mut folders: Vec<PathBuf> = all
        .map(|entry| entry.path())
        .filter(|folder| folder.join("Cargo.toml").is_file() && !folder.ends_with("bundled"))
        .collect();
    folders.sort();
    folders
}

/// The last part of a folder's path, which is its plugin's name.
pub fn name(folder: &std::path::Path) -> String {
    folder.file_name().expect("a folder has a name").to_string_lossy().into_owned()
}

/// Every golden.json, with the plugin beside which it lies.
pub fn golden() -> Vec<(String, Value)> {
    let there = folders().into_iter().map(|folder| (name(&folder), folder.join("golden.json")));
    let there = there.filter(|(_, path)| path.is_file());
    there.map(|(plugin, path)| (plugin, json(&path))).collect()
}

/// Records in the schema of a published data set.
pub struct Fixture {
    /// The plugin beside which it lies.
    pub plugin: String,
    /// A JSONL file.
    pub file: PathBuf,
    /// What reads it, as a configuration names it.
    pub adapter: toml::Value,
    /// How many responses that finds.
    pub responses: usize,
}

/// The entries of every fixtures/index.toml.
///
/// # Panics
/// If one cannot be read, or lacks a key.
pub fn fixtures() -> Vec<Fixture> {
    let mut fixtures = Vec::new();
    for folder in folders().into_iter().map(|folder| folder.join("fixtures")) {
        let index = folder.join("index.toml");
        let Ok(text) = fs::read_to_string(&index) else { continue };
        let place = index.display();
        let index: Table = text.parse().unwrap_or_else(|e| panic!("{place}: {e}"));
        for entry in index["fixture"].as_array().expect("[[fixture]]") {
            let text = |key: &str| entry[key].as_str().unwrap_or_else(|| panic!("{place}: {key}"));
            let responses = entry["responses"].as_integer().expect("a number of responses");
            fixtures.push(Fixture {
                plugin: name(folder.parent().expect("a plugin's folder")),
                file: folder.join(text("file")),
                adapter: entry["adapter"].clone(),
                responses: usize::try_from(responses).expect("a number of responses"),
            });
        }
    }
    fixtures
}

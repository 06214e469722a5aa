//! The documentation of the configuration, from the schema itself: the annotated file that
//! `uft config` prints and the page docs/config.md, which a test compares with this.

use super::schema::{
    DataSection, EvalSection, LoraSection, ModelSection, PluginsSection, StageSection, TextSection,
    TrainSection,
};
use super::section::SectionDoc;
use std::fmt::Write;

fn sections() -> [SectionDoc; 8] {
    [
        ModelSection::documentation(),
        LoraSection::documentation(),
        PluginsSection::documentation(),
        DataSection::documentation(),
        TextSection::documentation(),
        TrainSection::documentation(),
        EvalSection::documentation(),
        StageSection::documentation(),
    ]
}

impl SectionDoc {
    /// The key's default as TOML; keys that must be given or may be unset have none.
    fn default_of(&self, key: &str) -> Option<String> {
        let value = self.defaults.get(key)?;
        let unset = value.as_str() == Some("");
        (!unset).then(|| value.to_string())
    }
}

/// Every key with its meaning and default, as a TOML file in which unset keys are comments.
pub fn annotated() -> String {
    let mut out = String::new();
    for section in sections() {
        // A list's element is an example, so the whole section is a comment.
        let list = section.header.starts_with("[[");
        let comment = if list { "# " } else { "" };
        for line in section.doc {
            let _ = writeln!(out, "#{line}");
        }
        let _ = writeln!(out, "{comment}{}", section.header);
        for key in section.keys {
            for line in key.doc {
                let _ = writeln!(out, "#{line}");
            }
            let _ = match section.default_of(key.name) {
                Some(default) => writeln!(out, "{comment}{} = {default}", key.name),
                None => writeln!(out, "# {} =", key.name),
            };
        }
        out.push('\n');
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

/// The page docs/config.md.
pub fn page() -> String {
    let mut out = String::from(
        "# Configuration\n\n\
         <!-- Generated from host/src/config/schema.rs by `uft config --markdown`; a test compares the two. -->\n\n\
         A run is one TOML file. Unknown keys are errors. Paths are relative to the directory in which `uft` runs.\n\
         Any key can be overridden on the command line: `--set train.lr=3e-5`, `--set data[rated].weight=2`.\n",
    );
    for section in sections() {
        let _ = writeln!(out, "\n## `{}`\n\n{}\n", section.header, joined(section.doc));
        let _ = writeln!(out, "| key | default | meaning |\n| --- | --- | --- |");
        for key in section.keys {
            let default = section.default_of(key.name).map_or("–".into(), |d| format!("`{d}`"));
            let _ = writeln!(
                out,
                "| `{}` | {default} | {} |",
                key.name,
                joined(key.doc).replace('|', "\\|")
            );
        }
    }
    out
}

fn joined(doc: &[&str]) -> String {
    doc.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
}

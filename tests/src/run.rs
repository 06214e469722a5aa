//! A run's file in the making: what the tests' runs have in common, and what each adds.

use crate::golden;
use std::fmt::Display;
use std::path::{Path, PathBuf};

pub struct RunFile {
    dir: PathBuf,
    /// Everything but `[train]` and what comes behind it; sources stand last.
    before: String,
    train: String,
    after: String,
}

impl RunFile {
    /// On a golden model, with file and output in `dir`.
    pub fn new(dir: &Path, model: &str) -> Self {
        let path = golden(&format!("models/{model}"));
        Self {
            dir: dir.to_owned(),
            before: format!("[model]\npath = \"{}\"\n", path.display()),
            train: format!("[train]\noutput = \"{}\"\nthreads = 2\n", dir.join("out").display()),
            after: String::new(),
        }
    }

    /// A section with its lines.
    pub fn section(mut self, name: &str, lines: &str) -> Self {
        self.before += &format!("[{name}]\n{lines}\n");
        self
    }

    /// A source of golden rows, named as its file.
    pub fn golden(self, name: &str, objective: &str) -> Self {
        let file = golden(&format!("data/{name}.jsonl"));
        self.rows(name, &file, objective)
    }

    /// The same of rows like the golden ones in another file.
    pub fn rows(self, name: &str, file: &Path, objective: &str) -> Self {
        let adapter = match name {
            "demos" => "demonstrations",
            "pairs" => "preferences",
            other => other,
        };
        self.source(name, file, adapter, objective)
    }

    /// A source; `objective` is as TOML has it.
    pub fn source(mut self, name: &str, file: &Path, adapter: &str, objective: &str) -> Self {
        let file = file.display();
        self.before += &format!(
            "[[data]]\nname = \"{name}\"\nfiles = [\"{file}\"]\nadapter = \"{adapter}\"\nobjective = {objective}\n"
        );
        self
    }

    /// Holds rows of the last source out.
    pub fn eval_fraction(mut self, fraction: impl Display) -> Self {
        self.before += &format!("eval_fraction = {fraction}\n");
        self
    }

    /// Keeps reference log-probs in the run's own output, whatever other runs have computed.
    pub fn own_references(self) -> Self {
        let cache = self.dir.join("out/reference");
        self.train(&format!("reference_cache = \"{}\"", cache.display()))
    }

    /// Lines of `[train]`.
    pub fn train(mut self, lines: &str) -> Self {
        self.train += &format!("{lines}\n");
        self
    }

    /// What comes behind `[train]`: more of its lines, or sections.
    pub fn and(mut self, text: &str) -> Self {
        self.after += &format!("{text}\n");
        self
    }

    /// Writes it and gives its path, as the command line takes it.
    pub fn write(self) -> String {
        let path = self.dir.join("run.toml");
        std::fs::write(&path, self.before + &self.train + &self.after).expect("the run is written");
        path.display().to_string()
    }
}

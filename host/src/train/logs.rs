//! The run's log files: `metrics.jsonl`, a line per step, and `eval.jsonl`, a line per held-out
//! evaluation, its names with `eval_` in front.

use super::metrics::number;
use super::pass::Outcome;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

const STEPS: &str = "metrics.jsonl";
const HELD_OUT: &str = "eval.jsonl";

/// Both files, open for appending.
pub struct Logs {
    dir: PathBuf,
    steps: File,
    held_out: File,
}

impl Logs {
    /// Opens new files in `output`, or goes on with those that a checkpoint holds.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn open(output: &Path, checkpoint: Option<&Path>) -> Result<Self> {
        let open = |name: &str| -> std::io::Result<File> {
            let path = output.join(name);
            let before = match checkpoint {
                Some(dir) => std::fs::read(dir.join(name))?,
                None => Vec::new(),
            };
            let mut file = File::create(path)?;
            file.write_all(&before)?;
            Ok(file)
        };
        let all =
            std::fs::create_dir_all(output).and_then(|()| Ok((open(STEPS)?, open(HELD_OUT)?)));
        let (steps, held_out) =
            all.map_err(|e| Error::other(format!("{}: cannot be written: {e}", output.display())))?;
        Ok(Self { dir: output.to_owned(), steps, held_out })
    }

    /// Appends a step's line.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn step(&mut self, line: Map<String, Value>) -> Result<()> {
        append(&mut self.steps, STEPS, line)
    }

    /// Appends a held-out evaluation.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn held_out(&mut self, step: u64, outcome: &Outcome) -> Result<()> {
        let mut line = Map::new();
        line.insert("step".into(), step.into());
        line.insert("eval_loss".into(), number(outcome.loss));
        let metrics = outcome.metrics.to_json().into_iter();
        line.extend(metrics.map(|(name, value)| (format!("eval_{name}"), value)));
        append(&mut self.held_out, HELD_OUT, line)
    }

    /// Both files as they are now, with their names.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn contents(&self) -> Result<[(&'static str, Vec<u8>); 2]> {
        let read = |name| {
            let path = self.dir.join(name);
            std::fs::read(&path)
                .map_err(|e| Error::other(format!("{}: cannot be read: {e}", path.display())))
        };
        Ok([(STEPS, read(STEPS)?), (HELD_OUT, read(HELD_OUT)?)])
    }

    /// transformers' `log_history`: all lines of both files by step, under transformers' names.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn history(&self) -> Result<Vec<Map<String, Value>>> {
        let mut lines = Vec::new();
        for (_, bytes) in self.contents()? {
            for line in bytes.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
                let damaged = |what: &str| {
                    Error::other(format!("a line of the log files is damaged: {what}"))
                };
                let line: Map<String, Value> =
                    serde_json::from_slice(line).map_err(|e| damaged(&e.to_string()))?;
                if line.get("step").and_then(Value::as_u64).is_none() {
                    return Err(damaged("it has no step"));
                }
                let name = |key: String| if key == "lr" { "learning_rate".to_owned() } else { key };
                lines.push(line.into_iter().map(|(key, value)| (name(key), value)).collect());
            }
        }
        lines.sort_by_key(|line: &Map<String, Value>| line["step"].as_u64());
        Ok(lines)
    }
}

fn append(file: &mut File, name: &str, line: Map<String, Value>) -> Result<()> {
    let mut text = Value::Object(line).to_string();
    text.push('\n');
    file.write_all(text.as_bytes())
        .map_err(|e| Error::other(format!("{name}: cannot be written: {e}")))
}

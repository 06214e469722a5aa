//! The run's log files: `metrics.jsonl`, a line per step, and `eval.jsonl`, a line per held-out
//! evaluation, its names with `eval_` in front.

use super::metrics::number;
use super::pass::Outcome;
use crate::model::files::{create_dir, write_bytes, write_error};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

const STEPS: &str = "metrics.jsonl";
const HELD_OUT: &str = "eval.jsonl";

/// Both files, open for appending.
pub struct Logs {
    dir: PathBuf,
    /// The step of the last held-out evaluation.
    evaluated: Option<u64>,
    steps: File,
    held_out: File,
}

impl Logs {
    /// Opens new files in `output`, or goes on with those that a checkpoint holds. What a run that
    /// was interrupted had written after its checkpoint, a torn line perhaps, is no longer there.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn open(output: &Path, checkpoint: Option<&Path>) -> Result<Self> {
        create_dir(output)?;
        let open = |name: &str| -> Result<File> {
            let path = output.join(name);
            let before = checkpoint.map_or(Ok(Vec::new()), |dir| read(dir, name))?;
            write_bytes(&path, &before)?;
            OpenOptions::new().append(true).open(&path).map_err(|e| write_error(&path, &e))
        };
        let (steps, held_out) = (open(STEPS)?, open(HELD_OUT)?);
        let mut logs = Self { dir: output.to_owned(), evaluated: None, steps, held_out };
        let evaluations = objects(&read(output, HELD_OUT)?)?;
        logs.evaluated = evaluations.last().and_then(|line| line["step"].as_u64());
        Ok(logs)
    }

    /// Whether the state after this step was evaluated.
    pub fn has_evaluation(&self, step: u64) -> bool {
        self.evaluated == Some(step)
    }

    /// Appends a step's line.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn step(&mut self, line: Map<String, Value>) -> Result<()> {
        append(&mut self.steps, &self.dir.join(STEPS), line)
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
        append(&mut self.held_out, &self.dir.join(HELD_OUT), line)?;
        self.evaluated = Some(step);
        Ok(())
    }

    /// Both files as they are now, with their names.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn contents(&self) -> Result<[(&'static str, Vec<u8>); 2]> {
        Ok([(STEPS, read(&self.dir, STEPS)?), (HELD_OUT, read(&self.dir, HELD_OUT)?)])
    }

    /// transformers' `log_history`: all lines of both files by step, under transformers' names.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn history(&self) -> Result<Vec<Map<String, Value>>> {
        let mut lines = Vec::new();
        for (_, bytes) in self.contents()? {
            for line in objects(&bytes)? {
                let name = |key: String| if key == "lr" { "learning_rate".to_owned() } else { key };
                lines.push(line.into_iter().map(|(key, value)| (name(key), value)).collect());
            }
        }
        lines.sort_by_key(|line: &Map<String, Value>| line["step"].as_u64());
        Ok(lines)
    }
}

fn append(file: &mut File, path: &Path, line: Map<String, Value>) -> Result<()> {
    let mut text = Value::Object(line).to_string();
    text.push('\n');
    file.write_all(text.as_bytes()).map_err(|e| write_error(path, &e))
}

fn read(dir: &Path, name: &str) -> Result<Vec<u8>> {
    let path = dir.join(name);
    std::fs::read(&path)
        .map_err(|e| Error::other(format!("{}: cannot be read: {e}", path.display())))
}

/// The lines of a log, each of which has its step.
fn objects(bytes: &[u8]) -> Result<Vec<Map<String, Value>>> {
    let damaged = |why: &dyn std::fmt::Display| {
        Error::other(format!("a line of the log files is damaged: {why}"))
    };
    let object = |line: &[u8]| {
        let line: Map<String, Value> = serde_json::from_slice(line).map_err(|e| damaged(&e))?;
        match line.get("step").is_some_and(Value::is_u64) {
            true => Ok(line),
            false => Err(damaged(&"it has no step")),
        }
    };
    bytes.split(|b| *b == b'\n').filter(|line| !line.is_empty()).map(object).collect()
}

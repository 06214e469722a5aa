//! What the user sees at the end: held-out metrics and sample answers, before and after.

use super::metrics::Metrics;
use super::setup::Run;
use crate::Result;
use crate::model::SampleOptions;
use comfy_table::{CellAlignment, Table, presets};
use std::fmt::Write;
use std::path::PathBuf;

/// The model at one moment.
pub struct Snapshot {
    pub metrics: Metrics,
    /// Prompt and answer of some held-out rows.
    pub answers: Vec<(String, String)>,
}

/// A finished run.
pub struct Report {
    pub before: Snapshot,
    pub after: Snapshot,
    pub steps: u64,
    pub tokens: u64,
    pub seconds: f64,
    pub output: PathBuf,
}

/// Metrics of the table, with their headings.
const COLUMNS: [(&str, &str); 3] = [
    ("loss", "loss"),
    ("rewards/accuracies", "reward accuracy"),
    ("rewards/margins", "reward margin"),
];

impl Report {
    /// The report as text.
    pub fn render(&self) -> String {
        let mut out = String::new();
        let sources: Vec<&str> = self.after.metrics.sources().collect();
        if sources.is_empty() {
            let _ = writeln!(
                out,
                "No held-out rows: set eval_files or eval_fraction in [[data]] to compare."
            );
        } else {
            let _ = writeln!(out, "Held-out rows, before → after\n{}", self.table(&sources));
        }
        for ((prompt, before), (_, after)) in self.before.answers.iter().zip(&self.after.answers) {
            let _ = writeln!(
                out,
                "\n{}\n  before: {}\n  after:  {}",
                one_line(prompt),
                one_line(before),
                one_line(after)
            );
        }
        let _ = write!(
            out,
            "\n{} steps, {} tokens in {:.0} s ({:.0} tokens/s). PEFT adapter: {}",
            self.steps,
            self.tokens,
            self.seconds,
            self.tokens as f64 / self.seconds.max(1e-9),
            self.output.display()
        );
        out
    }

    fn table(&self, sources: &[&str]) -> Table {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        table.set_header(["source"].into_iter().chain(COLUMNS.map(|(_, heading)| heading)));
        for &source in sources {
            let mut row = vec![source.to_owned()];
            for (name, _) in COLUMNS {
                let both =
                    (self.before.metrics.of(source, name), self.after.metrics.of(source, name));
                row.push(match both {
                    (Some(before), Some(after)) => format!("{before:.3} → {after:.3}"),
                    _ => "–".into(),
                });
            }
            table.add_row(row);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Answers to the prompts of held-out rows, taken from all sources in turn.
///
/// # Errors
/// If the tokens cannot be decoded, or a signal arrives.
pub fn answers(run: &Run) -> Result<Vec<(String, String)>> {
    let wanted = run.config.eval.samples;
    let mut prompts: Vec<&[u32]> = Vec::new();
    let longest = run.sources.iter().map(|s| s.held_out.len()).max().unwrap_or(0);
    for row in 0..longest {
        let here = run.sources.iter().filter_map(|s| s.held_out.get(row));
        for prompt in here.map(|e| e.group.prompt.as_slice()) {
            if prompts.len() < wanted && !prompt.is_empty() && !prompts.contains(&prompt) {
                prompts.push(prompt);
            }
        }
    }
    let options = SampleOptions {
        max_tokens: run.config.eval.sample_tokens,
        eos: run.text.eos_ids().to_vec(),
        temperature: run.config.eval.sample_temperature as f32,
        seed: run.config.train.seed,
        ..SampleOptions::greedy()
    };
    let answer = |prompt: &&[u32]| {
        let tokens = run.model.generate(prompt, &options, Some(&run.adapters))?;
        Ok((run.text.decode(prompt, true)?, run.text.decode(&tokens, true)?))
    };
    prompts.iter().map(answer).collect()
}

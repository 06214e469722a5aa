//! The progress bar: on stderr, and only on a terminal.

use super::pass::Outcome;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::BTreeMap;
use std::io::IsTerminal;

/// Share of the past in a running mean: about the last ten steps count.
const MEMORY: f64 = 0.9;
/// What is shown of every source.
const SHOWN: [(&str, &str); 3] =
    [("loss", "loss"), ("rewards/accuracies", "accuracy"), ("rewards/margins", "margin")];

/// The bar of one stage; invisible off a terminal.
pub struct Progress {
    bar: ProgressBar,
    tokens: u64,
    /// Running means of what is shown; one step's few rows would only flicker.
    means: BTreeMap<(String, &'static str), f64>,
}

impl Progress {
    pub fn new(stage: Option<&str>, step: u64, steps: u64) -> Self {
        let target = match std::io::stderr().is_terminal() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(Some(steps), target);
        let style =
            ProgressStyle::with_template("{prefix}{pos}/{len} {wide_bar} {eta} left\n{msg}");
        bar.set_style(style.expect("the template is valid").progress_chars("█▉▊▋▌▍▎▏ "));
        bar.set_position(step);
        bar.reset_eta();
        if let Some(stage) = stage {
            bar.set_prefix(format!("{stage} "));
        }
        Self { bar, tokens: 0, means: BTreeMap::new() }
    }

    /// Loss, tokens per second, and every source's loss, reward accuracy and margin.
    pub fn step(&mut self, outcome: &Outcome) {
        self.tokens += outcome.tokens;
        let rate = self.tokens as f64 / self.bar.elapsed().as_secs_f64().max(1e-9);
        let loss = self.mean("", "loss", outcome.loss);
        let mut message = format!("  loss {loss:.4} · {rate:.0} tokens/s");
        for source in outcome.metrics.sources() {
            message.push_str(&format!("\n  {source:<16}"));
            for (name, label) in SHOWN {
                if let Some(value) = outcome.metrics.of(source, name) {
                    let mean = self.mean(source, name, value);
                    message.push_str(&format!(" {label} {mean:.3} "));
                }
            }
        }
        self.bar.set_message(message);
        self.bar.inc(1);
    }

    fn mean(&mut self, source: &str, name: &'static str, value: f64) -> f64 {
        let mean = self.means.entry((source.to_owned(), name)).or_insert(value);
        // A step that was left out has no loss, and would leave none to all that follow.
        *mean = match (mean.is_finite(), value.is_finite()) {
            (true, true) => MEMORY * *mean + (1.0 - MEMORY) * value,
            (false, _) => value,
            (true, false) => *mean,
        };
        *mean
    }

    /// A line above the bar.
    pub fn note(&self, line: &str) {
        self.bar.suspend(|| log::info!("{line}"));
    }

    pub fn finish(&self) {
        self.bar.finish();
    }
}

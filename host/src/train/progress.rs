//! The progress bar: on stderr, and only on a terminal.

use super::pass::Outcome;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::cell::Cell;
use std::io::IsTerminal;

/// The bar of one stage; invisible off a terminal.
pub struct Progress {
    bar: ProgressBar,
    tokens: Cell<u64>,
}

impl Progress {
    pub fn new(stage: Option<&str>, steps: u64) -> Self {
        let target = match std::io::stderr().is_terminal() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(Some(steps), target);
        let style =
            ProgressStyle::with_template("{prefix}{pos}/{len} {wide_bar} {eta} left\n  {msg}");
        bar.set_style(style.expect("the template is valid").progress_chars("█▉▊▋▌▍▎▏ "));
        if let Some(stage) = stage {
            bar.set_prefix(format!("{stage} "));
        }
        Self { bar, tokens: Cell::new(0) }
    }

    /// Loss, tokens per second, and every source's reward accuracy and margin.
    pub fn step(&self, outcome: &Outcome) {
        self.tokens.set(self.tokens.get() + outcome.tokens);
        let rate = self.tokens.get() as f64 / self.bar.elapsed().as_secs_f64().max(1e-9);
        let mut message = format!("loss {:.4} · {rate:.0} tokens/s", outcome.loss);
        for source in outcome.metrics.sources() {
            let shown = [("rewards/accuracies", "accuracy"), ("rewards/margins", "margin")];
            let values = shown.iter().filter_map(|(name, label)| {
                outcome.metrics.of(source, name).map(|value| format!(" {label} {value:.2}"))
            });
            let values: String = values.collect();
            if !values.is_empty() {
                message.push_str(&format!(" · {source}{values}"));
            }
        }
        self.bar.set_message(message);
        self.bar.inc(1);
    }

    /// A line above the bar.
    pub fn note(&self, line: &str) {
        self.bar.suspend(|| log::info!("{line}"));
    }

    pub fn finish(&self) {
        self.bar.finish();
    }
}

//! The ways to compute a run, and which of them a plan takes: the one with the least work that fits.

use super::{COMFORTABLE, COMFORTABLE_ON_GPU, Choice, Largest, Planner, Sizes};
use crate::Result;
use crate::config::Recompute;
use crate::model::inference::last_that;
use crate::model::{Device, Options};
use std::cell::Cell;

/// The memory that there is, in bytes.
pub(super) struct Limits {
    /// What the machine holds however the run is computed.
    pub fixed: usize,
    /// The machine's; unknown outside of Linux.
    pub machine: Option<usize>,
    /// The GPU's, where the run computes on one.
    pub gpu: Option<usize>,
    /// What activations there take beyond those of the largest micro-batches.
    pub beyond: usize,
}

impl Limits {
    /// Whether the memory where the run computes, or a share of it, is enough for a choice.
    pub fn allow(&self, choice: &Choice, share: f64) -> bool {
        let (needed, available) = match self.gpu {
            None => (self.fixed + choice.total(), self.machine),
            Some(_) => (choice.held.total() + choice.total() + self.beyond, self.gpu),
        };
        available.is_none_or(|available| needed as f64 <= share * available as f64)
    }

    /// Whether the machine's memory is, where the run computes on a GPU and offloads. What is page-locked cannot make room
    /// for others.
    pub fn allow_beside(&self, choice: &Choice) -> bool {
        let most = |machine: usize| COMFORTABLE * machine as f64;
        let needed = (self.fixed + choice.offloaded) as f64;
        choice.offloaded == 0 || self.machine.is_none_or(|machine| needed <= most(machine))
    }

    fn allow_comfortably(&self, choice: &Choice) -> bool {
        self.allow(choice, if self.gpu.is_some() { COMFORTABLE_ON_GPU } else { COMFORTABLE })
    }
}

impl Planner<'_> {
    /// Layers that the way back reaches.
    pub(super) fn reached_layers(&self) -> usize {
        self.model.layers - self.options().lowest_layer(self.lora)
    }

    /// The ways to compute, each with less memory and more work than the one before.
    fn ways(&self) -> Vec<Options> {
        let mut ways = self.ways_to_keep();
        ways.extend(self.ways_with_inputs_alone().into_iter().skip(1));
        ways
    }

    /// From everything kept to nothing but each layer's input.
    fn ways_to_keep(&self) -> Vec<Options> {
        let (reached, options) = (self.reached_layers(), self.options());
        let gates = match self.device {
            Device::Cpu => 0,
            Device::Gpu(_) => reached,
        };
        let without_gates =
            (0..=gates).map(|recomputed_gates| Options { recomputed_gates, ..options });
        let layers = (1..=reached).map(|recomputed_layers| {
            let recomputed_gates = gates.saturating_sub(recomputed_layers);
            Options { recomputed_layers, recomputed_gates, ..options }
        });
        without_gates.chain(layers).collect()
    }

    /// From no input offloaded to all but the topmost layer's, which the way back wants first.
    fn ways_with_inputs_alone(&self) -> Vec<Options> {
        let reached = self.reached_layers();
        let offloaded = match self.device {
            Device::Cpu => 0,
            Device::Gpu(_) => reached.saturating_sub(1),
        };
        let options = Options { recomputed_layers: reached, ..self.options() };
        (0..=offloaded).map(|offloaded_layers| Options { offloaded_layers, ..options }).collect()
    }

    /// The way with the least work that fits, or as the configuration says.
    pub(super) fn choose(&self, largest: &Largest, limits: &Limits) -> Result<Choice> {
        let mut ways = match self.config.train.recompute {
            Recompute::Auto => self.ways(),
            Recompute::None => vec![self.options()],
            Recompute::All | Recompute::Offload => self.ways_with_inputs_alone(),
        };
        if self.config.train.recompute == Recompute::Offload {
            ways.drain(..ways.len() - 1);
        }
        self.least(largest, &ways, |choice| limits.allow_comfortably(choice))
    }

    /// As [`Self::choose`], of activations that every micro-batch of the run has room in; `limits` know then what
    /// that takes beyond those of the largest.
    pub(super) fn choose_for_all(&self, largest: &Largest, limits: &mut Limits) -> Result<Choice> {
        loop {
            let choice = self.choose(largest, limits)?;
            let all = self.every_step(largest, choice.options)?;
            let beyond = all.saturating_sub(choice.activations);
            if beyond <= limits.beyond {
                return Ok(choice);
            }
            limits.beyond = beyond;
        }
    }

    /// The first of some ways that fits, or the last.
    fn least(
        &self,
        largest: &Largest,
        ways: &[Options],
        fits: impl Fn(&Choice) -> bool,
    ) -> Result<Choice> {
        let (mut first, mut last) = (0, ways.len() - 1);
        // Each takes less memory than the one before.
        while first < last {
            let middle = first + (last - first) / 2;
            match fits(&self.choice(largest, ways[middle])?) {
                true => last = middle,
                false => first = middle + 1,
            }
        }
        self.choice(largest, ways[first])
    }

    /// What to change so that the run fits, in words.
    pub(super) fn would_fit(&self, sizes: &Sizes, limits: &Limits) -> String {
        let train = &self.config.train;
        let ways = self.ways_with_inputs_alone();
        let fits = |largest: &Largest| {
            let least = self.least(largest, &ways, |choice| limits.allow(choice, 1.0));
            least.is_ok_and(|least| limits.allow(&least, 1.0) && limits.allow_beside(&least))
        };
        let with = |micro_tokens: usize| fits(&self.largest(sizes, micro_tokens));
        let recompute = match train.recompute {
            Recompute::None => " with recompute = \"all\"",
            _ => "",
        };
        if train.recompute == Recompute::None && with(train.micro_tokens) {
            return "recompute = \"auto\" or \"all\" in [train] would fit".into();
        }
        if with(1) {
            let micro_tokens = last_that(1..train.micro_tokens, with);
            return format!("[train] micro_tokens = {micro_tokens}{recompute} would fit");
        }
        // Groups alone are too long.
        let longest = self.examples().map(|(_, e)| e.group.longest()).max().unwrap_or(0);
        let rows = Cell::new(0);
        let up_to = |length: usize| {
            let shorter = sizes.alone(self.sources).filter(|(longest, _)| *longest <= length);
            let steps: Vec<_> = shorter.map(|(_, size)| size).collect();
            let largest = Largest { steps, ..Largest::default() };
            let fit = fits(&largest.reduced());
            if fit {
                rows.set(largest.most_rows().rows);
            }
            fit
        };
        if up_to(2) {
            let max_length = last_that(2..longest, up_to);
            return format!(
                "[train] max_length = {max_length} with micro_tokens = {}{recompute} would fit; longer rows are left \
                 out, or cut with [text] long_rows = \"cut-prompt\"",
                rows.get().max(1)
            );
        }
        "the weights and the adapter alone are too large; take a smaller model or rank, or a larger machine".into()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Held;
    use super::*;

    #[test]
    fn what_is_page_locked_leaves_a_tenth_of_the_machine_free() {
        let choice = |offloaded| Choice {
            options: Options::default(),
            activations: 400,
            chunk: 0,
            kernels: 0,
            held: Held { weights: 500, trained: 50 },
            offloaded,
        };
        let limits = Limits { fixed: 10, machine: Some(100), gpu: Some(1000), beyond: 0 };
        assert!(limits.allow(&choice(1 << 20), 0.95), "it is not the GPU's");
        assert!(!limits.allow(&choice(0), 0.94));
        assert!(limits.allow_beside(&choice(80)) && !limits.allow_beside(&choice(81)));
        let full = Limits { fixed: 100, ..limits };
        assert!(full.allow_beside(&choice(0)) && !full.allow_beside(&choice(1)));
        let unknown = Limits { machine: None, ..full };
        assert!(unknown.allow_beside(&choice(1 << 40)));
    }
}

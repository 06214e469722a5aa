//! The memory of commands that train nothing. On a GPU it is planned before the weights are loaded, as a run's is: every pass
//! that is going to be made goes through the decoder's own code on a device that only counts.

use super::config::ModelConfig;
use super::cuda::Counted;
use super::decoder::Options;
use super::device::Device;
use super::engine::Model;
use super::lora::Lora;
use super::memory::Size;
use super::trained::Adapters;
use crate::machine::mebibytes;
use crate::{Error, ErrorKind, Result};
use std::collections::HashSet;
use std::path::Path;
use uft_kernels::cuda::{Gpu, Kernel};

/// A pass that is going to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Forward {
    /// [`Model::logps`] of a batch of this size, the longest of whose texts has so many tokens.
    LogProbs { size: Size, positions: usize },
    /// [`Model::generate`] of so many tokens behind a prompt.
    Continuation { prompt: usize, tokens: usize },
}

/// Something of a command that takes less memory when it is lower.
pub struct Setting<'a> {
    pub value: usize,
    /// The passes with a lower value; `value` itself, and every value down to 1, is asked for.
    pub passes: &'a dyn Fn(usize) -> Vec<Forward>,
    /// What to do for a value, in words that go before "would fit".
    pub advice: &'a dyn Fn(usize) -> String,
}

/// A model that is only read, and perhaps an adapter of it, before they are loaded.
pub struct Inference<'a> {
    pub dir: &'a Path,
    pub config: &'a ModelConfig,
    pub lora: Option<Lora>,
    pub device: &'a Device,
}

/// What a GPU is going to hold.
pub struct Plan {
    pub weights: usize,
    pub adapter: usize,
    pub activations: usize,
    /// Tokens of the longest text.
    pub positions: usize,
    pub kernels: Vec<Kernel>,
}

impl Plan {
    pub fn total(&self) -> usize {
        self.weights + self.adapter + self.activations
    }
}

/// The model, where it computes.
pub struct Loaded {
    pub model: Model,
    pub lora: Option<Adapters>,
    /// Allocations, modules, and bytes of activations that were planned.
    planned: Option<(usize, usize, usize)>,
}

impl Inference<'_> {
    /// Reads everything, and sets memory aside for the passes. `settings` are what could be lower where a GPU has
    /// too little, the one that changes least first.
    ///
    /// # Errors
    /// As [`Model::load`], or [`ErrorKind::OutOfMemory`] with what would fit.
    pub fn load(self, passes: &[Forward], settings: &[Setting]) -> Result<Loaded> {
        let plan = match self.device {
            Device::Cpu => None,
            Device::Gpu(gpu) => Some(self.fitting(gpu, passes, settings)?),
        };
        let mut model = Model::load(self.dir, self.device)?;
        if let Some(Plan { activations, positions, kernels, .. }) = &plan {
            model.prepare(Options::default(), *activations, 0, *positions, kernels)?;
        }
        let lora = self.lora.map(|lora| model.place(lora)).transpose()?;
        let (allocations, modules) = model.made();
        let planned = plan.map(|plan| (allocations, modules, plan.activations));
        Ok(Loaded { model, lora, planned })
    }

    /// What the passes take of such a GPU.
    ///
    /// # Errors
    /// There are no kernels for the model.
    pub fn plan(&self, gpu: &Gpu, passes: &[Forward]) -> Result<Plan> {
        let positions = passes.iter().map(|pass| match *pass {
            Forward::LogProbs { positions, .. } => positions,
            Forward::Continuation { prompt, tokens } => prompt + tokens,
        });
        let positions = positions.max().unwrap_or(1);
        let options = Options::default();
        let mut counted = Counted::new(self.config, options, gpu.properties(), positions)?;
        if let Some(lora) = &self.lora {
            counted = counted.with_adapters(lora)?;
        }
        for pass in passes.iter().copied().collect::<HashSet<_>>() {
            match pass {
                Forward::LogProbs { size, .. } => counted.logps(size)?,
                Forward::Continuation { prompt, tokens } => counted.generate(prompt, tokens)?,
            }
        }
        Ok(Plan {
            weights: counted.weights(),
            adapter: counted.trained(),
            activations: counted.peak(),
            positions,
            kernels: counted.kernels(),
        })
    }

    /// The plan, if the GPU has so much.
    fn fitting(&self, gpu: &Gpu, passes: &[Forward], settings: &[Setting]) -> Result<Plan> {
        let available = gpu.free_memory()? as usize;
        let plan = self.plan(gpu, passes)?;
        if plan.total() <= available {
            let (total, available) = (mebibytes(plan.total()), mebibytes(available));
            log::info!("{total} of {available} of the GPU's memory set aside");
            return Ok(plan);
        }
        let fits = |setting: &Setting, value| {
            let plan = self.plan(gpu, &(setting.passes)(value));
            plan.is_ok_and(|plan| plan.total() <= available)
        };
        let would_fit = match settings.iter().find(|setting| fits(setting, 1)) {
            Some(setting) => {
                let value = last_that(1..setting.value, |value| fits(setting, value));
                format!("{} would fit", (setting.advice)(value))
            }
            None => "the weights alone are too large; take a smaller model, or a larger GPU".into(),
        };
        Err(Error::new(
            ErrorKind::OutOfMemory,
            format!(
                "{} of the GPU's memory are needed and {} are available: {would_fit}",
                mebibytes(plan.total()),
                mebibytes(available)
            ),
        ))
    }
}

impl Loaded {
    /// Says so if more was needed than was planned.
    pub fn expect_as_planned(&self) {
        let (allocations, modules) = self.model.made();
        if let Some((planned, loaded, bytes)) = self.planned
            && ((planned, loaded) != (allocations, modules) || self.model.activations() > bytes)
        {
            log::warn!(
                "more of the GPU's memory or other kernels than were planned; please report it"
            );
        }
    }
}

/// The last of a range for which something holds that holds for its first, and for none after one for which it
/// does not.
pub fn last_that(range: std::ops::Range<usize>, holds: impl Fn(usize) -> bool) -> usize {
    let (mut good, mut bad) = (range.start, range.end);
    while bad > good + 1 {
        let middle = good + (bad - good) / 2;
        match holds(middle) {
            true => good = middle,
            false => bad = middle,
        }
    }
    good
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_that_holds_is_found() {
        for last in 1..20 {
            assert_eq!(last_that(1..20, |n| n <= last), last);
        }
    }
}

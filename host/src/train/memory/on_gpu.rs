//! The part of a plan that lies on a GPU: found by sending every kind of pass through the decoder's own code.

use super::{Choice, Largest, Planner};
use crate::Result;
use crate::model::cuda::Counted;
use crate::model::inference::last_that;
use crate::model::memory::Size;
use crate::model::{Device, Options};
use rayon::prelude::*;
use uft_kernels::cuda::{Gpu, Kernel};

/// Rows from which on a forward pass on a GPU gets hardly faster with more: a product of 4096 columns has fifteen tiles of
/// 128 × 256 for each of an H100's 132 multiprocessors then.
const ENOUGH: usize = 16_384;

/// Micro-batches that one thread goes through.
const CHUNK: usize = 50;

/// What a GPU is going to hold.
pub(super) struct OnGpu {
    pub name: String,
    pub held: Held,
    pub activations: usize,
    /// What is to be said about them.
    pub note: String,
    /// Bytes that it has left.
    pub available: usize,
}

impl OnGpu {
    pub fn total(&self) -> usize {
        self.held.total() + self.activations
    }
}

/// Bytes that a GPU holds in any case.
#[derive(Clone, Copy, Default)]
pub(super) struct Held {
    pub weights: usize,
    /// Adapters, gradients, moments.
    pub trained: usize,
}

impl Held {
    pub fn total(&self) -> usize {
        self.weights + self.trained
    }
}

impl Planner<'_> {
    pub(super) fn choice_on_gpu(
        &self,
        largest: &Largest,
        options: Options,
        gpu: &Gpu,
    ) -> Result<Choice> {
        let counted = self.counted(options, gpu)?;
        for size in &largest.steps {
            counted.step(*size)?;
        }
        for [own, all] in &largest.with_others {
            counted.step_with_others(*own, *all)?;
        }
        for size in largest.steps.iter().chain(&largest.forward) {
            counted.logps(*size)?;
        }
        if let Some((prompt, tokens)) = self.sample() {
            counted.generate(prompt, tokens)?;
        }
        let activations = counted.peak();
        let held = Held { weights: counted.weights(), trained: counted.trained() };
        let offloaded = counted.offloaded();
        Ok(Choice { options, activations, chunk: 0, kernels: 0, held, offloaded })
    }

    /// Bytes of activations that none of the run's large micro-batches outgrows: first fit takes more for some than for a
    /// larger one, by up to 4 % where layers are computed again.
    pub(super) fn every_step(&self, largest: &Largest, options: Options) -> Result<usize> {
        let Device::Gpu(gpu) = self.device else { return Ok(0) };
        let (model, lora) = (self.model, self.lora);
        let (properties, positions, previous) =
            (gpu.properties(), self.positions(), self.previous());
        let count = || -> Result<Counted> {
            let counted = Counted::new(model, options, properties, positions)?;
            counted.with_adapters(lora)?.with_training(previous)
        };
        let alone = largest.large.par_chunks(CHUNK).map(|sizes| {
            let counted = count()?;
            sizes.iter().try_for_each(|size| counted.step(*size))?;
            Ok(counted.peak())
        });
        let beside = largest.large_with_others.par_chunks(CHUNK).map(|pairs| {
            let counted = count()?;
            pairs.iter().try_for_each(|[own, all]| counted.step_with_others(*own, *all))?;
            Ok(counted.peak())
        });
        alone.chain(beside).try_reduce(|| 0, |a, b| Ok(a.max(b)))
    }

    /// Most rows of a reference pass's micro-batch with which it takes no more than what is planned anyway. It keeps
    /// nothing for a way back, so that is more than a step's.
    pub(super) fn reference_tokens(&self, largest: &Largest, choice: &Choice) -> Result<usize> {
        let micro_tokens = self.config.train.micro_tokens;
        let Device::Gpu(gpu) = self.device else { return Ok(micro_tokens) };
        let most = ENOUGH.min(largest.reference.rows);
        if most <= micro_tokens {
            return Ok(micro_tokens);
        }
        let fits = |tokens: usize| -> Result<bool> {
            let counted = self.counted(choice.options, gpu)?;
            counted.logps(largest.reference.size(tokens))?;
            // An eighth is left, since of a smaller batch buffers may not lie as close together.
            Ok(counted.peak() <= choice.activations / 8 * 7)
        };
        Ok(last_that(micro_tokens..most + 1, |tokens| fits(tokens).unwrap_or(false)))
    }

    fn counted(&self, options: Options, gpu: &Gpu) -> Result<Counted> {
        let counted = Counted::new(self.model, options, gpu.properties(), self.positions())?;
        counted.with_adapters(self.lora)?.with_training(self.previous())
    }

    /// Every kernel that the run may launch: which one a product takes depends on how many rows there are.
    pub(super) fn kernels_on_gpu(
        &self,
        largest: &Largest,
        options: Options,
        gpu: &Gpu,
    ) -> Result<Vec<Kernel>> {
        let mut counted = self.counted(options, gpu)?;
        for size in largest.steps.iter().flat_map(Size::halves) {
            counted.step(size)?;
        }
        for [own, all] in &largest.with_others {
            counted.step_with_others(*own, *all)?;
        }
        for size in largest.steps.iter().chain(&largest.forward).flat_map(Size::halves) {
            counted.logps(size)?;
        }
        if let Some((prompt, tokens)) = self.sample() {
            counted.generate(prompt, tokens)?;
        }
        counted.update()?;
        Ok(counted.kernels())
    }

    /// Tokens of the longest prompt that a report continues, and by how many.
    pub(super) fn sample(&self) -> Option<(usize, usize)> {
        let eval = &self.config.eval;
        let held_out = self.sources.iter().flat_map(|source| &source.held_out);
        let prompt = held_out.map(|example| example.group.prompt.len()).max()?;
        (eval.samples > 0 && prompt > 0).then_some((prompt, eval.sample_tokens))
    }
}

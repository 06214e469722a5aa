//! How much memory of a device a pass takes, found out without it: the very code of [`Decoder`] goes through
//! the pass on a device that only counts. The twin of [`super::super::memory::Shadow`].

use super::adapters::{Adapters, Gradients, Moments};
use super::decoder::{Decoder, Tape};
use super::generate::Continuation;
use crate::Result;
use crate::model::config::ModelConfig;
use crate::model::decoder::Options;
use crate::model::lora::Lora;
use crate::model::memory::Size;
use crate::model::packed::{Packed, Targets, WithOthers};
use std::cell::RefCell;
use uft_kernels::adamw::AdamW;
use uft_kernels::cuda::{Gpu, Kernel, Properties};
use uft_kernels::layout::Layout;

/// A decoder whose passes only count, with what is trained.
pub struct Counted {
    model: Decoder,
    /// Bytes of the weights, with the rotation's angles.
    weights: usize,
    lora: Option<Adapters>,
    trained: Option<(RefCell<Gradients>, RefCell<Moments>, Option<Adapters>)>,
}

impl Counted {
    /// On a device like `properties`, for texts of at most `positions` tokens.
    ///
    /// # Errors
    /// There are no kernels for such a model.
    pub fn new(
        config: &ModelConfig,
        options: Options,
        properties: &Properties,
        positions: usize,
    ) -> Result<Self> {
        let gpu = Gpu::counting(properties.clone());
        let model = Decoder { options, ..Decoder::shaped(config, &gpu)? };
        model.angles(positions)?;
        let weights = gpu.most_allocated().unwrap_or(0);
        Ok(Self { model, weights, lora: None, trained: None })
    }

    /// With adapters.
    ///
    /// # Errors
    /// There are no kernels for a rank.
    pub fn with_adapters(mut self, lora: &Lora) -> Result<Self> {
        self.lora = Some(Adapters::new(lora, self.model.gpu())?);
        Ok(self)
    }

    /// With what is needed to train its adapters, and perhaps with a `reference` that has some too.
    ///
    /// # Errors
    /// None that could be met.
    pub fn with_training(mut self, reference: bool) -> Result<Self> {
        let lora = self.adapters();
        let grads = RefCell::new(Gradients::zeros(lora)?);
        let moments = RefCell::new(Moments::zeros(lora)?);
        let reference = reference.then(|| lora.copy()).transpose()?;
        self.trained = Some((grads, moments, reference));
        Ok(self)
    }

    fn adapters(&self) -> &Adapters {
        self.lora.as_ref().expect("training takes adapters")
    }

    /// Bytes of the weights, with the rotation's angles.
    pub fn weights(&self) -> usize {
        self.weights
    }

    /// Bytes of adapters, gradients and moments.
    pub fn trained(&self) -> usize {
        self.model.gpu().most_allocated().unwrap_or(0) - self.weights
    }

    /// Bytes that a pass takes at most: the largest of all passes so far.
    pub fn peak(&self) -> usize {
        self.model.activations()
    }

    /// Bytes of the host's memory that a pass offloads at most.
    pub fn offloaded(&self) -> usize {
        self.model.offloaded()
    }

    /// Every kernel of the passes so far.
    pub fn kernels(&self) -> Vec<Kernel> {
        self.model.gpu().launched()
    }

    /// Launches of the passes so far.
    pub fn launches(&self) -> usize {
        self.model.gpu().launches()
    }

    /// [`Decoder::logps`], without adapters and with them.
    ///
    /// # Errors
    /// There are no kernels for the model's heads, or a signal arrives; here and in the rest.
    pub fn logps(&self, size: Size) -> Result<()> {
        let Size { rows, needed, .. } = size;
        // What is at most all rows may be fewer, which the last block then takes from among all.
        let fewer = (needed == rows && rows > 1).then_some(Size { needed: rows - 1, ..size });
        for size in fewer.into_iter().chain([size]) {
            let batch = self.stand_in(size);
            self.model.logps(&batch, None)?;
            if let Some(lora) = &self.lora {
                self.model.logps(&batch, Some(lora))?;
            }
        }
        Ok(())
    }

    /// [`Decoder::forward`] and [`Decoder::backward`].
    ///
    /// # Errors
    /// As [`Self::logps`].
    pub fn step(&self, size: Size) -> Result<()> {
        if size.targets == 0 {
            return Ok(());
        }
        let tape = self.model.forward(&self.stand_in(size), self.adapters())?;
        self.backward(tape, size)
    }

    /// [`Decoder::forward_with_others`] of all that there is, and [`Decoder::backward`] of its own.
    ///
    /// # Errors
    /// As [`Self::logps`].
    pub fn step_with_others(&self, own: Size, all: Size) -> Result<()> {
        if own.targets == 0 {
            return Ok(());
        }
        let batch = WithOthers {
            own: self.stand_in(own),
            all: self.stand_in(all),
            rows: (0..own.rows as u32).collect(),
            targets: (0..own.targets as u32).collect(),
            of_others: Vec::new(),
        };
        let (tape, _) = self.model.forward_with_others(batch, self.adapters())?;
        self.backward(tape, own)
    }

    fn backward(&self, tape: Tape, size: Size) -> Result<()> {
        let (grads, ..) = self.trained.as_ref().expect("a plan of training");
        let (grads, dlogp) = (&mut grads.borrow_mut(), vec![0.0; size.targets]);
        self.model.backward(tape, &dlogp, self.adapters(), grads)
    }

    /// What ends a step.
    ///
    /// # Errors
    /// None that could be met.
    pub fn update(&mut self) -> Result<()> {
        let (grads, moments, _) = self.trained.as_ref().expect("a plan of training");
        let lora = self.lora.as_mut().expect("training takes adapters");
        let settings = AdamW { step: 1, ..AdamW::default() };
        grads.borrow_mut().take_norm(1)?;
        moments.borrow_mut().update(lora, &grads.borrow(), &settings)
    }

    /// [`Continuation`] of a prompt by so many tokens, the last of which is not read.
    ///
    /// # Errors
    /// As [`Self::logps`].
    pub fn generate(&self, prompt: usize, tokens: usize) -> Result<()> {
        let (prompt, more) = (prompt.max(1), tokens.saturating_sub(1));
        let mut text = Continuation::new(&self.model, self.lora.as_ref(), &vec![0; prompt], more)?;
        // Every token takes the same.
        if more > 0 { text.push(0) } else { Ok(()) }
    }

    /// A batch of this size.
    fn stand_in(&self, size: Size) -> Packed {
        let longest = size.longest.max(1);
        let texts = (0..size.rows).step_by(longest);
        let lengths: Vec<(usize, Vec<usize>)> =
            texts.map(|start| (longest.min(size.rows - start), Vec::new())).collect();
        let needed = size.needed.min(size.targets) as u32;
        // The targets that are more than the rows read the first row, too.
        let rows = (0..size.targets as u32).map(|target| if target < needed { target } else { 0 });
        Packed {
            tokens: vec![0; size.rows],
            layout: Layout::new(&lengths),
            targets: Targets { rows: rows.collect(), tokens: vec![0; size.targets] },
            tables: Some(size.tables),
        }
    }
}

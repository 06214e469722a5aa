//! How much memory of a device a pass takes, found out without it: the very code of [`Decoder`] goes through
//! the pass on a device that only counts. The twin of [`super::super::memory::Shadow`].

use super::adapters::{Adapters, Gradients, Moments};
use super::decoder::Decoder;
use crate::Result;
use crate::model::config::ModelConfig;
use crate::model::decoder::Options;
use crate::model::lora::Lora;
use crate::model::memory::Size;
use crate::model::packed::{Packed, Targets, WithOthers};
use std::cell::{Cell, RefCell};
use uft_kernels::cuda::{Gpu, Properties};
use uft_kernels::layout::Layout;

/// Bytes for each row of a batch with which a batch's tables may exceed those of its stand-in: one of many short
/// texts has more of them than one of few long ones.
const TABLES: usize = 64;

/// A decoder whose passes only count, with what is trained.
pub struct Counted {
    model: Decoder,
    /// Bytes of the weights, with the rotation's angles.
    weights: usize,
    lora: Adapters,
    grads: RefCell<Gradients>,
    _moments: Moments,
    _reference: Option<Adapters>,
    most_rows: Cell<usize>,
}

impl Counted {
    /// On a device like `properties`, for texts of at most `positions` tokens, and perhaps with a `reference` that
    /// has adapters too.
    ///
    /// # Errors
    /// There are no kernels for such a model, or an adapter's rank.
    pub fn new(
        config: &ModelConfig,
        options: Options,
        properties: &Properties,
        positions: usize,
        lora: &Lora,
        reference: bool,
    ) -> Result<Self> {
        let gpu = Gpu::counting(properties.clone());
        let model = Decoder { options, ..Decoder::shaped(config, &gpu)? };
        model.angles(positions)?;
        let weights = gpu.most_allocated().unwrap_or(0);
        let lora = Adapters::new(lora, &gpu)?;
        Ok(Self {
            model,
            weights,
            grads: RefCell::new(Gradients::zeros(&lora)?),
            _moments: Moments::zeros(&lora)?,
            _reference: reference.then(|| lora.copy()).transpose()?,
            lora,
            most_rows: Cell::new(0),
        })
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
        self.model.activations() + TABLES * self.most_rows.get()
    }

    /// [`Decoder::logps`].
    ///
    /// # Errors
    /// There are no kernels for the model's heads, or a signal arrives.
    pub fn logps(&self, size: Size) -> Result<()> {
        // With adapters a pass takes no less than without.
        self.model.logps(&self.stand_in(size), Some(&self.lora)).map(drop)
    }

    /// [`Decoder::forward`] and [`Decoder::backward`].
    ///
    /// # Errors
    /// As [`Self::logps`].
    pub fn step(&self, size: Size) -> Result<()> {
        if size.targets == 0 {
            return Ok(());
        }
        let tape = self.model.forward(&self.stand_in(size), &self.lora)?;
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
        let (tape, _) = self.model.forward_with_others(batch, &self.lora)?;
        self.backward(tape, own)
    }

    fn backward(&self, tape: super::Tape, size: Size) -> Result<()> {
        let grads = &mut self.grads.borrow_mut();
        self.model.backward(tape, &vec![0.0; size.targets], &self.lora, grads)
    }

    /// A batch of this size.
    fn stand_in(&self, size: Size) -> Packed {
        self.most_rows.set(self.most_rows.get().max(size.rows));
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
        }
    }
}

//! The model as the rest of the program sees it: one decoder of two, which compute the same, on the processor
//! in f32 or on a GPU in bf16.

use super::config::ModelConfig;
use super::cuda;
use super::decoder::{self, Decoder, Options};
use super::device::Device;
use super::packed::{Packed, WithOthers};
use super::trained::{Adapters, Gradients};
use crate::Result;
use std::path::Path;
use uft_kernels::cuda::{Downloading, Kernel};
use uft_kernels::parallel::awake;

/// A decoder with its frozen weights where it computes.
pub enum Model {
    Cpu(Box<Decoder>),
    Cuda(Box<cuda::Decoder>),
}

/// A forward pass, kept for [`Model::backward`].
pub enum Tape {
    Cpu(Box<decoder::Tape>),
    Cuda(Box<cuda::Tape>),
}

impl Tape {
    /// `[M]`: the log-prob of every target, in the order of the batch's targets.
    pub fn logps(&self) -> &[f32] {
        match self {
            Self::Cpu(tape) => tape.logps(),
            Self::Cuda(tape) => tape.logps(),
        }
    }
}

/// Log-probs that a GPU may still be computing.
pub enum Logps {
    There(Vec<f32>),
    Coming(Downloading<f32>),
}

impl Logps {
    /// `[M]`, when they have come.
    ///
    /// # Errors
    /// The device has failed.
    pub fn wait(self) -> Result<Vec<f32>> {
        match self {
            Self::There(logps) => Ok(logps),
            Self::Coming(logps) => Ok(logps.wait()?),
        }
    }
}

impl Model {
    /// Reads `config.json` and the weights (f32, f16 or bf16, one file or shards) in `dir`; a GPU has them in
    /// bf16.
    ///
    /// Every tensor that the configuration asks for must be there with its shape, and no other, but
    /// for what is known to be without effect.
    ///
    /// # Errors
    /// As said, or the device has not the memory, or no kernels for the model's widths.
    pub fn load(dir: &Path, device: &Device) -> Result<Self> {
        Ok(match device {
            Device::Cpu => Self::Cpu(Box::new(Decoder::load(dir)?)),
            Device::Gpu(gpu) => Self::Cuda(Box::new(cuda::Decoder::load(dir, gpu)?)),
        })
    }

    pub fn config(&self) -> &ModelConfig {
        match self {
            Self::Cpu(model) => &model.config,
            Self::Cuda(model) => &model.config,
        }
    }

    pub fn is_on_gpu(&self) -> bool {
        matches!(self, Self::Cuda(_))
    }

    /// Says how to compute, and sets memory aside for `bytes` of activations of texts of at most `positions`
    /// tokens, so that they lie in one piece, and of the host for what a GPU offloads. Its kernels are compiled.
    ///
    /// # Errors
    /// The device or the host has no such memory left, or a kernel does not compile.
    pub fn prepare(
        &mut self,
        options: Options,
        bytes: usize,
        offloaded: usize,
        positions: usize,
        kernels: &[Kernel],
    ) -> Result<()> {
        match self {
            Self::Cpu(model) => {
                model.options = options;
                model.reserve(bytes);
                Ok(())
            }
            Self::Cuda(model) => {
                model.options = options;
                model.reserve(bytes, offloaded, positions, kernels)
            }
        }
    }

    /// Allocations on the GPU and modules loaded so far: none after a run's first step.
    pub fn made(&self) -> (usize, usize) {
        match self {
            Self::Cpu(_) => (0, 0),
            Self::Cuda(model) => model.gpu().made(),
        }
    }

    /// Times that the host waited for the GPU so far.
    pub fn waits(&self) -> usize {
        match self {
            Self::Cpu(_) => 0,
            Self::Cuda(model) => model.gpu().waits(),
        }
    }

    /// Most bytes of activations so far.
    pub fn activations(&self) -> usize {
        match self {
            Self::Cpu(model) => model.activations(),
            Self::Cuda(model) => model.activations(),
        }
    }

    /// The log-prob of every target, `[M]`, without what a way back would need. The same bits as
    /// [`Self::forward`] gives, and with adapters whose B is zero the same bits as without any.
    ///
    /// # Errors
    /// If a signal arrives (see [`crate::signals`]), which is asked for between layers, or a device fails; here
    /// and in the rest.
    pub fn logps(&self, packed: &Packed, lora: Option<&Adapters>) -> Result<Vec<f32>> {
        self.logps_later(packed, lora)?.wait()
    }

    /// As [`Self::logps`], of which a GPU is only told, so that it has the next batch before it is through with
    /// this one.
    ///
    /// # Errors
    /// As [`Self::logps`].
    pub fn logps_later(&self, packed: &Packed, lora: Option<&Adapters>) -> Result<Logps> {
        Ok(match self {
            Self::Cpu(model) => {
                let lora = lora.map(Adapters::cpu);
                Logps::There(awake(|| model.logps(packed, lora))?)
            }
            Self::Cuda(model) => {
                Logps::Coming(model.logps_later(packed, lora.map(Adapters::cuda))?)
            }
        })
    }

    /// The log-prob of every target, with what [`Self::backward`] needs. The batch must have targets.
    ///
    /// # Errors
    /// As [`Self::logps`].
    pub fn forward(&self, packed: Packed, lora: &Adapters) -> Result<Tape> {
        Ok(match self {
            Self::Cpu(model) => {
                let lora = lora.cpu();
                Tape::Cpu(Box::new(awake(|| model.forward(packed, lora))?))
            }
            Self::Cuda(model) => Tape::Cuda(Box::new(model.forward(&packed, lora.cuda())?)),
        })
    }

    /// As [`Self::forward`] of a batch's own groups, and the log-probs of the others, `[M of all - M of own]`
    /// in the order of `all`: the same bits as apart, with their prompts computed once.
    ///
    /// # Errors
    /// As [`Self::logps`].
    pub fn forward_with_others(
        &self,
        batch: WithOthers,
        lora: &Adapters,
    ) -> Result<(Tape, Vec<f32>)> {
        Ok(match self {
            Self::Cpu(model) => {
                let lora = lora.cpu();
                let (tape, logps) = awake(|| model.forward_with_others(batch, lora))?;
                (Tape::Cpu(Box::new(tape)), logps)
            }
            Self::Cuda(model) => {
                let (tape, logps) = model.forward_with_others(batch, lora.cuda())?;
                (Tape::Cuda(Box::new(tape)), logps)
            }
        })
    }

    /// Adds the gradient of a loss to `grads`, from `dlogp`: `[M]`, its gradient to the log-probs.
    /// `lora` must be as it was in [`Self::forward`].
    ///
    /// # Errors
    /// As [`Self::logps`]; `grads` then holds a part of the gradient and is of no use.
    ///
    /// # Panics
    /// The tape is of another model.
    pub fn backward(
        &self,
        tape: Tape,
        dlogp: &[f32],
        lora: &Adapters,
        grads: &mut Gradients,
    ) -> Result<()> {
        match (self, tape) {
            (Self::Cpu(model), Tape::Cpu(tape)) => {
                let (lora, grads) = (lora.cpu(), grads.cpu());
                awake(|| model.backward(*tape, dlogp, lora, grads))
            }
            (Self::Cuda(model), Tape::Cuda(tape)) => {
                model.backward(*tape, dlogp, lora.cuda(), grads.cuda())
            }
            _ => panic!("the tape of another model"),
        }
    }
}

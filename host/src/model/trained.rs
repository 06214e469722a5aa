//! What is trained, where the model computes: adapters, their gradients, and the moments of AdamW. In memory they are
//! a [`Lora`] and numbers beside it; on a GPU they stay there, and come back only to be written into files.

use super::cuda;
use super::engine::Model;
use super::lora::{Lora, LoraGrads};
use crate::Result;
use std::borrow::Cow;
use uft_kernels::adamw::{self, AdamW};

/// Adapters beside a model: those that are trained, or a reference's.
pub enum Adapters {
    Cpu(Lora),
    Cuda(Box<cuda::Adapters>),
}

/// The gradients of [`Adapters`], to which every micro-batch adds.
pub enum Gradients {
    Cpu {
        grads: LoraGrads,
        norm: f64,
        /// The first micro-batch after which it was not finite.
        first: Option<u32>,
    },
    Cuda(Box<cuda::Gradients>),
}

/// AdamW's moments of [`Adapters`].
pub enum Moments {
    /// Of every matrix, in the order of [`Lora::tensors`]: the mean of its gradients, and that of their squares.
    Cpu(Vec<[Vec<f32>; 2]>),
    Cuda(Box<cuda::Moments>),
}

/// Two things that belong together are in two places, which no configuration can bring about.
#[track_caller]
fn apart() -> ! {
    panic!("adapters, gradients, moments and their model on different devices")
}

impl Model {
    /// Adapters where this model computes.
    ///
    /// # Errors
    /// The device has no memory left, or no kernels for a rank.
    pub fn place(&self, lora: Lora) -> Result<Adapters> {
        Ok(match self {
            Self::Cpu(_) => Adapters::Cpu(lora),
            Self::Cuda(model) => Adapters::Cuda(Box::new(cuda::Adapters::new(&lora, model.gpu())?)),
        })
    }
}

impl Adapters {
    /// What they are now.
    ///
    /// # Errors
    /// The device's, here and in the rest.
    pub fn read(&self) -> Result<Cow<'_, Lora>> {
        Ok(match self {
            Self::Cpu(lora) => Cow::Borrowed(lora),
            Self::Cuda(adapters) => Cow::Owned(adapters.read()?),
        })
    }

    /// Which there are, and of which shape; A and B are empty where they are not in memory.
    pub fn shape(&self) -> &Lora {
        match self {
            Self::Cpu(lora) => lora,
            Self::Cuda(adapters) => adapters.shape(),
        }
    }

    /// Makes them those of `lora`, which has the same shape.
    pub fn write(&mut self, lora: Lora) -> Result<()> {
        match self {
            Self::Cpu(ours) => {
                *ours = lora;
                Ok(())
            }
            Self::Cuda(adapters) => adapters.write(&lora),
        }
    }

    /// The same once more, which stay as they are while these are trained.
    pub fn copy(&self) -> Result<Self> {
        Ok(match self {
            Self::Cpu(lora) => Self::Cpu(lora.clone()),
            Self::Cuda(adapters) => Self::Cuda(Box::new(adapters.copy()?)),
        })
    }

    /// Whether every B is zero, so that a model has the same log-probs with and without them.
    pub fn add_nothing(&self) -> Result<bool> {
        Ok(self.read()?.adapters.iter().all(|adapter| adapter.b.iter().all(|b| *b == 0.0)))
    }

    pub(super) fn cpu(&self) -> &Lora {
        let Self::Cpu(lora) = self else { apart() };
        lora
    }

    pub(super) fn cuda(&self) -> &cuda::Adapters {
        let Self::Cuda(adapters) = self else { apart() };
        adapters
    }
}

impl Gradients {
    /// Gradients of zero.
    ///
    /// # Errors
    /// The device's, here and in the rest.
    pub fn zeros(adapters: &Adapters) -> Result<Self> {
        Ok(match adapters {
            Adapters::Cpu(lora) => {
                Self::Cpu { grads: LoraGrads::zeros(lora), norm: 0.0, first: None }
            }
            Adapters::Cuda(adapters) => Self::Cuda(Box::new(cuda::Gradients::zeros(adapters)?)),
        })
    }

    /// Makes all zero.
    pub fn clear(&mut self) -> Result<()> {
        match self {
            Self::Cpu { grads, norm, first } => {
                grads.clear();
                (*norm, *first) = (0.0, None);
                Ok(())
            }
            Self::Cuda(grads) => grads.clear(),
        }
    }

    /// Takes the norm, after micro-batch `number`, counted from 1, has been added. A GPU does it in its turn.
    pub fn take_norm(&mut self, number: u32) -> Result<()> {
        match self {
            Self::Cpu { grads, norm, first } => {
                *norm = grads.norm();
                if first.is_none() && !norm.is_finite() {
                    *first = Some(number);
                }
                Ok(())
            }
            Self::Cuda(grads) => grads.take_norm(number),
        }
    }

    /// The Euclidean norm over all matrices as last taken, before clipping, and the number of the first
    /// micro-batch after which it was not finite.
    pub fn norm(&self) -> Result<(f64, Option<u32>)> {
        match self {
            Self::Cpu { norm, first, .. } => Ok((*norm, *first)),
            Self::Cuda(grads) => grads.norm(),
        }
    }

    /// What they are now.
    pub fn read(&self) -> Result<Cow<'_, LoraGrads>> {
        Ok(match self {
            Self::Cpu { grads, .. } => Cow::Borrowed(grads),
            Self::Cuda(grads) => Cow::Owned(grads.read()?),
        })
    }

    pub(super) fn cpu(&mut self) -> &mut LoraGrads {
        let Self::Cpu { grads, .. } = self else { apart() };
        grads
    }

    pub(super) fn cuda(&mut self) -> &mut cuda::Gradients {
        let Self::Cuda(grads) = self else { apart() };
        grads
    }
}

impl Moments {
    /// Moments of zero.
    ///
    /// # Errors
    /// The device's, here and in the rest.
    pub fn zeros(adapters: &Adapters) -> Result<Self> {
        let zeros = |len| [vec![0.0; len], vec![0.0; len]];
        Ok(match adapters {
            Adapters::Cpu(lora) => Self::Cpu(lora.tensors().map(|t| zeros(t.data.len())).collect()),
            Adapters::Cuda(adapters) => Self::Cuda(Box::new(cuda::Moments::zeros(adapters)?)),
        })
    }

    /// One update of the adapters.
    pub fn update(
        &mut self,
        adapters: &mut Adapters,
        grads: &Gradients,
        settings: &AdamW,
    ) -> Result<()> {
        match (self, adapters, grads) {
            (Self::Cpu(moments), Adapters::Cpu(lora), Gradients::Cpu { grads, .. }) => {
                for (parameter, [m, v]) in lora.parameters_mut(grads).zip(moments) {
                    adamw::step(parameter.value, parameter.grad, m, v, settings);
                }
                Ok(())
            }
            (Self::Cuda(moments), Adapters::Cuda(adapters), Gradients::Cuda(grads)) => {
                moments.update(adapters, grads, settings)
            }
            _ => apart(),
        }
    }

    /// What they are now: of every matrix, in the order of [`Lora::tensors`].
    pub fn read(&self) -> Result<Cow<'_, [[Vec<f32>; 2]]>> {
        Ok(match self {
            Self::Cpu(moments) => Cow::Borrowed(moments),
            Self::Cuda(moments) => Cow::Owned(moments.read()?),
        })
    }

    /// The reverse of [`Self::read`].
    pub fn write(&mut self, moments: Vec<[Vec<f32>; 2]>) -> Result<()> {
        match self {
            Self::Cpu(ours) => {
                *ours = moments;
                Ok(())
            }
            Self::Cuda(ours) => ours.write(&moments),
        }
    }
}

//! AdamW over all adapter tensors, with clipping by the global norm.

use super::checkpoint;
use crate::Result;
use crate::config::schema::TrainSection;
use crate::model::lora::LoraTensor;
use crate::model::{Adapters, Gradients, Lora, Moments};
use std::borrow::Cow;
use std::collections::HashMap;
use uft_kernels::adamw;

/// AdamW's settings and what it remembers of the gradients.
pub struct Optimizer {
    settings: adamw::AdamW,
    clip: f64,
    moments: Moments,
}

impl Optimizer {
    /// # Errors
    /// The device has no memory left.
    pub fn new(train: &TrainSection, adapters: &Adapters) -> Result<Self> {
        let settings = adamw::AdamW {
            lr: 0.0,
            beta1: train.beta1,
            beta2: train.beta2,
            eps: train.eps,
            weight_decay: train.weight_decay,
            step: 0,
            grad_scale: 1.0,
        };
        Ok(Self { settings, clip: train.clip, moments: Moments::zeros(adapters)? })
    }

    /// One update at learning rate `lr`. `norm` is the gradient's, see [`Gradients::norm`].
    ///
    /// # Errors
    /// The device's.
    pub fn step(
        &mut self,
        adapters: &mut Adapters,
        grads: &Gradients,
        norm: f64,
        lr: f64,
    ) -> Result<()> {
        self.settings.step += 1;
        self.settings.lr = lr;
        // torch.nn.utils.clip_grad_norm_: the factor is clip / (norm + 1e-6), at most 1.
        self.settings.grad_scale =
            if self.clip > 0.0 { (self.clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
        self.moments.update(adapters, grads, &self.settings)
    }

    /// Updates so far.
    pub fn updates(&self) -> u64 {
        self.settings.step
    }

    /// The moments, to be written with [`tensors`].
    ///
    /// # Errors
    /// The device's.
    pub fn moments(&self) -> Result<Cow<'_, [[Vec<f32>; 2]]>> {
        self.moments.read()
    }

    /// Takes back what [`tensors`] gave.
    ///
    /// # Errors
    /// If a moment is missing or has another size, or the device fails.
    pub fn restore(
        &mut self,
        lora: &Lora,
        saved: &HashMap<String, Vec<f32>>,
        updates: u64,
    ) -> Result<()> {
        self.settings.step = updates;
        let moments = lora.tensors().map(|tensor| {
            let [m, v] = ["exp_avg", "exp_avg_sq"].map(|which| {
                let name = moment(&tensor.name, which);
                let values = checkpoint::tensor(saved, &name)?;
                match values.len() == tensor.data.len() {
                    true => Ok(values.to_vec()),
                    false => Err(checkpoint::wrong(&name)),
                }
            });
            Ok([m?, v?])
        });
        self.moments.write(moments.collect::<Result<_>>()?)
    }
}

/// Moments under PyTorch's names: `….exp_avg` and `….exp_avg_sq`.
pub fn tensors<'a>(
    lora: &'a Lora,
    moments: &'a [[Vec<f32>; 2]],
) -> impl Iterator<Item = LoraTensor<'a>> {
    lora.tensors().zip(moments).flat_map(|(tensor, [m, v])| {
        [("exp_avg", m), ("exp_avg_sq", v)].map(|(which, data)| LoraTensor {
            name: moment(&tensor.name, which),
            shape: tensor.shape,
            data,
        })
    })
}

fn moment(tensor: &str, which: &str) -> String {
    format!("{tensor}.{which}")
}

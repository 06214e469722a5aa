//! AdamW over all adapter tensors, with clipping by the global norm.

use super::checkpoint;
use crate::Result;
use crate::config::schema::TrainSection;
use crate::model::lora::LoraTensor;
use crate::model::{Lora, LoraGrads};
use std::collections::HashMap;
use uft_kernels::adamw;

/// The moments of every adapter tensor, in the order of [`Lora::parameters_mut`].
pub struct Optimizer {
    settings: adamw::AdamW,
    clip: f64,
    /// Mean of gradients, mean of squared gradients.
    moments: Vec<(Vec<f32>, Vec<f32>)>,
}

impl Optimizer {
    pub fn new(train: &TrainSection, lora: &Lora) -> Self {
        let settings = adamw::AdamW {
            lr: 0.0,
            beta1: train.beta1,
            beta2: train.beta2,
            eps: train.eps,
            weight_decay: train.weight_decay,
            step: 0,
            grad_scale: 1.0,
        };
        let moments =
            lora.tensors().map(|t| (vec![0.0; t.data.len()], vec![0.0; t.data.len()])).collect();
        Self { settings, clip: train.clip, moments }
    }

    /// One update at learning rate `lr`. `norm` is the gradient's, see [`norm`].
    pub fn step(&mut self, lora: &mut Lora, grads: &mut LoraGrads, norm: f64, lr: f64) {
        self.settings.step += 1;
        self.settings.lr = lr;
        // torch.nn.utils.clip_grad_norm_: the factor is clip / (norm + 1e-6), at most 1.
        self.settings.grad_scale =
            if self.clip > 0.0 { (self.clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
        for (parameter, (m, v)) in lora.parameters_mut(grads).zip(&mut self.moments) {
            adamw::step(parameter.value, parameter.grad, m, v, &self.settings);
        }
    }
}

impl Optimizer {
    /// Updates so far.
    pub fn updates(&self) -> u64 {
        self.settings.step
    }

    /// The moments under PyTorch's names: `….exp_avg` and `….exp_avg_sq`.
    pub fn tensors<'a>(&'a self, lora: &'a Lora) -> impl Iterator<Item = LoraTensor<'a>> {
        lora.tensors().zip(&self.moments).flat_map(|(tensor, (m, v))| {
            let named = |which, data| LoraTensor {
                name: moment(&tensor.name, which),
                shape: tensor.shape,
                data,
            };
            [named("exp_avg", m.as_slice()), named("exp_avg_sq", v.as_slice())]
        })
    }

    /// Takes back what [`tensors`](Optimizer::tensors) gave.
    ///
    /// # Errors
    /// If a moment is missing or has another size.
    pub fn restore(
        &mut self,
        lora: &Lora,
        saved: &HashMap<String, Vec<f32>>,
        updates: u64,
    ) -> Result<()> {
        self.settings.step = updates;
        for (tensor, (m, v)) in lora.tensors().zip(&mut self.moments) {
            for (values, which) in [(m, "exp_avg"), (v, "exp_avg_sq")] {
                let name = moment(&tensor.name, which);
                let from = checkpoint::tensor(saved, &name)?;
                if from.len() != values.len() {
                    return Err(checkpoint::wrong(&name));
                }
                values.copy_from_slice(from);
            }
        }
        Ok(())
    }
}

fn moment(tensor: &str, which: &str) -> String {
    format!("{tensor}.{which}")
}

/// Euclidean norm over all tensors, before clipping.
pub fn norm(grads: &LoraGrads) -> f64 {
    let squares =
        grads.adapters.iter().map(|g| adamw::norm_squared(&g.a) + adamw::norm_squared(&g.b));
    squares.sum::<f64>().sqrt()
}

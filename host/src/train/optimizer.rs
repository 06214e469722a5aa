//! AdamW over all adapter tensors, with clipping by the global norm.

use crate::config::schema::TrainSection;
use crate::model::{Lora, LoraGrads};
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

/// Euclidean norm over all tensors, before clipping.
pub fn norm(grads: &LoraGrads) -> f64 {
    let squares =
        grads.adapters.iter().map(|g| adamw::norm_squared(&g.a) + adamw::norm_squared(&g.b));
    squares.sum::<f64>().sqrt()
}

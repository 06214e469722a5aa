//! AdamW (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization"), in the order of
//! operations of `torch.optim.AdamW`.
//!
//! ```text
//! g = grad * grad_scale
//! p = p (1 - lr weight_decay)
//! m = m + (1 - beta1) (g - m)
//! v = beta2 v + (1 - beta2) g²
//! p = p - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//! ```

pub mod cuda;

use crate::math::vectorised;
use crate::parallel::elements_per_task;
use rayon::prelude::*;

const TASK: usize = elements_per_task();

/// One update's settings. They are `f64`, as in Python; each is rounded to `f32` where it meets the
/// arrays, as in PyTorch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
    /// This update's number, counted from 1.
    pub step: u64,
    /// Multiplies the gradient first: the clipping factor, or 1.
    pub grad_scale: f64,
}

impl Default for AdamW {
    /// PyTorch's, before the first update.
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            step: 0,
            grad_scale: 1.0,
        }
    }
}

/// Factors of one update, rounded to the arrays' precision.
#[derive(Clone, Copy)]
struct Factors {
    grad_scale: f32,
    decay: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    sqrt_correction2: f32,
    eps: f32,
    step_size: f32,
}

impl Factors {
    fn of(settings: &AdamW) -> Self {
        assert!(settings.step > 0, "adamw: steps count from 1");
        let exponent = settings.step as f64;
        Self {
            grad_scale: settings.grad_scale as f32,
            decay: (1.0 - settings.lr * settings.weight_decay) as f32,
            one_minus_beta1: (1.0 - settings.beta1) as f32,
            beta2: settings.beta2 as f32,
            one_minus_beta2: (1.0 - settings.beta2) as f32,
            sqrt_correction2: (1.0 - settings.beta2.powf(exponent)).sqrt() as f32,
            eps: settings.eps as f32,
            step_size: (settings.lr / (1.0 - settings.beta1.powf(exponent))) as f32,
        }
    }
}

/// Updates `param` and its moments `m`, `v` in place from `grad`, all of one length.
pub fn step(param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], settings: &AdamW) {
    let lengths = [grad.len(), m.len(), v.len()];
    assert_eq!(lengths, [param.len(); 3], "adamw: lengths differ from param's");
    let factors = Factors::of(settings);
    if param.len() <= TASK {
        return step_block(param, grad, m, v, factors);
    }
    param
        .par_chunks_mut(TASK)
        .zip(grad.par_chunks(TASK))
        .zip(m.par_chunks_mut(TASK))
        .zip(v.par_chunks_mut(TASK))
        .for_each(|(((param, grad), m), v)| step_block(param, grad, m, v, factors));
}

/// Σ x², in `f64`. Parts of fixed length are summed in order, so the result does not even depend on
/// the number of threads.
pub fn norm_squared(x: &[f32]) -> f64 {
    if x.len() <= TASK {
        return norm_squared_block(x);
    }
    let parts: Vec<f64> = x.par_chunks(TASK).map(norm_squared_block).collect();
    parts.iter().sum()
}

vectorised! {
    fn step_block(param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], by: Factors) {
        let moments = m.iter_mut().zip(v);
        for ((p, grad), (m, v)) in param.iter_mut().zip(grad).zip(moments) {
            let g = grad * by.grad_scale;
            *m += by.one_minus_beta1 * (g - *m);
            *v = *v * by.beta2 + by.one_minus_beta2 * g * g;
            let denominator = v.sqrt() / by.sqrt_correction2 + by.eps;
            *p = *p * by.decay - by.step_size * (*m / denominator);
        }
    }

    fn norm_squared_block(x: &[f32]) -> f64 {
        let (lanes, rest) = x.as_chunks::<16>();
        let mut sums = [0.0; 16];
        for x in lanes {
            for lane in 0..16 {
                sums[lane] += f64::from(x[lane]) * f64::from(x[lane]);
            }
        }
        for (lane, x) in rest.iter().enumerate() {
            sums[lane] += f64::from(*x) * f64::from(*x);
        }
        sums.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{error, random};

    pub(super) const SETTINGS: AdamW = AdamW {
        lr: 2e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 1,
        grad_scale: 0.5,
    };

    #[test]
    fn follows_the_formula_in_f64() {
        for n in [1, 100, 2 * TASK + 3] {
            let mut param = random(n, 1);
            let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
            let mut exact: Vec<[f64; 3]> =
                param.iter().map(|p| [f64::from(*p), 0.0, 0.0]).collect();
            for round in 1..=20u64 {
                let grad = random(n, 10 + round);
                let settings = AdamW { step: round, ..SETTINGS };
                step(&mut param, &grad, &mut m, &mut v, &settings);
                let correction1 = 1.0 - 0.9f64.powi(round as i32);
                let correction2 = 1.0 - 0.999f64.powi(round as i32);
                for ([p, m, v], g) in exact.iter_mut().zip(&grad) {
                    let g = f64::from(*g) * 0.5;
                    *p *= 1.0 - 2e-3 * 0.1;
                    *m = 0.9 * *m + 0.1 * g;
                    *v = 0.999 * *v + 0.001 * g * g;
                    let denominator = (*v / correction2).sqrt() + 1e-8;
                    *p -= 2e-3 * (*m / correction1) / denominator;
                }
            }
            let column = |i: usize| exact.iter().map(|row| row[i]).collect::<Vec<f64>>();
            // Twenty roundings of values up to 5, and of steps of 2e-3.
            assert!(error(&param, &column(0)) < 5e-6);
            assert!(error(&m, &column(1)) < 1e-6);
            assert!(error(&v, &column(2)) < 1e-7);
        }
    }

    /// By hand for one number: with one step the corrected moments are g and g², so the update is
    /// lr * g / (|g| + eps) after the decay.
    #[test]
    fn the_first_step_moves_by_the_learning_rate() {
        let (mut p, mut m, mut v) = ([1.0f32], [0.0], [0.0]);
        step(&mut p, &[4.0], &mut m, &mut v, &SETTINGS);
        assert!((f64::from(p[0]) - (1.0 - 2e-4 - 2e-3)).abs() < 1e-7);
        assert!((m[0] - 0.2).abs() < 1e-7 && (v[0] - 0.004).abs() < 1e-8);
    }

    #[test]
    fn norm_agrees_with_f64_and_ignores_the_thread_count() {
        for n in [0, 1, 37, 5 * TASK + 11] {
            let x = random(n, 1);
            let exact: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
            let found = norm_squared(&x);
            assert!((found - exact).abs() <= 1e-12 * exact);
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                assert_eq!(pool.unwrap().install(|| norm_squared(&x)), found);
            }
        }
    }
}

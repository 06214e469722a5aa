//! The gated activation of the feed-forward block (Shazeer 2020, "GLU Variants Improve Transformer").
//!
//! ```text
//! σ = 1 / (1 + e^-gate)
//! forward    out   = gate σ up
//! backward   dup   = dout gate σ
//!            dgate = dout up σ (1 + gate (1 - σ))
//! ```

pub mod cuda;

use crate::math::{exp, vectorised};
use crate::parallel::elements_per_task;
use rayon::prelude::*;

const TASK: usize = elements_per_task();

/// `out = silu(gate) up`, all of one length. Overwrites `out`.
pub fn forward(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert_eq!(gate.len(), up.len(), "swiglu: gate and up differ in length");
    assert_eq!(gate.len(), out.len(), "swiglu: gate and out differ in length");
    if out.len() <= TASK {
        return forward_block(gate, up, out);
    }
    gate.par_chunks(TASK)
        .zip(up.par_chunks(TASK))
        .zip(out.par_chunks_mut(TASK))
        .for_each(|((gate, up), out)| forward_block(gate, up, out));
}

/// The gradients of [`forward`], from `gate` and `up` alone, all of one length. Overwrites `dgate`
/// and `dup`.
pub fn backward(dout: &[f32], gate: &[f32], up: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    let lengths = [gate.len(), up.len(), dgate.len(), dup.len()];
    assert_eq!(lengths, [dout.len(); 4], "swiglu: lengths differ from dout's");
    if dout.len() <= TASK {
        return backward_block(dout, gate, up, dgate, dup);
    }
    dout.par_chunks(TASK)
        .zip(gate.par_chunks(TASK))
        .zip(up.par_chunks(TASK))
        .zip(dgate.par_chunks_mut(TASK))
        .zip(dup.par_chunks_mut(TASK))
        .for_each(|((((dout, gate), up), dgate), dup)| backward_block(dout, gate, up, dgate, dup));
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

vectorised! {
    fn forward_block(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate * sigmoid(*gate) * up;
        }
    }

    fn backward_block(dout: &[f32], gate: &[f32], up: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        let inputs = dout.iter().zip(gate).zip(up);
        let outputs = dgate.iter_mut().zip(dup);
        for (((dout, gate), up), (dgate, dup)) in inputs.zip(outputs) {
            let sigma = sigmoid(*gate);
            let silu = gate * sigma;
            *dup = dout * silu;
            *dgate = dout * up * (sigma + silu * (1.0 - sigma));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Real, assert_accurate, assert_is_slope, cast, poison, random};

    fn silu<R: Real>(x: R) -> R {
        x / (R::of(1.0) + (-x).exp())
    }

    pub(super) fn reference_forward<R: Real>(gate: &[R], up: &[R]) -> Vec<R> {
        gate.iter().zip(up).map(|(g, u)| silu(*g) * *u).collect()
    }

    pub(super) fn reference_backward<R: Real>(
        dout: &[R],
        gate: &[R],
        up: &[R],
    ) -> (Vec<R>, Vec<R>) {
        let one = R::of(1.0);
        let each = (0..dout.len()).map(|i| {
            let sigma = one / (one + (-gate[i]).exp());
            let slope = sigma * (one + gate[i] * (one - sigma));
            (dout[i] * up[i] * slope, dout[i] * silu(gate[i]))
        });
        each.unzip()
    }

    #[test]
    fn both_directions_agree_with_f64() {
        for n in [1, 31, 1000, 2 * TASK + 17] {
            // Three standard deviations are not all there is: some gates are far out.
            let gate: Vec<f32> = random(n, 1).iter().map(|x| 5.0 * x).collect();
            let (up, dout) = (random(n, 2), random(n, 3));
            let (mut out, mut dgate, mut dup) = (poison(n), poison(n), poison(n));
            forward(&gate, &up, &mut out);
            backward(&dout, &gate, &up, &mut dgate, &mut dup);
            let exact = reference_forward::<f64>(&cast(&gate), &cast(&up));
            assert_accurate("out", &out, &reference_forward(&gate, &up), &exact);
            let plain = reference_backward::<f32>(&dout, &gate, &up);
            let exact = reference_backward::<f64>(&cast(&dout), &cast(&gate), &cast(&up));
            assert_accurate("dgate", &dgate, &plain.0, &exact.0);
            assert_accurate("dup", &dup, &plain.1, &exact.1);
        }
    }

    #[test]
    fn the_reference_gradient_is_the_slope() {
        let (gate, up, dout) = (random(9, 1), random(9, 2), random(9, 3));
        let (gate, up, dout): (Vec<f64>, Vec<f64>, Vec<f64>) =
            (cast(&gate), cast(&up), cast(&dout));
        let loss = |gate: &[f64], up: &[f64]| -> f64 {
            let out = reference_forward(gate, up);
            out.iter().zip(&dout).map(|(o, d)| o * d).sum()
        };
        let (dgate, dup) = reference_backward(&dout, &gate, &up);
        assert_is_slope(|gate| loss(gate, &up), &gate, &dgate);
        assert_is_slope(|up| loss(&gate, up), &up, &dup);
    }

    #[test]
    fn extreme_gates_stay_finite() {
        let gate = [-1e4, -100.0, -88.5, 88.5, 100.0, 1e4];
        let (mut out, mut dgate, mut dup) = (poison(6), poison(6), poison(6));
        forward(&gate, &[1.0; 6], &mut out);
        backward(&[1.0; 6], &gate, &[1.0; 6], &mut dgate, &mut dup);
        for i in 0..6 {
            let (value, slope) = if gate[i] < 0.0 { (0.0, 0.0) } else { (gate[i], 1.0) };
            assert!((out[i] - value).abs() < 1e-30 && (dup[i] - value).abs() < 1e-30);
            assert!((dgate[i] - slope).abs() < 1e-30);
        }
    }
}

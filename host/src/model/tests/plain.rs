//! A plain run in bf16, as a yardstick for the device: every op of the decoder by itself, by the processor's
//! kernels, its inputs in bf16 and its output rounded to it; every row, nothing left out.

use super::*;
use crate::model::decoder::Decoder;
use crate::model::frozen::Frozen;
use crate::model::linear::Linear;
use crate::model::lora::{Adapter, AdapterGrad};
use crate::model::targets::{Projection, Site};
use half::bf16;
use uft_kernels::matmul::{Weight, nn, nt, tn};
use uft_kernels::{attention, rmsnorm, swiglu};

type Numbers = Vec<f32>;
/// A block's way back: from the gradient to its output to that to its input, with the adapters'.
type WayBack<'a> = dyn Fn(Numbers, &mut LoraGrads) -> Numbers + 'a;

fn rounded(values: Numbers) -> Numbers {
    values.into_iter().map(|value| bf16::from_f32(value).to_f32()).collect()
}

fn weight(frozen: &Frozen) -> Numbers {
    let weight = Weight::from(frozen);
    let mut wide = vec![0.0; weight.len()];
    weight.widen(&mut wide);
    rounded(wide)
}

/// `op` into `len` zeros, rounded.
fn of(len: usize, op: impl FnOnce(&mut [f32])) -> Numbers {
    let mut out = vec![0.0; len];
    op(&mut out);
    rounded(out)
}

fn plus(a: &[f32], b: &[f32]) -> Numbers {
    rounded(a.iter().zip(b).map(|(a, b)| a + b).collect())
}

/// `x` and what the way back needs of a projection of it.
struct Projected<'a> {
    linear: &'a Linear,
    adapter: Option<(usize, &'a Adapter)>,
    x: Numbers,
    u: Numbers,
}

pub struct Plain<'a> {
    model: &'a Decoder,
    lora: &'a Lora,
    packed: &'a Packed,
}

impl<'a> Plain<'a> {
    pub fn new(model: &'a Decoder, lora: &'a Lora, packed: &'a Packed) -> Self {
        Self { model, lora, packed }
    }

    fn project(&self, linear: &'a Linear, site: Site, x: &[f32]) -> (Numbers, Projected<'a>) {
        let (k, n) = (linear.inputs, linear.outputs);
        let m = x.len() / k;
        let w = weight(&linear.weight);
        let mut y = of(m * n, |y| nt(x, &w, y, m, k, n, 1.0, 0.0));
        if let Some(bias) = &linear.bias {
            let bias = rounded(bias.clone());
            y = plus(&y, &bias.iter().copied().cycle().take(m * n).collect::<Numbers>());
        }
        let adapter = self.lora.index(site).map(|at| (at, &self.lora.adapters[at]));
        let mut u = Vec::new();
        if let Some((_, Adapter { a, b, rank, scale, .. })) = adapter {
            let (a, b) = (rounded(a.clone()), rounded(b.clone()));
            u = of(m * rank, |u| nt(x, &a, u, m, k, *rank, 1.0, 0.0));
            y = plus(&y, &of(m * n, |y| nt(&u, &b, y, m, *rank, n, *scale, 0.0)));
        }
        (y, Projected { linear, adapter, x: x.to_vec(), u })
    }

    fn pull(&self, from: &Projected, dy: &[f32], grads: &mut LoraGrads) -> Numbers {
        let (k, n) = (from.linear.inputs, from.linear.outputs);
        let m = dy.len() / n;
        let w = weight(&from.linear.weight);
        let mut dx = of(m * k, |dx| nn(dy, &w, dx, m, n, k, 1.0, 0.0));
        if let Some((at, Adapter { a, b, rank, scale, .. })) = from.adapter {
            let (a, b) = (rounded(a.clone()), rounded(b.clone()));
            let AdapterGrad { a: da, b: db } = &mut grads.adapters[at];
            let du = of(m * rank, |du| nn(dy, &b, du, m, n, *rank, *scale, 0.0));
            tn(dy, &from.u, db, m, n, *rank, *scale, 1.0);
            tn(&du, &from.x, da, m, *rank, k, 1.0, 1.0);
            dx = plus(&dx, &of(m * k, |dx| nn(&du, &a, dx, m, *rank, k, 1.0, 0.0)));
        }
        dx
    }

    fn norm(&self, x: &[f32], w: &[f32]) -> (Numbers, Numbers) {
        let mut roots = vec![0.0; x.len() / w.len()];
        let eps = self.model.config.norm_eps;
        let y = of(x.len(), |y| rmsnorm::forward(x, &rounded(w.to_vec()), eps, y, &mut roots));
        (y, roots)
    }

    fn norm_back(&self, dy: &[f32], x: &[f32], w: &[f32], roots: &[f32]) -> Numbers {
        of(x.len(), |dx| rmsnorm::backward(dy, x, &rounded(w.to_vec()), roots, dx))
    }

    /// The log-probs of the batch's targets, and the gradient of `Σ dlogp logp`.
    pub fn run(&self, dlogp: &[f32]) -> (Vec<f32>, LoraGrads) {
        let Self { model, packed, lora } = self;
        let (config, layout) = (&model.config, &packed.layout);
        let (h, heads, positions) = (config.hidden, &config.heads, &layout.positions);
        let table = weight(&model.embedding);
        let mut x: Numbers = packed.tokens.iter().flat_map(|&t| row(&table, t, h)).collect();
        let mut back: Vec<Box<WayBack>> = Vec::new();
        for layer in &model.layers {
            let site = |projection| Site::Layer(layer.index, projection);
            let window = config.windows[layer.index];
            let below = x.clone();
            let (normed, roots) = self.norm(&x, &layer.input_norm);
            let (mut q, of_q) = self.project(&layer.q, site(Projection::Q), &normed);
            let (mut k, of_k) = self.project(&layer.k, site(Projection::K), &normed);
            let (v, of_v) = self.project(&layer.v, site(Projection::V), &normed);
            let before = layer.head_norms.as_ref().map(|[q_norm, k_norm]| {
                [(&mut q, q_norm), (&mut k, k_norm)].map(|(x, w)| {
                    let (normed, roots) = self.norm(x, w);
                    (std::mem::replace(x, normed), roots)
                })
            });
            model.rope.forward(&mut q, heads.heads, positions);
            model.rope.forward(&mut k, heads.kv_heads, positions);
            let (q, k) = (rounded(q), rounded(k));
            let mut lse = vec![0.0; packed.rows() * heads.heads];
            let attended = of(q.len(), |out| {
                attention::forward(&q, &k, &v, layout, heads, window, out, &mut lse);
            });
            let (o, of_o) = self.project(&layer.o, site(Projection::O), &attended);
            let mid = plus(&x, &o);
            let (normed, mid_roots) = self.norm(&mid, &layer.mlp_norm);
            let (gate, of_gate) = self.project(&layer.gate, site(Projection::Gate), &normed);
            let (up, of_up) = self.project(&layer.up, site(Projection::Up), &normed);
            let act = of(gate.len(), |act| swiglu::forward(&gate, &up, act));
            let (down, of_down) = self.project(&layer.down, site(Projection::Down), &act);
            x = plus(&mid, &down);
            back.push(Box::new(move |d: Numbers, grads: &mut LoraGrads| {
                let dact = self.pull(&of_down, &d, grads);
                let (mut dgate, mut dup) = (vec![0.0; gate.len()], vec![0.0; up.len()]);
                swiglu::backward(&dact, &gate, &up, &mut dgate, &mut dup);
                let (dgate, dup) = (rounded(dgate), rounded(dup));
                let dh = plus(&self.pull(&of_gate, &dgate, grads), &self.pull(&of_up, &dup, grads));
                let d = plus(&d, &self.norm_back(&dh, &mid, &layer.mlp_norm, &mid_roots));
                let dout = self.pull(&of_o, &d, grads);
                let (mut dq, mut dk) = (vec![0.0; q.len()], vec![0.0; k.len()]);
                let mut dv = vec![0.0; v.len()];
                attention::backward(
                    &dout, &q, &k, &v, &attended, &lse, layout, heads, window, &mut dq, &mut dk,
                    &mut dv,
                );
                let (mut dq, mut dk, dv) = (rounded(dq), rounded(dk), rounded(dv));
                model.rope.backward(&mut dq, heads.heads, positions);
                model.rope.backward(&mut dk, heads.kv_heads, positions);
                let (mut dq, mut dk) = (rounded(dq), rounded(dk));
                if let (Some(weights), Some(before)) = (&layer.head_norms, &before) {
                    for ((d, w), (x, roots)) in
                        [&mut dq, &mut dk].into_iter().zip(weights).zip(before)
                    {
                        *d = self.norm_back(d, x, w, roots);
                    }
                }
                let dh = plus(&self.pull(&of_q, &dq, grads), &self.pull(&of_k, &dk, grads));
                let dh = plus(&dh, &self.pull(&of_v, &dv, grads));
                plus(&d, &self.norm_back(&dh, &below, &layer.input_norm, &roots))
            }));
        }
        let (normed, roots) = self.norm(&x, &model.norm);
        let targets = &packed.targets;
        let hidden: Numbers = targets.rows.iter().flat_map(|&r| row(&normed, r, h)).collect();
        let head = Linear {
            weight: Frozen::Owned(weight(model.head.as_ref().unwrap_or(&model.embedding))),
            bias: None,
            inputs: h,
            outputs: config.vocab,
        };
        let (m, vocab) = (targets.tokens.len(), config.vocab);
        let mut grads = LoraGrads::zeros(lora);
        // The head outlives no closure of the layers, so it is written out.
        let plain_head = Plain::new(model, lora, packed);
        let (mut logits, of_head) = plain_head.project(&head, Site::Head, &hidden);
        let mut logps = Vec::with_capacity(m);
        for ((logits, &token), d) in logits.chunks_exact_mut(vocab).zip(&targets.tokens).zip(dlogp)
        {
            let top = logits.iter().copied().fold(f32::MIN, f32::max);
            let sum: f32 = logits.iter().map(|l| (l - top).exp()).sum();
            logps.push(logits[token as usize] - top - sum.ln());
            logits.iter_mut().for_each(|l| *l = -d * (*l - top).exp() / sum);
            logits[token as usize] += d;
        }
        let dhidden = plain_head.pull(&of_head, &rounded(logits), &mut grads);
        let mut dnormed = vec![0.0; normed.len()];
        for (d, &to) in dhidden.chunks_exact(h).zip(&targets.rows) {
            let sum = plus(&dnormed[to as usize * h..][..h], d);
            dnormed[to as usize * h..][..h].copy_from_slice(&sum);
        }
        let mut d = self.norm_back(&dnormed, &x, &model.norm, &roots);
        while let Some(layer) = back.pop() {
            d = layer(d, &mut grads);
        }
        (logps, grads)
    }
}

fn row(table: &[f32], index: u32, width: usize) -> Numbers {
    table[index as usize * width..][..width].to_vec()
}

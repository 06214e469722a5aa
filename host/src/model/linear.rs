//! One linear layer with its adapter: `y = x Wᵀ + b + s (x Aᵀ) Bᵀ`, W and b frozen.
//!
//! ```text
//! forward    u = x Aᵀ                     y += s u Bᵀ
//! backward   du = s dy B                  dB += s dyᵀ u      dA += duᵀ x
//!            dx = dy W + du A
//! ```
//!
//! m rows, `in` and `out` widths, r rank. With B = 0 the adapter adds an exact zero to every element
//! of y, so a fresh adapter and no adapter give the same bits.
//!
//! A product with a rank in it computes little for what it reads. So layers with the same x, such as q, k and v,
//! read it once for all of their adapters, whose A stand below each other, R ranks together.

use super::buffers::{Buffer, Pool};
use super::frozen::Frozen;
use super::layer::Context;
use super::lora::{Adapter, Lora, LoraGrads};
use super::weights;
use std::ops::Deref;
use uft_kernels::elementwise;
use uft_kernels::matmul::{Weight, adapter_backward, nn, nt, nt_few, tn};

/// Which product a forward pass takes.
#[derive(Clone, Copy, Debug)]
pub enum Product {
    /// Every row has the same bits in any company.
    Batch,
    /// The quickest way for a single token.
    Token,
}

impl Product {
    /// As [`uft_kernels::matmul::nt`].
    fn nt<'w>(
        self,
        x: &[f32],
        w: impl Into<Weight<'w>>,
        y: &mut [f32],
        m: usize,
        k: usize,
        n: usize,
        alpha: f32,
        beta: f32,
    ) {
        match self {
            Self::Batch => nt(x, w, y, m, k, n, alpha, beta),
            Self::Token => nt_few(x, w, y, m, k, n, alpha, beta),
        }
    }
}

/// A frozen linear layer, in memory.
pub type Linear = weights::Linear<Frozen, Vec<f32>>;

impl Linear {
    /// `y = beta y + x Wᵀ + b + s u Bᵀ` with `x`: `[m, in]`, `y`: `[m, out]`, `beta` 0 or 1, and u as
    /// [`project`] gives it.
    pub fn forward(
        &self,
        x: &[f32],
        adapter: Option<(&Adapter, &Buffer)>,
        y: &mut [f32],
        beta: f32,
        product: Product,
    ) {
        let (m, k, n) = (x.len() / self.inputs, self.inputs, self.outputs);
        match &self.bias {
            None => product.nt(x, &self.weight, y, m, k, n, 1.0, beta),
            Some(bias) => {
                for y in y.chunks_exact_mut(n) {
                    y.iter_mut().zip(bias).for_each(|(y, b)| {
                        *y = if beta == 0.0 { *b } else { *y + b };
                    });
                }
                product.nt(x, &self.weight, y, m, k, n, 1.0, 1.0);
            }
        }
        if let Some((adapter, u)) = adapter {
            product.nt(u, &adapter.b, y, m, adapter.rank, n, adapter.scale, 1.0);
        }
    }
}

/// u: `[m, r]` of the adapters of layers with the same `x`: `[m, in]`.
pub fn project<const N: usize>(
    x: &[f32],
    adapters: [Option<&Adapter>; N],
    with: Context,
) -> [Option<Buffer>; N] {
    let present: Vec<&Adapter> = adapters.iter().flatten().copied().collect();
    let Some(first) = present.first() else { return [(); N].map(|()| None) };
    let (m, k) = (x.len() / first.inputs, first.inputs);
    let a = Stacked::of(&present, with.pool);
    let ranks = a.len() / k;
    let mut joint = with.pool.take(m * ranks);
    with.product.nt(x, &a[..], &mut joint, m, k, ranks, 1.0, 0.0);
    drop(a);
    if present.len() == 1 {
        let mut joint = Some(joint);
        return adapters.map(|adapter| adapter.and_then(|_| joint.take()));
    }
    let mut start = 0;
    adapters.map(|adapter| {
        let r = adapter?.rank;
        let mut u = with.pool.take(m * r);
        for (u, joint) in u.chunks_exact_mut(r).zip(joint.chunks_exact(ranks)) {
            u.copy_from_slice(&joint[start..start + r]);
        }
        start += r;
        Some(u)
    })
}

/// On the way back, one of the layers with the same x.
pub struct Output<'a> {
    pub linear: &'a Linear,
    /// `[m, out]`: the gradient to y.
    pub dy: &'a [f32],
    /// Its adapter's place in [`Lora::adapters`], and u.
    pub adapter: Option<(usize, &'a Buffer)>,
}

/// Adds the gradients of the adapters of layers with the same `x` to `grads`, and turns `dx` into
/// the sum of all `dy W + du A`, where it is given; `x`, `dx`: `[m, in]`. `x` is only read where there is an adapter.
pub fn backward(
    x: &[f32],
    outputs: &[Output],
    mut dx: Option<&mut [f32]>,
    lora: &Lora,
    grads: &mut LoraGrads,
    pool: &Pool,
) {
    if let Some(dx) = dx.as_deref_mut() {
        for (index, Output { linear, dy, .. }) in outputs.iter().enumerate() {
            let (k, n) = (linear.inputs, linear.outputs);
            let beta = if index == 0 { 0.0 } else { 1.0 };
            nn(dy, &linear.weight, dx, dy.len() / n, n, k, 1.0, beta);
        }
    }
    // Of those with an adapter: dy, the adapter's place, u.
    let adapted: Vec<(&[f32], usize, &Buffer)> = outputs
        .iter()
        .filter_map(|Output { dy, adapter, .. }| adapter.map(|(at, u)| (*dy, at, u)))
        .collect();
    let present: Vec<&Adapter> = adapted.iter().map(|(_, at, _)| &lora.adapters[*at]).collect();
    let Some(first) = present.first() else { return };
    let (m, k) = (x.len() / first.inputs, first.inputs);
    let ranks = present.iter().map(|adapter| adapter.rank).sum();
    let mut du = pool.take(m * ranks);
    let mut start = 0;
    for (&(dy, at, u), adapter) in adapted.iter().zip(&present) {
        let &&Adapter { ref b, outputs: n, rank: r, scale, .. } = adapter;
        let db = &mut grads.adapters[at].b;
        adapter_backward(dy, u, b, &mut du[start..], ranks, db, m, n, r, scale);
        start += r;
    }
    if let [(_, at, _)] = adapted[..] {
        tn(&du, x, &mut grads.adapters[at].a, m, ranks, k, 1.0, 1.0);
    } else {
        let mut da = pool.take(ranks * k);
        tn(&du, x, &mut da, m, ranks, k, 1.0, 0.0);
        let mut rest = &da[..];
        for &(_, at, _) in &adapted {
            let own = &mut grads.adapters[at].a;
            let (da, after) = rest.split_at(own.len());
            elementwise::add(own, da);
            rest = after;
        }
    }
    if let Some(dx) = dx {
        nn(&du, &Stacked::of(&present, pool)[..], dx, m, ranks, k, 1.0, 1.0);
    }
}

/// A: `[R, in]` of adapters of layers with the same x.
enum Stacked<'a> {
    One(&'a [f32]),
    Copy(Buffer),
}

impl<'a> Stacked<'a> {
    fn of(adapters: &[&'a Adapter], pool: &Pool) -> Self {
        if let [adapter] = adapters {
            return Self::One(&adapter.a);
        }
        let mut copy = pool.take(adapters.iter().map(|adapter| adapter.a.len()).sum());
        let mut start = 0;
        for Adapter { a, .. } in adapters {
            copy[start..start + a.len()].copy_from_slice(a);
            start += a.len();
        }
        Self::Copy(copy)
    }
}

impl Deref for Stacked<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::One(a) => a,
            Self::Copy(copy) => copy,
        }
    }
}

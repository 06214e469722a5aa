//! One linear layer with its adapter: `y = x Wᵀ + b + s (x Aᵀ) Bᵀ`, W and b frozen; the twin of
//! [`super::super::linear`].
//!
//! ```text
//! forward    u = x Aᵀ                     y  = x Wᵀ + b + u (s B)ᵀ      one product
//! backward   du = dy (s B)                dB += s dyᵀ u
//!            dA += duᵀ x                  dx = dy W + du A              one product
//! ```
//!
//! Layers with the same x, such as q, k and v, read it once for all of their u, and once more for all of their dA. Gradients go along
//! with a product: on compute capability 9.0 that is where they are made, dB too; elsewhere dB is made with du, in one visit to dy.
//!
//! m rows, `in` and `out` widths, r rank, R the padded one. With B = 0 the adapter adds exact zeros to every sum,
//! so a fresh adapter and no adapter give the same numbers.

use super::Context;
use super::adapters::{Adapter, Grad};
use crate::Result;
use crate::model::weights;
use half::bf16;
use uft_kernels::cuda::{DeviceBuffer, DeviceSlice};
use uft_kernels::matmul::cuda::adapter::{
    Gradient, GradientOfA, GradientOfB, Input, Projected, add_to_gradients, gradients_wait, padded,
    pull,
};
use uft_kernels::matmul::cuda::fused::{self, Weight};
use uft_kernels::matmul::cuda::{Adapter as Part, Layer, adapter, few, nn_together, nt};
use uft_kernels::{rope, swiglu};

/// Which product a forward pass takes.
#[derive(Clone, Copy, Debug)]
pub enum Product {
    /// Every row has the same bits in any company.
    Batch,
    /// The quickest way for a single token.
    Token,
}

impl Product {
    /// As [`nt`].
    fn nt(
        self,
        with: Context,
        x: &DeviceSlice<bf16>,
        w: &DeviceSlice<bf16>,
        y: &mut DeviceSlice<bf16>,
        m: usize,
        k: usize,
        n: usize,
        beta: f32,
        bias: Option<&DeviceSlice<bf16>>,
        adapter: Option<Part>,
    ) -> Result<()> {
        let _: () = match self {
            Self::Batch => nt(with.gpu, x, w, y, m, k, n, beta, bias, adapter)?,
            Self::Token => few(with.gpu, x, w, y, m, k, n, beta, bias, adapter)?,
        };
        Ok(())
    }
}

/// A frozen linear layer, on a device.
pub type Linear = weights::Linear<DeviceBuffer<bf16>, DeviceBuffer<bf16>>;

impl Linear {
    /// `y = x Wᵀ + b + s u Bᵀ` with `x`: `[m, in]`, `y`: `[m, out]`, and u as [`project`] gives it.
    pub fn forward(
        &self,
        x: &DeviceSlice<bf16>,
        part: Option<Part>,
        y: &mut DeviceSlice<bf16>,
        with: Context,
    ) -> Result<()> {
        let (m, k, n) = (x.len() / self.inputs, self.inputs, self.outputs);
        with.product.nt(with, x, &self.weight, y, m, k, n, 0.0, self.bias.as_deref(), part)
    }

    /// [`Self::forward`], and `before`: `[m, out]` added.
    pub fn forward_added(
        &self,
        x: &DeviceSlice<bf16>,
        part: Option<Part>,
        before: &DeviceSlice<bf16>,
        y: &mut DeviceSlice<bf16>,
        with: Context,
    ) -> Result<()> {
        let (m, k, n) = (x.len() / self.inputs, self.inputs, self.outputs);
        if let Product::Token = with.product {
            with.gpu.copy(before, y)?;
            let (w, bias) = (&self.weight, self.bias.as_deref());
            return with.product.nt(with, x, w, y, m, k, n, 1.0, bias, part);
        }
        Ok(fused::nt_added(with.gpu, x, self.weight_with(part), before, y, m, k, n)?)
    }

    /// [`Self::forward`], and y's heads rotated by `positions`: `[m]`.
    pub fn forward_rotated(
        &self,
        x: &DeviceSlice<bf16>,
        part: Option<Part>,
        y: &mut DeviceSlice<bf16>,
        positions: &DeviceSlice<u32>,
        with: Context,
    ) -> Result<()> {
        if let Product::Token = with.product {
            self.forward(x, part, y, with)?;
            let heads = self.outputs / with.config.heads.head_dim;
            return Ok(rope::cuda::forward(with.gpu, with.rope, y, heads, positions)?);
        }
        let (m, k, n) = (positions.len(), self.inputs, self.outputs);
        let weight = self.weight_with(part);
        Ok(fused::nt_rope(with.gpu, x, weight, y, m, k, n, with.rope, positions)?)
    }

    /// [`Self::forward`] of two layers with the same input, and the gated activation of what they make: `gate`, `up`, `out`:
    /// `[m, out]`. Returns what [`project`] makes of `out` for `next`.
    pub fn forward_activated(
        layers: [&Self; 2],
        x: &DeviceSlice<bf16>,
        parts: [Option<Part>; 2],
        gate: &mut DeviceSlice<bf16>,
        up: &mut DeviceSlice<bf16>,
        out: &mut DeviceSlice<bf16>,
        next: Option<Adapter>,
        with: Context,
    ) -> Result<Option<DeviceBuffer<bf16>>> {
        let [of_gate, of_up] = layers;
        if let Product::Token = with.product {
            of_gate.forward(x, parts[0], gate, with)?;
            of_up.forward(x, parts[1], up, with)?;
            swiglu::cuda::forward(with.gpu, gate, up, out)?;
            let [u] = project(out, [next], with)?;
            return Ok(u);
        }
        let (m, k, n) = (x.len() / of_gate.inputs, of_gate.inputs, of_gate.outputs);
        let weights = [of_gate.weight_with(parts[0]), of_up.weight_with(parts[1])];
        let mut u = next.map(|next| with.take(m * padded(next.rank))).transpose()?;
        let next = next.zip(u.as_deref_mut());
        let next = next.map(|(Adapter { a, rank, .. }, u)| Projected { a, u, rank });
        let (gpu, arena) = (with.gpu, with.arena);
        fused::nt_swiglu(gpu, arena, x, weights, gate, up, out, next, m, k, n)?;
        Ok(u)
    }

    fn weight_with<'a>(&'a self, adapter: Option<Part<'a>>) -> Weight<'a> {
        Weight { w: &self.weight, bias: self.bias.as_deref(), adapter }
    }

    /// Of a layer whose input is a gated activation, of `gate` and `up`: `[m, in]`: turns these into their gradients, and `act`, if
    /// it is asked for, into that input once more; and makes du of what is `pulled` of the layers that made gate and up.
    pub fn backward_activated(
        &self,
        dy: &DeviceSlice<bf16>,
        part: Option<Part>,
        gate: &mut DeviceSlice<bf16>,
        up: &mut DeviceSlice<bf16>,
        act: Option<&mut DeviceSlice<bf16>>,
        pulled: [Option<fused::Pulled>; 2],
        with: Context,
    ) -> Result<()> {
        let (m, i, n) = (dy.len() / self.outputs, self.inputs, self.outputs);
        let (gpu, arena, w) = (with.gpu, with.arena, &self.weight);
        Ok(fused::nn_swiglu_backward(gpu, arena, dy, w, part, gate, up, act, pulled, m, n, i)?)
    }

    /// du, with which the way back goes on, unless it has been `made`, and dB, unless it was made with it.
    pub fn pull<'a>(
        &self,
        dy: &'a DeviceSlice<bf16>,
        Trained { adapter, grad, u }: Trained<'a>,
        made: Option<DeviceBuffer<bf16>>,
        with: Context,
    ) -> Result<(Pulled<'a>, Option<Gradient<'a>>)> {
        let (m, n) = (dy.len() / self.outputs, self.outputs);
        let (rank, scale) = (adapter.rank, adapter.scale);
        let of_b = GradientOfB { dy, u, db: grad.b, rank, scale };
        if let Some(du) = made {
            return Ok((Pulled { adapter, grad: grad.a, du }, Some(Gradient::B(of_b))));
        }
        let mut du = with.take(m * padded(rank))?;
        let of_b = pull(with.gpu, with.arena, of_b, adapter.b, &mut du, m, n)?;
        Ok((Pulled { adapter, grad: grad.a, du }, of_b))
    }
}

/// u: `[m, R]` of the adapters of layers with the same `x`: `[m, in]`; the way back needs them, too.
pub fn project<const N: usize>(
    x: &DeviceSlice<bf16>,
    adapters: [Option<Adapter>; N],
    with: Context,
) -> Result<[Option<DeviceBuffer<bf16>>; N]> {
    let Some(first) = adapters.iter().flatten().next() else { return Ok([const { None }; N]) };
    let k = first.a.len() / padded(first.rank);
    let m = x.len() / k;
    let mut all = [const { None }; N];
    for (u, adapter) in all.iter_mut().zip(&adapters) {
        *u = adapter.map(|adapter| with.take(m * padded(adapter.rank))).transpose()?;
    }
    let each = all.iter_mut().flatten().zip(adapters.into_iter().flatten());
    if let Product::Token = with.product {
        for (u, Adapter { a, rank, .. }) in each {
            few(with.gpu, x, a, u, m, k, padded(rank), 0.0, None, None)?;
        }
        return Ok(all);
    }
    let each = each.map(|(u, Adapter { a, rank, .. })| Projected { a, u, rank });
    let mut each: Vec<Projected> = each.collect();
    adapter::project(with.gpu, x, &mut each, m, k)?;
    drop(each);
    Ok(all)
}

/// The adapters' parts in forward products.
pub fn parts<'a, const N: usize>(
    adapters: [Option<Adapter<'a>>; N],
    u: &'a [Option<DeviceBuffer<bf16>>; N],
) -> [Option<Part<'a>>; N] {
    std::array::from_fn(|i| {
        let (Adapter { b, rank, .. }, u) = adapters[i].zip(u[i].as_deref())?;
        Some(Part { left: u, right: b, rank })
    })
}

/// On the way back, one of the layers with the same input.
pub struct Output<'a> {
    pub linear: &'a Linear,
    /// `[m, out]`: the gradient to y.
    pub dy: &'a DeviceSlice<bf16>,
    pub adapter: Option<Trained<'a>>,
    /// du: `[m, R]`, where it was made with dy.
    pub du: Option<DeviceBuffer<bf16>>,
}

/// Turns `dx`: `[m, in]`, where it is given, into the sum of all `dy W + du A` of layers with the same input, and adds to the gradients
/// of their adapters and those that are `waiting`. Only adapters read the input.
pub fn backward<'a, const N: usize>(
    input: Input<'a>,
    outputs: [Output<'a>; N],
    dx: Option<&mut DeviceSlice<bf16>>,
    waiting: Vec<Gradient<'a>>,
    with: Context,
) -> Result<()> {
    let layers = outputs.each_ref().map(|Output { linear, dy, .. }| (*linear, *dy));
    let (k, n, dy) = (layers[0].0.inputs, layers[0].0.outputs, layers[0].1);
    let m = dy.len() / n;
    let (mut waiting, mut pulled): (Vec<Gradient>, _) = (waiting, [const { None }; N]);
    for (pulled, Output { linear, dy, adapter, du }) in pulled.iter_mut().zip(outputs) {
        let Some(adapter) = adapter else { continue };
        let (of_layer, of_b) = linear.pull(dy, adapter, du, with)?;
        *pulled = Some(of_layer);
        waiting.extend(of_b);
    }
    let mut adapters = Vec::new();
    let parts = pulled.each_mut().map(|pulled| {
        let (part, of_a) = pulled.as_mut()?.split();
        adapters.push(of_a);
        Some(part)
    });
    if !adapters.is_empty() {
        waiting.push(Gradient::A { input, k, adapters });
    }
    let Some(dx) = dx else { return add_waiting(waiting, m, with) };
    let each = std::array::from_fn::<_, N, _>(|i| {
        let (linear, dy) = layers[i];
        Layer { dy, w: &linear.weight, n: linear.outputs, adapter: parts[i] }
    });
    Ok(nn_together(with.gpu, with.arena, &each, dx, waiting, m, k)?)
}

/// Adds to gradients that wait for no product, of `m` rows each.
pub fn add_waiting(waiting: Vec<Gradient>, m: usize, with: Context) -> Result<()> {
    Ok(add_to_gradients(with.gpu, with.arena, waiting, m)?)
}

/// An adapter with du: `[m, R]`, and where dA goes.
pub struct Pulled<'a> {
    adapter: Adapter<'a>,
    grad: &'a mut DeviceSlice<f32>,
    du: DeviceBuffer<bf16>,
}

impl Pulled<'_> {
    /// Its part in the product, and dA.
    pub fn split(&mut self) -> (Part<'_>, GradientOfA<'_>) {
        let Self { adapter, grad, du } = self;
        let (rank, du) = (adapter.rank, &**du);
        (Part { left: du, right: adapter.a, rank }, GradientOfA { du, da: grad, rank })
    }
}

/// An adapter on the way back.
pub struct Trained<'a> {
    pub adapter: Adapter<'a>,
    pub grad: Grad<'a>,
    /// `[m, R]`: x Aᵀ.
    pub u: &'a DeviceSlice<bf16>,
}

impl Trained<'_> {
    /// Room for du of `m` rows where it can be made with dy: where dB waits.
    pub fn room(of: Option<&Self>, m: usize, with: Context) -> Result<Option<DeviceBuffer<bf16>>> {
        let of = of.filter(|_| gradients_wait(with.gpu));
        of.map(|it| with.take(m * padded(it.adapter.rank))).transpose()
    }

    /// Its part where dy is made.
    pub fn pulled<'a>(&'a self, du: &'a mut DeviceSlice<bf16>) -> fused::Pulled<'a> {
        fused::Pulled { b: self.adapter.b, du, rank: self.adapter.rank }
    }
}

//! One linear layer with its adapter: `y = x Wᵀ + b + s (x Aᵀ) Bᵀ`, W and b frozen; the twin of
//! [`super::super::linear`].
//!
//! ```text
//! forward    u = x Aᵀ                     y  = x Wᵀ + b + u (s B)ᵀ      one product
//! backward   du = dy (s B)                dB += s dyᵀ u                 dy read once
//!            dA += duᵀ x                  dx = dy W + du A              one product
//! ```
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
    add_to_gradient_of_a, add_to_gradient_of_b, padded, workspace_of_a, workspace_of_b,
};
use uft_kernels::matmul::cuda::fused::{self, Weight};
use uft_kernels::matmul::cuda::{Adapter as Part, few, nn, nt};
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
    /// `y = beta y + x Wᵀ + b + s u Bᵀ` with `x`: `[m, in]`, `y`: `[m, out]`, `beta` 0 or 1. Returns u: `[m, R]`
    /// where there is an adapter; the way back needs it.
    pub fn forward(
        &self,
        x: &DeviceSlice<bf16>,
        adapter: Option<Adapter>,
        y: &mut DeviceSlice<bf16>,
        beta: f32,
        with: Context,
    ) -> Result<Option<DeviceBuffer<bf16>>> {
        let u = adapter.map(|adapter| self.project(x, adapter, with)).transpose()?;
        self.product(x, adapter, &u, y, beta, with)?;
        Ok(u)
    }

    /// y as of [`Self::forward`], from the u that it returned.
    pub fn product(
        &self,
        x: &DeviceSlice<bf16>,
        adapter: Option<Adapter>,
        u: &Option<DeviceBuffer<bf16>>,
        y: &mut DeviceSlice<bf16>,
        beta: f32,
        with: Context,
    ) -> Result<()> {
        let (m, k, n) = (x.len() / self.inputs, self.inputs, self.outputs);
        let (bias, part) = (self.bias.as_deref(), part(adapter, u));
        with.product.nt(with, x, &self.weight, y, m, k, n, beta, bias, part)
    }

    /// [`Self::forward`] with a beta of 0, and y's heads rotated by `positions`: `[m]`.
    pub fn forward_rotated(
        &self,
        x: &DeviceSlice<bf16>,
        adapter: Option<Adapter>,
        y: &mut DeviceSlice<bf16>,
        positions: &DeviceSlice<u32>,
        with: Context,
    ) -> Result<Option<DeviceBuffer<bf16>>> {
        if let Product::Token = with.product {
            let u = self.forward(x, adapter, y, 0.0, with)?;
            let heads = self.outputs / with.config.heads.head_dim;
            rope::cuda::forward(with.gpu, with.rope, y, heads, positions)?;
            return Ok(u);
        }
        let (m, k, n) = (positions.len(), self.inputs, self.outputs);
        let u = adapter.map(|adapter| self.project(x, adapter, with)).transpose()?;
        let weight = self.weight_with(part(adapter, &u));
        fused::nt_rope(with.gpu, x, weight, y, m, k, n, with.rope, positions)?;
        Ok(u)
    }

    /// [`Self::forward`] with a beta of 0 of two layers with the same input, and the gated activation of what they make:
    /// `gate`, `up`, `out`: `[m, out]`.
    pub fn forward_activated(
        layers: [&Self; 2],
        x: &DeviceSlice<bf16>,
        adapters: [Option<Adapter>; 2],
        gate: &mut DeviceSlice<bf16>,
        up: &mut DeviceSlice<bf16>,
        out: &mut DeviceSlice<bf16>,
        with: Context,
    ) -> Result<[Option<DeviceBuffer<bf16>>; 2]> {
        let [of_gate, of_up] = layers;
        if let Product::Token = with.product {
            let u_gate = of_gate.forward(x, adapters[0], gate, 0.0, with)?;
            let u_up = of_up.forward(x, adapters[1], up, 0.0, with)?;
            swiglu::cuda::forward(with.gpu, gate, up, out)?;
            return Ok([u_gate, u_up]);
        }
        let (k, n) = (of_gate.inputs, of_gate.outputs);
        let project = |layer: &Self, adapter: Option<Adapter>| {
            adapter.map(|adapter| layer.project(x, adapter, with)).transpose()
        };
        let u = [project(of_gate, adapters[0])?, project(of_up, adapters[1])?];
        let weights = [
            of_gate.weight_with(part(adapters[0], &u[0])),
            of_up.weight_with(part(adapters[1], &u[1])),
        ];
        fused::nt_swiglu(with.gpu, x, weights, gate, up, out, x.len() / k, k, n)?;
        Ok(u)
    }

    fn weight_with<'a>(&'a self, adapter: Option<Part<'a>>) -> Weight<'a> {
        Weight { w: &self.weight, bias: self.bias.as_deref(), adapter }
    }

    /// u alone, as [`Self::forward`] returns it.
    pub fn project(
        &self,
        x: &DeviceSlice<bf16>,
        adapter: Adapter,
        with: Context,
    ) -> Result<DeviceBuffer<bf16>> {
        let (m, rank) = (x.len() / self.inputs, padded(adapter.rank));
        let mut u = with.take(m * rank)?;
        with.product.nt(with, x, adapter.a, &mut u, m, self.inputs, rank, 0.0, None, None)?;
        Ok(u)
    }

    /// Adds the adapter's gradients to its `grad` and, where `dx` is given with a beta of 0 or 1,
    /// turns it into `beta dx + dy W + du A`.
    ///
    /// `dy`: `[m, out]`, `x`, `dx`: `[m, in]`, `u` as returned by [`Self::forward`]. `x` is only there where
    /// there is an adapter.
    pub fn backward(
        &self,
        dy: &DeviceSlice<bf16>,
        x: Option<&DeviceSlice<bf16>>,
        adapter: Option<Trained>,
        dx: Option<(&mut DeviceSlice<bf16>, f32)>,
        with: Context,
    ) -> Result<()> {
        let (m, k, n) = (dy.len() / self.outputs, self.inputs, self.outputs);
        let pulled = self.pull(dy, x, adapter, with)?;
        let Some((dx, beta)) = dx else { return Ok(()) };
        let part = pulled.as_ref().map(Pulled::part);
        Ok(nn(with.gpu, dy, &self.weight, dx, m, n, k, beta, part)?)
    }

    /// What [`Self::backward`] does after [`Self::pull`], of a layer whose input is a gated activation, of `gate` and `up`: `[m, in]`, and
    /// on to their gradients, which are overwritten.
    pub fn backward_activated(
        &self,
        dy: &DeviceSlice<bf16>,
        pulled: Option<Pulled>,
        [gate, up]: [&DeviceSlice<bf16>; 2],
        dgate: &mut DeviceSlice<bf16>,
        dup: &mut DeviceSlice<bf16>,
        with: Context,
    ) -> Result<()> {
        let (m, k, n) = (dy.len() / self.outputs, self.inputs, self.outputs);
        let (gpu, arena, w) = (with.gpu, with.arena, &self.weight);
        let part = pulled.as_ref().map(Pulled::part);
        Ok(fused::nn_swiglu_backward(gpu, arena, dy, w, part, gate, up, dgate, dup, m, n, k)?)
    }

    /// Adds to the adapter's gradients; du is what the way back goes on with.
    pub fn pull<'a>(
        &self,
        dy: &DeviceSlice<bf16>,
        x: Option<&DeviceSlice<bf16>>,
        adapter: Option<Trained<'a>>,
        with: Context,
    ) -> Result<Option<Pulled<'a>>> {
        let Some(Trained { adapter, grad, u }) = adapter else { return Ok(None) };
        let (m, k, n) = (dy.len() / self.outputs, self.inputs, self.outputs);
        let x = x.expect("an adapter's input");
        let (gpu, rank, scale) = (with.gpu, adapter.rank, adapter.scale);
        let mut du = with.take(m * padded(rank))?;
        let mut room = with.take_f32(workspace_of_b(m, n, rank))?;
        add_to_gradient_of_b(gpu, dy, u, adapter.b, grad.b, &mut du, m, n, rank, scale, &mut room)?;
        drop(room);
        let mut room = with.take_f32(workspace_of_a(m, k, rank))?;
        add_to_gradient_of_a(gpu, &du, x, grad.a, m, rank, k, &mut room)?;
        Ok(Some(Pulled { adapter, du }))
    }
}

/// An adapter's part in a forward product.
fn part<'a>(adapter: Option<Adapter<'a>>, u: &'a Option<DeviceBuffer<bf16>>) -> Option<Part<'a>> {
    let (Adapter { b, rank, .. }, u) = adapter.zip(u.as_deref())?;
    Some(Part { left: u, right: b, rank })
}

/// An adapter with du: `[m, R]`.
pub struct Pulled<'a> {
    adapter: Adapter<'a>,
    du: DeviceBuffer<bf16>,
}

impl Pulled<'_> {
    fn part(&self) -> Part<'_> {
        Part { left: &self.du, right: self.adapter.a, rank: self.adapter.rank }
    }
}

/// An adapter on the way back.
pub struct Trained<'a> {
    pub adapter: Adapter<'a>,
    pub grad: Grad<'a>,
    /// `[m, R]`: x Aᵀ.
    pub u: &'a DeviceSlice<bf16>,
}

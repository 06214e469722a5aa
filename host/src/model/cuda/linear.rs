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
use half::bf16;
use uft_kernels::cuda::{DeviceBuffer, DeviceSlice};
use uft_kernels::matmul::cuda::adapter::{
    add_to_gradient_of_a, add_to_gradient_of_b, padded, workspace_of_a, workspace_of_b,
};
use uft_kernels::matmul::cuda::{Adapter as Part, few, nn, nt};

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

/// A frozen linear layer.
pub struct Linear {
    /// W: `[out, in]`.
    pub weight: DeviceBuffer<bf16>,
    /// b: `[out]`.
    pub bias: Option<DeviceBuffer<bf16>>,
    pub inputs: usize,
    pub outputs: usize,
}

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
        let (m, k, n) = (x.len() / self.inputs, self.inputs, self.outputs);
        let u = adapter.map(|adapter| self.project(x, adapter, with)).transpose()?;
        let part = adapter.zip(u.as_deref());
        let part = part.map(|(Adapter { b, rank, .. }, u)| Part { left: u, right: b, rank });
        with.product.nt(with, x, &self.weight, y, m, k, n, beta, self.bias.as_deref(), part)?;
        Ok(u)
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
        let mut pulled = None;
        if let Some(Trained { adapter, grad, u }) = adapter {
            let x = x.expect("an adapter's input");
            let (gpu, rank, scale) = (with.gpu, adapter.rank, adapter.scale);
            let mut du = with.take(m * padded(rank))?;
            let mut room = with.take_f32(workspace_of_b(m, n, rank))?;
            add_to_gradient_of_b(
                gpu, dy, u, adapter.b, grad.b, &mut du, m, n, rank, scale, &mut room,
            )?;
            drop(room);
            let mut room = with.take_f32(workspace_of_a(m, k, rank))?;
            add_to_gradient_of_a(gpu, &du, x, grad.a, m, rank, k, &mut room)?;
            pulled = Some((adapter, du));
        }
        let Some((dx, beta)) = dx else { return Ok(()) };
        let part = pulled.as_ref();
        let part =
            part.map(|(adapter, du)| Part { left: du, right: adapter.a, rank: adapter.rank });
        Ok(nn(with.gpu, dy, &self.weight, dx, m, n, k, beta, part)?)
    }
}

/// An adapter on the way back.
pub struct Trained<'a> {
    pub adapter: Adapter<'a>,
    pub grad: Grad<'a>,
    /// `[m, R]`: x Aᵀ.
    pub u: &'a DeviceSlice<bf16>,
}

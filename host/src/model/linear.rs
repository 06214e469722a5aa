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

use super::buffers::{Buffer, Pool};
use super::frozen::Frozen;
use super::layer::Context;
use super::lora::{Adapter, AdapterGrad};
use uft_kernels::matmul::{Weight, nn, nt, nt_few, tn};

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

/// A frozen linear layer.
#[derive(Debug)]
pub struct Linear {
    /// W: `[out, in]`.
    pub weight: Frozen,
    /// b: `[out]`.
    pub bias: Option<Vec<f32>>,
    pub inputs: usize,
    pub outputs: usize,
}

impl Linear {
    /// `y = beta y + x Wᵀ + b + s u Bᵀ` with `x`: `[m, in]`, `y`: `[m, out]`, `beta` 0 or 1. Returns u: `[m, r]` where there is an adapter; the way back
    /// needs it.
    pub fn forward(
        &self,
        x: &[f32],
        adapter: Option<&Adapter>,
        y: &mut [f32],
        beta: f32,
        with: Context,
    ) -> Option<Buffer> {
        let product = with.product;
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
        adapter.map(|adapter| {
            let u = self.project(x, adapter, with);
            product.nt(&u, &adapter.b, y, m, adapter.rank, n, adapter.scale, 1.0);
            u
        })
    }

    /// u alone, as [`Self::forward`] returns it.
    pub fn project(&self, x: &[f32], adapter: &Adapter, with: Context) -> Buffer {
        let m = x.len() / self.inputs;
        let mut u = with.pool.take(m * adapter.rank);
        with.product.nt(x, &adapter.a, &mut u, m, self.inputs, adapter.rank, 1.0, 0.0);
        u
    }

    /// Adds the adapter's gradients to its `grad` and, where `dx` is given with a beta of 0 or 1,
    /// turns it into `beta dx + dy W + du A`.
    ///
    /// `dy`: `[m, out]`, `x`, `dx`: `[m, in]`, `u` as returned by [`Self::forward`]. `x` is only
    /// read where there is an adapter.
    pub fn backward(
        &self,
        dy: &[f32],
        x: &[f32],
        adapter: Option<Trained>,
        dx: Option<(&mut [f32], f32)>,
        pool: &Pool,
    ) {
        let (m, k, n) = (dy.len() / self.outputs, self.inputs, self.outputs);
        let du = adapter.map(|Trained { adapter, grad, u }| {
            let r = adapter.rank;
            let mut du = pool.take(m * r);
            nn(dy, &adapter.b, &mut du, m, n, r, adapter.scale, 0.0);
            tn(dy, u, &mut grad.b, m, n, r, adapter.scale, 1.0);
            tn(&du, x, &mut grad.a, m, r, k, 1.0, 1.0);
            (adapter, du)
        });
        let Some((dx, beta)) = dx else { return };
        nn(dy, &self.weight, dx, m, n, k, 1.0, beta);
        if let Some((adapter, du)) = du {
            nn(&du, &adapter.a, dx, m, adapter.rank, k, 1.0, 1.0);
        }
    }
}

/// An adapter on the way back.
pub struct Trained<'a> {
    pub adapter: &'a Adapter,
    pub grad: &'a mut AdapterGrad,
    /// `[m, r]`: x Aᵀ.
    pub u: &'a [f32],
}

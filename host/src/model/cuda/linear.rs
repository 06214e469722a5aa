//! One linear layer with its adapter: `y = x Wᵀ + b + s (x Aᵀ) Bᵀ`, W and b frozen; the twin of
//! [`super::super::linear`].
//!
//! ```text
//! forward    u = x Aᵀ                     y  = x Wᵀ + b + u (s B)ᵀ      one product
//! backward   du = dy (s B)                dB += s dyᵀ u
//!            dA += duᵀ x                  dx = dy W + du A              one product
//! ```
//!
//! Layers with the same x, such as q, k and v, read it once for all of their u, and once more for all of their dA. On compute capability
//! 9.0 u and du are made with the first columns of a product of the same rows, which so begins before it goes on ([`Begun`]), and dA and
//! dB go along with a product; elsewhere dB is made with du, in one visit to dy.
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
    Gradient, GradientOfA, GradientOfB, Input, Projected, SHARING, add_to_gradients,
    gradients_wait, padded, pull,
};
use uft_kernels::matmul::cuda::fused::{self, Activating, Projections, Weight};
use uft_kernels::matmul::cuda::{
    Adapter as Part, Begun, Layer, adapter, begin_together, few, nn_together, nt,
};
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

/// What follows a product.
#[derive(Clone, Copy)]
pub enum Then<'a> {
    Nothing,
    /// This `[m, out]` is added.
    Added(&'a DeviceSlice<bf16>),
    /// Its heads are rotated by positions `[m]`.
    Rotated(&'a DeviceSlice<u32>),
}

/// A frozen linear layer, on a device.
pub type Linear = weights::Linear<DeviceBuffer<bf16>, DeviceBuffer<bf16>>;

impl Linear {
    /// `y = x Wᵀ + b + s u Bᵀ` with `x`: `[m, in]`, `y`: `[m, out]`, and u as [`Self::begin`] gives it.
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

    /// u of adapters of layers with the same `x`: `[m, in]`, of which this is the first, and the beginning of [`Self::forward_then`].
    pub fn begin<const N: usize>(
        &self,
        x: &DeviceSlice<bf16>,
        adapters: [Option<Adapter>; N],
        then: Then,
        y: &mut DeviceSlice<bf16>,
        with: Context,
    ) -> Result<(Short<N>, Begun)> {
        if let Product::Token = with.product {
            return Ok((project_token(x, adapters, with)?, Begun::default()));
        }
        let (m, k, n) = (x.len() / self.inputs, self.inputs, self.outputs);
        let mut u = room_for(m, &adapters, with)?;
        if u.iter().all(Option::is_none) {
            return Ok((u, Begun::default()));
        }
        let projected = projections(adapters, &mut u, 1);
        let weight = self.weight_with(None);
        let begun = match then {
            Then::Rotated(positions) => {
                let (gpu, rope) = (with.gpu, with.rope);
                fused::begin_rope(gpu, x, weight, projected, y, m, k, n, rope, positions)?
            }
            Then::Added(before) => {
                fused::begin_added(with.gpu, x, weight, projected, Some(before), y, m, k, n)?
            }
            Then::Nothing => fused::begin_added(with.gpu, x, weight, projected, None, y, m, k, n)?,
        };
        Ok((u, begun))
    }

    /// [`Self::forward`] and what follows it, from where it has begun.
    pub fn forward_then(
        &self,
        x: &DeviceSlice<bf16>,
        part: Option<Part>,
        then: Then,
        y: &mut DeviceSlice<bf16>,
        begun: Begun,
        with: Context,
    ) -> Result<()> {
        let (m, k, n) = (x.len() / self.inputs, self.inputs, self.outputs);
        let (gpu, rope, weight) = (with.gpu, with.rope, self.weight_with(part));
        match (then, with.product) {
            (Then::Nothing, Product::Token) => self.forward(x, part, y, with)?,
            (Then::Added(before), Product::Token) => {
                gpu.copy(before, y)?;
                let Weight { w, bias, .. } = weight;
                with.product.nt(with, x, w, y, m, k, n, 1.0, bias, part)?;
            }
            (Then::Rotated(positions), Product::Token) => {
                self.forward(x, part, y, with)?;
                let heads = self.outputs / with.config.heads.head_dim;
                rope::cuda::forward(gpu, rope, y, heads, positions)?;
            }
            (Then::Rotated(positions), Product::Batch) => {
                fused::nt_rope(gpu, x, weight, y, m, k, n, rope, positions, begun)?;
            }
            (Then::Added(before), Product::Batch) => {
                fused::nt_added(gpu, x, weight, Some(before), y, m, k, n, begun)?;
            }
            (Then::Nothing, Product::Batch) => {
                fused::nt_added(gpu, x, weight, None, y, m, k, n, begun)?;
            }
        }
        Ok(())
    }

    /// [`Self::forward`] of two layers with the same input, and the gated activation of what they make: `gate`, `up`, `out`:
    /// `[m, out]`. Returns u of their adapters, and of `next`, which reads `out`.
    pub fn forward_activated(
        layers: [&Self; 2],
        x: &DeviceSlice<bf16>,
        adapters: [Option<Adapter>; 2],
        gate: &mut DeviceSlice<bf16>,
        up: &mut DeviceSlice<bf16>,
        out: &mut DeviceSlice<bf16>,
        next: Option<Adapter>,
        with: Context,
    ) -> Result<(Short<2>, Option<DeviceBuffer<bf16>>)> {
        let [of_gate, of_up] = layers;
        let (m, k, n) = (x.len() / of_gate.inputs, of_gate.inputs, of_gate.outputs);
        if let Product::Token = with.product {
            let u = project_token(x, adapters, with)?;
            let parts = parts(adapters, &u);
            of_gate.forward(x, parts[0], gate, with)?;
            of_up.forward(x, parts[1], up, with)?;
            swiglu::cuda::forward(with.gpu, gate, up, out)?;
            let [of_next] = project_token(out, [next], with)?;
            return Ok((u, of_next));
        }
        let mut u = room_for(m, &adapters, with)?;
        let (gpu, arena) = (with.gpu, with.arena);
        let mut of_next = next.map(|next| with.take(m * padded(next.rank))).transpose()?;
        let activating = if u.iter().all(Option::is_none) {
            Activating::default()
        } else {
            let weights = layers.map(|layer| layer.weight_with(None));
            let projected = projections(adapters, &mut u, 2);
            let next = next.map(|next| (next.a, next.rank));
            fused::begin_swiglu(gpu, arena, x, weights, projected, gate, up, out, next, m, k, n)?
        };
        let [part_gate, part_up] = parts(adapters, &u);
        let weights = [of_gate.weight_with(part_gate), of_up.weight_with(part_up)];
        let next = next.zip(of_next.as_deref_mut());
        let next = next.map(|(Adapter { a, rank, .. }, u)| Projected { a, u, rank, b: None });
        fused::nt_swiglu(gpu, arena, x, weights, gate, up, out, next, m, k, n, activating)?;
        Ok((u, of_next))
    }

    fn weight_with<'a>(&'a self, adapter: Option<Part<'a>>) -> Weight<'a> {
        Weight { w: &self.weight, bias: self.bias.as_deref(), adapter }
    }

    /// Of a layer whose input is a gated activation, of `gate` and `up`: `[m, in]`: turns these into their gradients, and `act`, if
    /// it is asked for, into that input once more; and makes du of what is `pulled` of the layers that made gate and up, and what is
    /// `waiting`.
    pub fn backward_activated(
        &self,
        dy: &DeviceSlice<bf16>,
        part: Option<Part>,
        gate: &mut DeviceSlice<bf16>,
        up: &mut DeviceSlice<bf16>,
        act: Option<&mut DeviceSlice<bf16>>,
        pulled: [Option<adapter::Pulled>; 2],
        waiting: Vec<Gradient>,
        with: Context,
    ) -> Result<()> {
        let (m, i, n) = (dy.len() / self.outputs, self.inputs, self.outputs);
        let (gpu, arena, w) = (with.gpu, with.arena, &self.weight);
        Ok(fused::nn_swiglu_backward(
            gpu, arena, dy, w, part, gate, up, act, pulled, waiting, m, n, i,
        )?)
    }

    /// du, with which the way back goes on, unless it has been `made`, and dB, unless it was made with it.
    pub fn pull<'a>(
        &self,
        dy: &'a DeviceSlice<bf16>,
        Trained { adapter, grad, u }: Trained<'a>,
        made: Option<DeviceBuffer<bf16>>,
        with: Context,
    ) -> Result<(Pulled<'a>, Option<GradientOfB<'a>>)> {
        let (m, n) = (dy.len() / self.outputs, self.outputs);
        let (rank, scale) = (adapter.rank, adapter.scale);
        let of_b = GradientOfB { dy, u, db: grad.b, rank, scale };
        if let Some(du) = made {
            return Ok((Pulled { adapter, grad: grad.a, du }, Some(of_b)));
        }
        let mut du = with.take(m * padded(rank))?;
        let of_b = pull(with.gpu, with.arena, of_b, adapter.b, &mut du, m, n)?;
        Ok((Pulled { adapter, grad: grad.a, du }, of_b))
    }
}

/// u: `[m, R]` of adapters of layers with one input, where there are any; the way back needs them, too.
type Short<const N: usize> = [Option<DeviceBuffer<bf16>>; N];

fn room_for<const N: usize>(
    m: usize,
    adapters: &[Option<Adapter>; N],
    with: Context,
) -> Result<Short<N>> {
    let mut all = [const { None }; N];
    for (u, adapter) in all.iter_mut().zip(adapters) {
        *u = adapter.map(|adapter| with.take(m * padded(adapter.rank))).transpose()?;
    }
    Ok(all)
}

/// The first so many layers are those whose product begins.
fn projections<'a, const N: usize>(
    adapters: [Option<Adapter<'a>>; N],
    u: &'a mut Short<N>,
    own: usize,
) -> Projections<'a> {
    let mut each = adapters.into_iter().zip(u).enumerate();
    [(); SHARING].map(|()| {
        let (i, (adapter, u)) = each.next()?;
        let Adapter { a, b, rank, .. } = adapter?;
        Some(Projected { a, u: u.as_deref_mut()?, rank, b: (i < own).then_some(b) })
    })
}

/// u of the adapters of layers with the same `x`: `[in]`, of a single token.
fn project_token<const N: usize>(
    x: &DeviceSlice<bf16>,
    adapters: [Option<Adapter>; N],
    with: Context,
) -> Result<Short<N>> {
    let mut all = [const { None }; N];
    for (to, adapter) in all.iter_mut().zip(adapters) {
        let Some(Adapter { a, rank, .. }) = adapter else { continue };
        let k = a.len() / padded(rank);
        let m = x.len() / k;
        let mut u = with.take(m * padded(rank))?;
        few(with.gpu, x, a, &mut u, m, k, padded(rank), 0.0, None, None)?;
        *to = Some(u);
    }
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
    let layers = outputs.each_ref().map(|Output { linear, dy, .. }| Layer {
        dy,
        w: &linear.weight,
        n: linear.outputs,
        adapter: None,
    });
    let (k, m) = (outputs[0].linear.inputs, layers[0].dy.len() / layers[0].n);
    // Where dB waits for the product, the product begins with du.
    let begins =
        dx.is_some() && gradients_wait(with.gpu) && outputs.iter().all(|it| it.du.is_none());
    let (mut pulled, mut of_b, mut to_make) = ([const { None }; N], Vec::new(), [false; N]);
    for (i, Output { linear, dy, adapter, mut du }) in outputs.into_iter().enumerate() {
        let Some(adapter) = adapter else { continue };
        if begins && du.is_none() {
            du = Trained::room(Some(&adapter), m, with)?;
            to_make[i] = true;
        }
        let (of_layer, b) = linear.pull(dy, adapter, du, with)?;
        pulled[i] = Some(of_layer);
        of_b.extend(b);
    }
    let mut begun = Begun::default();
    let mut dx = dx;
    if let Some(dx) = dx.as_deref_mut().filter(|_| to_make.contains(&true)) {
        let mut each = pulled.iter_mut().zip(to_make);
        let pulled = [(); SHARING].map(|()| {
            let (pulled, to_make) = each.next()?;
            pulled.as_mut().filter(|_| to_make).map(Pulled::begin)
        });
        begun = begin_together(with.gpu, &layers, pulled, &mut of_b, dx, m, k)?;
    }
    let mut gradients: Vec<Gradient> = of_b.into_iter().map(Gradient::B).collect();
    gradients.extend(waiting);
    let mut adapters = Vec::new();
    let parts = pulled.each_mut().map(|pulled| {
        let (part, of_a) = pulled.as_mut()?.split();
        adapters.push(of_a);
        Some(part)
    });
    if !adapters.is_empty() {
        gradients.push(Gradient::A { input, k, adapters });
    }
    let Some(dx) = dx else { return add_waiting(gradients, m, with) };
    let each = std::array::from_fn::<_, N, _>(|i| Layer { adapter: parts[i], ..layers[i] });
    Ok(nn_together(with.gpu, with.arena, &each, dx, gradients, m, k, begun)?)
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
    /// What is to be made of it where the product begins.
    fn begin(&mut self) -> adapter::Pulled<'_> {
        let Self { adapter: Adapter { a, b, rank, .. }, du, .. } = self;
        adapter::Pulled { b, du, rank: *rank, a: Some(a) }
    }

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
    pub fn pulled<'a>(&'a self, du: &'a mut DeviceSlice<bf16>) -> adapter::Pulled<'a> {
        adapter::Pulled { b: self.adapter.b, du, rank: self.adapter.rank, a: None }
    }
}

//! Products with what stands next to them in a decoder: the residual, the rotation of queries and keys, the gated activation.
//!
//! ```text
//! nt_added              y = before + x wᵀ + adapter + bias
//! nt_rope               y = rope(x wᵀ + adapter + bias)
//! nt_swiglu             gate = x w_gateᵀ + adapter   up = x w_upᵀ + adapter   out = silu(gate) up
//!                       u = out aᵀ, of an adapter of the layer that reads out
//! nn_swiglu_backward    dout = dy w + adapter        act = silu(gate) up
//!                       gate and up become dout times the slopes of that
//!                       du = dgate (scale b), of adapters of the layers that made gate and up
//!                       and gradients that have waited for a product
//! ```
//!
//! The first is one kernel everywhere. On compute capability 9.0 so is each other (hopper_rope.cu, hopper_swiglu.cu) where the shapes
//! allow it; elsewhere the kernels it is made of, one after the other. The bits are the same but for u's and du's, which are summed in
//! another order: one kernel rounds where the others write to memory.

use super::adapter::{
    self, Gradient, PADDING, Projected, add_to_gradients, padded, round_partials,
};
use super::hopper::{
    self, CLUSTER, GRADIENTS_HEADER, NARROW, PIECE, PRODUCT_HEADER, Tile, WIDE, clusters, maps,
};
use super::{Adapter, Before, Way, assert_bias, assert_multiples_of_8, assert_shapes};
use super::{nn, nt, nt_by};
use crate::args;
use crate::cuda::{Arena, DeviceSlice, Gpu, HOPPER, HOPPER_PRODUCTS, Kernel, Result, Source, TILE};
use crate::rope::cuda as rope;
use crate::swiglu::cuda as swiglu;
use half::bf16;

#[cfg(test)]
mod tests;

static ROPE: Source = Source {
    name: "hopper_rope.cu",
    text: include_str!("../hopper_rope.cu"),
    headers: &[HOPPER, HOPPER_PRODUCTS, TILE, PRODUCT_HEADER, rope::HEADER],
};
static SWIGLU: Source = Source {
    name: "hopper_swiglu.cu",
    text: include_str!("../hopper_swiglu.cu"),
    headers: &[HOPPER, HOPPER_PRODUCTS, TILE, PRODUCT_HEADER, GRADIENTS_HEADER, swiglu::HEADER],
};

/// As [`WIDE`], with room for two pieces of gate, two of up and one of what is activated instead of a stage.
const BACKWARD: Tile = Tile { n: WIDE.n, stages: WIDE.stages - 1, staged: 5 };

const fn rotating(tile: Tile, head_dim: usize) -> Kernel {
    tile.kernel_of(&ROPE, "hopper_nt_rope").define("HEAD_DIM", head_dim as i64)
}
const ACTIVATING: Kernel = WIDE.kernel_of(&SWIGLU, "hopper_nt_swiglu").define("RANK_GROUPS", 1);
const fn activating_backward(groups: usize) -> Kernel {
    let kernel = BACKWARD.kernel_of(&SWIGLU, "hopper_nn_swiglu_backward");
    kernel.define("RANK_GROUPS", groups as i64)
}

/// Every kernel of this file, with all constants that it is compiled with.
pub const KERNELS: [Kernel; 7] = [
    rotating(WIDE, 64),
    rotating(WIDE, 128),
    rotating(NARROW, 64),
    rotating(NARROW, 128),
    ACTIVATING,
    activating_backward(1),
    activating_backward(2),
];

/// A weight `[n, k]` with what is added to its product.
#[derive(Clone, Copy)]
pub struct Weight<'a> {
    pub w: &'a DeviceSlice<bf16>,
    pub bias: Option<&'a DeviceSlice<bf16>>,
    pub adapter: Option<Adapter<'a>>,
}

/// [`nt`] with `before`: `[m, n]` in the place of `beta y`.
///
/// # Errors
/// A launch fails.
///
/// # Panics
/// Shapes that do not fit.
pub fn nt_added(
    gpu: &Gpu,
    x: &DeviceSlice<bf16>,
    Weight { w, bias, adapter }: Weight,
    before: &DeviceSlice<bf16>,
    y: &mut DeviceSlice<bf16>,
    m: usize,
    k: usize,
    n: usize,
) -> Result<()> {
    nt_by(gpu, Way::of(gpu, m, k, n), x, w, Before::Other(before), y, m, k, n, bias, adapter)
}

/// [`nt`] with beta 0 and [`rope::forward`]: `y`: `[m, n]` are heads as wide as the table says.
///
/// # Errors
/// A launch fails.
///
/// # Panics
/// Shapes that do not fit.
pub fn nt_rope(
    gpu: &Gpu,
    x: &DeviceSlice<bf16>,
    weight: Weight,
    y: &mut DeviceSlice<bf16>,
    m: usize,
    k: usize,
    n: usize,
    table: &rope::Table,
    positions: &DeviceSlice<u32>,
) -> Result<()> {
    let head_dim = table.head_dim();
    if let Some(tile) = Tile::of(gpu, k, n).filter(|_| matches!(head_dim, 64 | 128)) {
        return rotate(gpu, tile, x, weight, y, m, k, n, table, positions);
    }
    let Weight { w, bias, adapter } = weight;
    nt(gpu, x, w, y, m, k, n, 0.0, bias, adapter)?;
    rope::forward(gpu, table, y, n / head_dim, positions)
}

fn rotate(
    gpu: &Gpu,
    tile: Tile,
    x: &DeviceSlice<bf16>,
    Weight { w, bias, adapter }: Weight,
    y: &mut DeviceSlice<bf16>,
    m: usize,
    k: usize,
    n: usize,
    table: &rope::Table,
    positions: &DeviceSlice<u32>,
) -> Result<()> {
    let head_dim = table.head_dim();
    assert_shapes("nt_rope", [("x", x.len(), m, k), ("w", w.len(), n, k), ("y", y.len(), m, n)]);
    assert_multiples_of_8("nt_rope", [("k", k)]);
    assert!(n.is_multiple_of(head_dim), "nt_rope: {n} columns of heads {head_dim} wide");
    assert_eq!(positions.len(), m, "nt_rope: positions must be [{m}]");
    assert_bias("nt_rope", bias, n);
    Adapter::assert_fits("nt_rope", adapter, m, n);
    if m == 0 {
        return Ok(());
    }
    let (grid, (_, _, rank)) = (tile.grid(gpu, m, n), Adapter::parts(adapter));
    let [x, w, u, b] = maps(gpu, (x, w), adapter, (m, k, n), Some(tile.n / CLUSTER))?;
    let y = gpu.tensor_map_mut(y, [m, n], PIECE)?;
    let (known, rows, columns, depth) = (table.positions() as u32, m as i32, n as i32, k as i32);
    let args =
        args![x, w, u, b, bias, positions, table.angles(), y, known, rows, columns, depth, rank];
    gpu.launch(&rotating(tile, head_dim), grid, tile.shared_bytes(), args)
}

/// Two [`nt`] with beta 0 and [`swiglu::forward`]: `gate`, `up`, `out`: `[m, n]`; and for `next`, an adapter of what reads `out`, as
/// [`adapter::project`].
///
/// # Errors
/// A launch fails, or the arena is too small.
///
/// # Panics
/// Shapes that do not fit.
pub fn nt_swiglu(
    gpu: &Gpu,
    arena: &Arena,
    x: &DeviceSlice<bf16>,
    weights: [Weight; 2],
    gate: &mut DeviceSlice<bf16>,
    up: &mut DeviceSlice<bf16>,
    out: &mut DeviceSlice<bf16>,
    next: Option<Projected>,
    m: usize,
    k: usize,
    n: usize,
) -> Result<()> {
    let plain = weights.iter().all(|weight| weight.bias.is_none());
    let one = plain && Tile::of(gpu, k, n) == Some(WIDE);
    // A high rank takes more from memory in parts than all of `out` is.
    let (inside, mut after) = match next {
        Some(next) if one && padded(next.rank) <= ACTIVATED_RANK => (Some(next), None),
        next => (None, next),
    };
    if one {
        activate(gpu, arena, x, weights, gate, up, out, inside, m, k, n)?;
    } else {
        for (Weight { w, bias, adapter }, y) in weights.into_iter().zip([&mut *gate, &mut *up]) {
            nt(gpu, x, w, y, m, k, n, 0.0, bias, adapter)?;
        }
        swiglu::forward(gpu, gate, up, out)?;
    }
    match &mut after {
        Some(next) => adapter::project(gpu, out, std::slice::from_mut(next), m, n),
        None => Ok(()),
    }
}

/// The highest rank of which u is made with `out`; two of hopper_swiglu.cu's groups.
const ACTIVATED_RANK: usize = 32;

fn activate(
    gpu: &Gpu,
    arena: &Arena,
    x: &DeviceSlice<bf16>,
    [of_gate, of_up]: [Weight; 2],
    gate: &mut DeviceSlice<bf16>,
    up: &mut DeviceSlice<bf16>,
    out: &mut DeviceSlice<bf16>,
    next: Option<Projected>,
    m: usize,
    k: usize,
    n: usize,
) -> Result<()> {
    let results = [("gate", gate.len(), m, n), ("up", up.len(), m, n), ("out", out.len(), m, n)];
    assert_shapes("nt_swiglu", results);
    let operands =
        [("x", x.len(), m, k), ("gate's w", of_gate.w.len(), n, k), ("up's", of_up.w.len(), n, k)];
    assert_shapes("nt_swiglu", operands);
    assert_multiples_of_8("nt_swiglu", [("k", k), ("n", n)]);
    for weight in [of_gate, of_up] {
        Adapter::assert_fits("nt_swiglu", weight.adapter, m, n);
    }
    if let Some(Projected { a, u, rank }) = &next {
        let rank = padded(*rank);
        assert_shapes("nt_swiglu", [("a", a.len(), rank, n), ("u", u.len(), m, rank)]);
    }
    if m * n == 0 {
        return Ok(());
    }
    let (a, u) = next.map(|Projected { a, u, .. }| (a, u)).unzip();
    let parts = n.div_ceil((WIDE.n / 2) as usize);
    let mut partial = u.as_ref().map(|u| arena.take::<f32>(parts * u.len())).transpose()?;
    let groups = u.as_ref().map_or(0, |u| u.len() / m / 16) as i32;
    let ranks = [of_gate, of_up].map(|weight| Adapter::parts(weight.adapter).2);
    let half = Some(WIDE.n / CLUSTER);
    let [of_x, w_gate, u_gate, b_gate] =
        maps(gpu, (x, of_gate.w), of_gate.adapter, (m, k, n), half)?;
    let [_, w_up, u_up, b_up] = maps(gpu, (x, of_up.w), of_up.adapter, (m, k, n), half)?;
    let gate = gpu.tensor_map_mut(gate, [m, n], PIECE)?;
    let up = gpu.tensor_map_mut(up, [m, n], PIECE)?;
    let out = gpu.tensor_map_mut(out, [m, n], PIECE)?;
    let (rows, columns, depth) = (m as i32, n as i32, k as i32);
    let args = args![
        of_x,
        w_gate,
        w_up,
        u_gate,
        b_gate,
        u_up,
        b_up,
        gate,
        up,
        out,
        a,
        groups,
        partial.as_deref_mut(),
        rows,
        columns,
        depth,
        ranks[0],
        ranks[1]
    ];
    // Its tiles are half as wide: one of each.
    gpu.launch(&ACTIVATING, WIDE.grid(gpu, m, 2 * n), WIDE.shared_bytes(), args)?;
    match (u, &partial) {
        (Some(u), Some(partial)) => round_partials(gpu, partial, parts, u),
        _ => Ok(()),
    }
}

/// An adapter's part in [`nn_swiglu_backward`].
pub struct Pulled<'a> {
    /// scale b `[i, R]`, as [`adapter::pack_b`] leaves it.
    pub b: &'a DeviceSlice<bf16>,
    /// `[m, R]`.
    pub du: &'a mut DeviceSlice<bf16>,
    pub rank: usize,
}

/// [`nn`] with beta 0 and [`swiglu::backward`]: from `dy`: `[m, n]` and w: `[n, i]` the gradients to `gate` and `up`,
/// `[m, i]`, which they overwrite, and, where it is asked for, `act` as [`swiglu::forward`] makes it. Of adapters of the layers that
/// made gate and up, du: those gradients times b. `gradients` that have waited for a product, of as many rows, are added to. What lies
/// between is nowhere, or in the arena.
///
/// # Errors
/// A launch fails, or the arena is too small.
///
/// # Panics
/// Shapes that do not fit.
pub fn nn_swiglu_backward(
    gpu: &Gpu,
    arena: &Arena,
    dy: &DeviceSlice<bf16>,
    w: &DeviceSlice<bf16>,
    adapter: Option<Adapter>,
    gate: &mut DeviceSlice<bf16>,
    up: &mut DeviceSlice<bf16>,
    act: Option<&mut DeviceSlice<bf16>>,
    mut pulled: [Option<Pulled>; 2],
    gradients: Vec<Gradient>,
    m: usize,
    n: usize,
    i: usize,
) -> Result<()> {
    if Tile::of(gpu, n, i) == Some(WIDE) {
        // Both of one rank, the first's that is not too high.
        let mut ranks = pulled.iter().flatten().map(|it| padded(it.rank));
        let rank = ranks.find(|rank| *rank <= PULLED_RANK);
        let inside = pulled.each_mut().map(|it| it.take_if(|it| Some(padded(it.rank)) == rank));
        activate_backward(gpu, arena, dy, w, adapter, gate, up, act, inside, gradients, m, n, i)?;
    } else {
        let mut dout = arena.take(m * i)?;
        nn(gpu, dy, w, &mut dout, m, n, i, 0.0, adapter)?;
        swiglu::backward(gpu, &dout, gate, up, act)?;
        add_to_gradients(gpu, arena, gradients, m)?;
    }
    for (dy, pulled) in [gate, up].into_iter().zip(pulled) {
        let Some(Pulled { b, du, rank }) = pulled else { continue };
        nn(gpu, dy, b, du, m, i, padded(rank), 0.0, None)?;
    }
    Ok(())
}

/// The highest rank of which du is made with the gradients that it is made of: sums of more do not fit in the registers beside a tile's.
const PULLED_RANK: usize = 32;

fn activate_backward(
    gpu: &Gpu,
    arena: &Arena,
    dy: &DeviceSlice<bf16>,
    w: &DeviceSlice<bf16>,
    adapter: Option<Adapter>,
    gate: &mut DeviceSlice<bf16>,
    up: &mut DeviceSlice<bf16>,
    act: Option<&mut DeviceSlice<bf16>>,
    pulled: [Option<Pulled>; 2],
    gradients: Vec<Gradient>,
    m: usize,
    n: usize,
    i: usize,
) -> Result<()> {
    let op = "nn_swiglu_backward";
    assert_shapes(op, [("dy", dy.len(), m, n), ("w", w.len(), n, i)]);
    assert_shapes(op, [("gate", gate.len(), m, i), ("up", up.len(), m, i)]);
    if let Some(act) = &act {
        assert_shapes(op, [("act", act.len(), m, i)]);
    }
    let pulled_rank = pulled.iter().flatten().next().map_or(PADDING, |it| padded(it.rank));
    for Pulled { b, du, .. } in pulled.iter().flatten() {
        assert_shapes(op, [("b", b.len(), i, pulled_rank), ("du", du.len(), m, pulled_rank)]);
    }
    assert_multiples_of_8(op, [("n", n), ("i", i)]);
    Adapter::assert_fits(op, adapter, m, i);
    if m * i == 0 {
        return Ok(());
    }
    let tiles = (BACKWARD.pairs(m, i), hopper::slices(n, adapter));
    let (_, _, rank) = Adapter::parts(adapter);
    let parts = i.div_ceil(BACKWARD.n as usize);
    let take = |it: &Pulled| arena.take::<f32>(parts * it.du.len());
    let [of_gate, of_up] = &pulled;
    let mut gate_partial = of_gate.as_ref().map(take).transpose()?;
    let mut up_partial = of_up.as_ref().map(take).transpose()?;
    let [b_gate, b_up] = pulled.each_ref().map(|it| it.as_ref().map(|it| it.b));
    let [dy, w, du, a] = maps(gpu, (dy, w), adapter, (m, n, i), None)?;
    let gate = gpu.tensor_map_mut(gate, [m, i], PIECE)?;
    let up = gpu.tensor_map_mut(up, [m, i], PIECE)?;
    let with_act = i32::from(act.is_some());
    let act = match act {
        Some(act) => gpu.tensor_map_mut(act, [m, i], PIECE)?,
        // Any: it is not used.
        None => gate,
    };
    let (rows, columns, depth) = (m as i32, i as i32, n as i32);
    hopper::with_waiting(gpu, arena, gradients, m, |gradients| {
        let (now, later) = gradients.split_at_mut(gradients.len().min(1));
        let args = args![
            dy,
            w,
            du,
            a,
            gate,
            up,
            act,
            b_gate,
            gate_partial.as_deref_mut(),
            b_up,
            up_partial.as_deref_mut(),
            rows,
            columns,
            depth,
            rank,
            with_act
        ];
        let shared = hopper::share::<1>(gpu, BACKWARD, clusters(gpu), args, tiles, now, gate)?;
        shared.launch(gpu, &activating_backward(pulled_rank / PADDING))?;
        hopper::launch(gpu, WIDE, clusters(gpu), None, later)
    })?;
    for (pulled, partial) in pulled.into_iter().zip([gate_partial, up_partial]) {
        let Some((Pulled { du, .. }, partial)) = pulled.zip(partial) else { continue };
        round_partials(gpu, &partial, parts, du)?;
    }
    Ok(())
}

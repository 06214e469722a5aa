//! Products with what stands next to them in a decoder: the rotation of queries and keys, the gated activation.
//!
//! ```text
//! nt_rope               y = rope(x wᵀ + adapter + bias)
//! nt_swiglu             gate = x w_gateᵀ + adapter   up = x w_upᵀ + adapter   out = silu(gate) up
//! nn_swiglu_backward    dout = dy w + adapter        (dgate, dup) = dout times the slopes of silu(gate) up
//! ```
//!
//! On compute capability 9.0 each is one kernel (hopper_rope.cu, hopper_swiglu.cu) where the shapes allow it; elsewhere the
//! kernels it is made of, one after the other. The bits are the same: one kernel rounds where the others write to memory.

use super::hopper::{CLUSTER, NARROW, PIECE, PRODUCT_HEADER, Tile, WIDE, maps};
use super::{Adapter, assert_bias, assert_multiples_of_8, assert_shapes, nn, nt};
use crate::args;
use crate::cuda::{Arena, DeviceSlice, Gpu, HOPPER, Kernel, Result, Source, TILE};
use crate::rope::cuda as rope;
use crate::swiglu::cuda as swiglu;
use half::bf16;

#[cfg(test)]
mod tests;

static ROPE: Source = Source {
    name: "hopper_rope.cu",
    text: include_str!("../hopper_rope.cu"),
    headers: &[HOPPER, TILE, PRODUCT_HEADER, rope::HEADER],
};
static SWIGLU: Source = Source {
    name: "hopper_swiglu.cu",
    text: include_str!("../hopper_swiglu.cu"),
    headers: &[HOPPER, TILE, PRODUCT_HEADER, swiglu::HEADER],
};

/// As [`WIDE`], with room for two pieces of gate and two of up instead of a stage.
const BACKWARD: Tile = Tile { n: WIDE.n, stages: WIDE.stages - 1, staged: 4 };

const fn rotating(tile: Tile, head_dim: usize) -> Kernel {
    tile.kernel_of(&ROPE, "hopper_nt_rope").define("HEAD_DIM", head_dim as i64)
}
const ACTIVATING: Kernel = WIDE.kernel_of(&SWIGLU, "hopper_nt_swiglu");
const ACTIVATING_BACKWARD: Kernel = BACKWARD.kernel_of(&SWIGLU, "hopper_nn_swiglu_backward");

/// Every kernel of this file, with all constants that it is compiled with.
pub const KERNELS: [Kernel; 6] = [
    rotating(WIDE, 64),
    rotating(WIDE, 128),
    rotating(NARROW, 64),
    rotating(NARROW, 128),
    ACTIVATING,
    ACTIVATING_BACKWARD,
];

/// A weight `[n, k]` with what is added to its product.
#[derive(Clone, Copy)]
pub struct Weight<'a> {
    pub w: &'a DeviceSlice<bf16>,
    pub bias: Option<&'a DeviceSlice<bf16>>,
    pub adapter: Option<Adapter<'a>>,
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

/// Two [`nt`] with beta 0 and [`swiglu::forward`]: `gate`, `up`, `out`: `[m, n]`.
///
/// # Errors
/// A launch fails.
///
/// # Panics
/// Shapes that do not fit.
pub fn nt_swiglu(
    gpu: &Gpu,
    x: &DeviceSlice<bf16>,
    weights: [Weight; 2],
    gate: &mut DeviceSlice<bf16>,
    up: &mut DeviceSlice<bf16>,
    out: &mut DeviceSlice<bf16>,
    m: usize,
    k: usize,
    n: usize,
) -> Result<()> {
    let plain = weights.iter().all(|weight| weight.bias.is_none());
    if plain && Tile::of(gpu, k, n) == Some(WIDE) {
        return activate(gpu, x, weights, gate, up, out, m, k, n);
    }
    for (Weight { w, bias, adapter }, y) in weights.into_iter().zip([&mut *gate, &mut *up]) {
        nt(gpu, x, w, y, m, k, n, 0.0, bias, adapter)?;
    }
    swiglu::forward(gpu, gate, up, out)
}

fn activate(
    gpu: &Gpu,
    x: &DeviceSlice<bf16>,
    [of_gate, of_up]: [Weight; 2],
    gate: &mut DeviceSlice<bf16>,
    up: &mut DeviceSlice<bf16>,
    out: &mut DeviceSlice<bf16>,
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
    if m * n == 0 {
        return Ok(());
    }
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
        of_x, w_gate, w_up, u_gate, b_gate, u_up, b_up, gate, up, out, rows, columns, depth,
        ranks[0], ranks[1]
    ];
    // Its tiles are half as wide: one of each.
    gpu.launch(&ACTIVATING, WIDE.grid(gpu, m, 2 * n), WIDE.shared_bytes(), args)
}

/// [`nn`] with beta 0 and [`swiglu::backward`]: from `dy`: `[m, n]` and w: `[n, i]` the gradients to `gate` and `up`,
/// `[m, i]`. What lies between is nowhere, or in the arena.
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
    gate: &DeviceSlice<bf16>,
    up: &DeviceSlice<bf16>,
    dgate: &mut DeviceSlice<bf16>,
    dup: &mut DeviceSlice<bf16>,
    m: usize,
    n: usize,
    i: usize,
) -> Result<()> {
    if Tile::of(gpu, n, i) == Some(WIDE) {
        return activate_backward(gpu, dy, w, adapter, gate, up, dgate, dup, m, n, i);
    }
    let mut dout = arena.take(m * i)?;
    nn(gpu, dy, w, &mut dout, m, n, i, 0.0, adapter)?;
    swiglu::backward(gpu, &dout, gate, up, dgate, dup)
}

fn activate_backward(
    gpu: &Gpu,
    dy: &DeviceSlice<bf16>,
    w: &DeviceSlice<bf16>,
    adapter: Option<Adapter>,
    gate: &DeviceSlice<bf16>,
    up: &DeviceSlice<bf16>,
    dgate: &mut DeviceSlice<bf16>,
    dup: &mut DeviceSlice<bf16>,
    m: usize,
    n: usize,
    i: usize,
) -> Result<()> {
    let op = "nn_swiglu_backward";
    assert_shapes(op, [("dy", dy.len(), m, n), ("w", w.len(), n, i)]);
    assert_shapes(op, [("gate", gate.len(), m, i), ("up", up.len(), m, i)]);
    assert_shapes(op, [("dgate", dgate.len(), m, i), ("dup", dup.len(), m, i)]);
    assert_multiples_of_8(op, [("n", n), ("i", i)]);
    Adapter::assert_fits(op, adapter, m, i);
    if m * i == 0 {
        return Ok(());
    }
    let (grid, (_, _, rank)) = (BACKWARD.grid(gpu, m, i), Adapter::parts(adapter));
    let [dy, w, du, a] = maps(gpu, (dy, w), adapter, (m, n, i), None)?;
    let gate = gpu.tensor_map(gate, [m, i], PIECE)?;
    let up = gpu.tensor_map(up, [m, i], PIECE)?;
    let dgate = gpu.tensor_map_mut(dgate, [m, i], PIECE)?;
    let dup = gpu.tensor_map_mut(dup, [m, i], PIECE)?;
    let (rows, columns, depth) = (m as i32, i as i32, n as i32);
    let args = args![dy, w, du, a, gate, up, dgate, dup, rows, columns, depth, rank];
    gpu.launch(&ACTIVATING_BACKWARD, grid, BACKWARD.shared_bytes(), args)
}

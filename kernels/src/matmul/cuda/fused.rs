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
//!
//! Of the first three there is a beginning, `begin_…`, which makes u of adapters that read x, and on compute capability 9.0 the output's
//! first columns beside it, from where they go on ([`Begun`]).

mod swiglu;
#[cfg(test)]
mod tests;

use super::adapter::{Projected, SHARING, THREE, project};
use super::hopper::{
    self, Begun, CLUSTER, Columns, Factors, NARROW, PIECE, PRODUCT_HEADER, SHORT_GROUPS,
    SHORT_HEADER, Tile, WIDE, clusters, groups_of, maps, slices, with_shorts,
};
use super::{Adapter, Before, Way, assert_bias, assert_multiples_of_8, assert_nt, assert_shapes};
use super::{nt, nt_by};
use crate::args;
use crate::cuda::{DeviceSlice, Gpu, HOPPER, HOPPER_PRODUCTS, Kernel, Result, Source, TILE};
use crate::rope::cuda as rope;
use half::bf16;

pub use swiglu::{Activating, begin_swiglu, nn_swiglu_backward, nt_swiglu};

static ROPE: Source = Source {
    name: "hopper_rope.cu",
    text: include_str!("../hopper_rope.cu"),
    headers: &[HOPPER, HOPPER_PRODUCTS, TILE, THREE, PRODUCT_HEADER, SHORT_HEADER, rope::HEADER],
};

const fn rotating(tile: Tile, head_dim: usize) -> Kernel {
    tile.kernel_of(&ROPE, "hopper_nt_rope").define("HEAD_DIM", head_dim as i64)
}
const fn rotating_short(groups: u32, head_dim: usize) -> Kernel {
    rotating(WIDE.with_short(groups), head_dim)
}

/// Every kernel of products with a rotation or an activation, with all constants that it is compiled with.
pub const KERNELS: [Kernel; 16] = [
    rotating(WIDE, 64),
    rotating(WIDE, 128),
    rotating(NARROW, 64),
    rotating(NARROW, 128),
    rotating_short(SHORT_GROUPS[0], 64),
    rotating_short(SHORT_GROUPS[1], 64),
    rotating_short(SHORT_GROUPS[2], 64),
    rotating_short(SHORT_GROUPS[0], 128),
    rotating_short(SHORT_GROUPS[1], 128),
    rotating_short(SHORT_GROUPS[2], 128),
    swiglu::KERNELS[0],
    swiglu::KERNELS[1],
    swiglu::KERNELS[2],
    swiglu::KERNELS[3],
    swiglu::KERNELS[4],
    swiglu::KERNELS[5],
];

/// A weight `[n, k]` with what is added to its product.
#[derive(Clone, Copy)]
pub struct Weight<'a> {
    pub w: &'a DeviceSlice<bf16>,
    pub bias: Option<&'a DeviceSlice<bf16>>,
    /// None where the product begins: it is made there, see [`Projected`].
    pub adapter: Option<Adapter<'a>>,
}

impl Weight<'_> {
    /// Where a product begins.
    fn assert_bare(&self, op: &str) {
        assert!(self.adapter.is_none(), "{op}: the adapter is among what is projected");
    }
}

/// u of up to three adapters whose layers read x; the first is that of the product at hand, or, of gate and up, the first two are.
pub type Projections<'a> = [Option<Projected<'a>>; SHARING];

/// Makes u as [`project`] does, where it is not made with a product's first columns.
fn project_alone(
    gpu: &Gpu,
    x: &DeviceSlice<bf16>,
    projected: Projections,
    m: usize,
    k: usize,
) -> Result<Begun> {
    let mut each: Vec<Projected> = projected.into_iter().flatten().collect();
    project(gpu, x, &mut each, m, k)?;
    Ok(Begun::default())
}

/// Whether one kernel makes u of all with tiles of `tile`.
fn fit_beside(tile: Option<Tile>, projected: &Projections) -> bool {
    let ranks = projected.iter().flatten().map(|it| it.rank);
    tile == Some(WIDE) && groups_of(ranks).is_some()
}

/// First columns of an output, of which a tile has `width`, with u of all that is `projected`, the first `own` of it the product's.
fn first_of<'a>(
    gpu: &Gpu,
    projected: Projections<'a>,
    own: usize,
    width: usize,
    m: usize,
    k: usize,
    n: usize,
) -> Columns<'a> {
    let whole = projected[..own].iter().flatten().all(|it| it.b.is_some());
    assert!(whole, "the product that begins goes on with its own u");
    let shorts = projected.map(|it| it.map(Into::into));
    let columns = Columns::begin(clusters(gpu), WIDE, width, [m, n, slices(k, 0)], shorts);
    columns.assert_shorts("begin", m, [k; SHARING], n);
    columns
}

/// The beginning of [`nt_added`]: u of all that is `projected`, overwritten.
///
/// # Errors
/// A launch fails.
///
/// # Panics
/// Shapes that do not fit.
pub fn begin_added(
    gpu: &Gpu,
    x: &DeviceSlice<bf16>,
    weight: Weight,
    projected: Projections,
    before: Option<&DeviceSlice<bf16>>,
    y: &mut DeviceSlice<bf16>,
    m: usize,
    k: usize,
    n: usize,
) -> Result<Begun> {
    weight.assert_bare("begin_added");
    let (Weight { w, bias, .. }, tile) = (weight, Tile::of(gpu, k, n));
    if !fit_beside(tile, &projected) {
        return project_alone(gpu, x, projected, m, k);
    }
    assert_nt("begin_added", x, w, (bias, before), y, m, k, n);
    add_first(gpu, x, (w, bias), projected, before, y, m, k, n)
}

fn add_first(
    gpu: &Gpu,
    x: &DeviceSlice<bf16>,
    (w, bias): (&DeviceSlice<bf16>, Option<&DeviceSlice<bf16>>),
    projected: Projections,
    before: Option<&DeviceSlice<bf16>>,
    y: &mut DeviceSlice<bf16>,
    m: usize,
    k: usize,
    n: usize,
) -> Result<Begun> {
    let columns = first_of(gpu, projected, 1, WIDE.n as usize, m, k, n);
    let (begun, adapter) = (columns.begun(n), columns.factors(0));
    if m > 0 {
        hopper::nt(gpu, columns, x, w, (before, false), y, m, k, n, bias, adapter)?;
    }
    Ok(begun)
}

/// [`nt`] with `before`: `[m, n]` in the place of `beta y`, or with beta 0; from where it has begun.
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
    before: Option<&DeviceSlice<bf16>>,
    y: &mut DeviceSlice<bf16>,
    m: usize,
    k: usize,
    n: usize,
    begun: Begun,
) -> Result<()> {
    let before = before.map_or(Before::Nothing, Before::Other);
    nt_by(gpu, Way::of(gpu, m, k, n), x, w, before, y, m, k, n, bias, adapter, begun)
}

/// The beginning of [`nt_rope`]: u of all that is `projected`, overwritten.
///
/// # Errors
/// A launch fails.
///
/// # Panics
/// Shapes that do not fit.
pub fn begin_rope(
    gpu: &Gpu,
    x: &DeviceSlice<bf16>,
    weight: Weight,
    projected: Projections,
    y: &mut DeviceSlice<bf16>,
    m: usize,
    k: usize,
    n: usize,
    table: &rope::Table,
    positions: &DeviceSlice<u32>,
) -> Result<Begun> {
    weight.assert_bare("begin_rope");
    let tile = tile_of_heads(gpu, table, k, n);
    if !fit_beside(tile, &projected) {
        return project_alone(gpu, x, projected, m, k);
    }
    rotate_first(gpu, x, weight, projected, y, m, k, n, table, positions)
}

fn rotate_first(
    gpu: &Gpu,
    x: &DeviceSlice<bf16>,
    weight: Weight,
    projected: Projections,
    y: &mut DeviceSlice<bf16>,
    m: usize,
    k: usize,
    n: usize,
    table: &rope::Table,
    positions: &DeviceSlice<u32>,
) -> Result<Begun> {
    let columns = first_of(gpu, projected, 1, WIDE.n as usize, m, k, n);
    let (begun, adapter) = (columns.begun(n), columns.factors(0));
    rotate(gpu, columns, x, weight, adapter, y, m, k, n, table, positions)?;
    Ok(begun)
}

/// [`nt`] with beta 0 and [`rope::forward`]: `y`: `[m, n]` are heads as wide as the table says; from where it has begun.
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
    begun: Begun,
) -> Result<()> {
    let Weight { w, bias, adapter } = weight;
    if let Some(tile) = tile_of_heads(gpu, table, k, n) {
        let columns = Columns::rest(tile, tile.n as usize, n, begun);
        let adapter = adapter.map(Into::into);
        return rotate(gpu, columns, x, weight, adapter, y, m, k, n, table, positions);
    }
    begun.assert_nothing("nt_rope");
    nt(gpu, x, w, y, m, k, n, 0.0, bias, adapter)?;
    rope::forward(gpu, table, y, n / table.head_dim(), positions)
}

/// Of one kernel that also rotates.
fn tile_of_heads(gpu: &Gpu, table: &rope::Table, k: usize, n: usize) -> Option<Tile> {
    Tile::of(gpu, k, n).filter(|_| matches!(table.head_dim(), 64 | 128))
}

fn rotate(
    gpu: &Gpu,
    columns: Columns,
    x: &DeviceSlice<bf16>,
    Weight { w, bias, .. }: Weight,
    adapter: Option<Factors>,
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
    Factors::assert_fits("nt_rope", adapter, m, n);
    if m == 0 || columns.none() {
        return Ok(());
    }
    let grid = columns.grid(gpu, m);
    let Columns { tile, first, across, shorts, .. } = columns;
    let rank = adapter.map_or(0, |adapter| adapter.rank) as i32;
    let [x, w, u, b] = maps(gpu, (x, w), adapter, (m, k, n), Some(tile.n / CLUSTER))?;
    let y = gpu.tensor_map_mut(y, [m, n], PIECE)?;
    let args = with_shorts(gpu, args![x, w, u, b], shorts, x, [k; SHARING], true)?;
    let args = args.with(bias).with(positions).with(table.angles()).with(y);
    let args = args.with(table.positions() as u32).with(m as i32).with(n as i32);
    let args = args.with(first as i32).with(across as i32).with(k as i32).with(rank);
    gpu.launch(&rotating(tile, head_dim), grid, tile.shared_bytes(), args)
}

//! The gated activation with the products on both sides of it; see [`super`].

use super::super::adapter::{
    Gradient, PADDING, Projected, Pulled, SHARING, THREE, add_to_gradients, padded, project,
    round_partials,
};
use super::super::hopper::{
    self, Begun, CLUSTER, Columns, Factors, GRADIENTS_HEADER, PIECE, PRODUCT_HEADER, SHORT_GROUPS,
    SHORT_HEADER, Tasks, Tile, WIDE, clusters, maps, slices, with_shorts,
};
use super::super::{Adapter, assert_multiples_of_8, assert_shapes, nn, nt};
use super::{Projections, Weight, first_of, fit_beside, project_alone};
use crate::args;
use crate::cuda::{
    Arena, Args, DeviceBuffer, DeviceSlice, Gpu, HOPPER, HOPPER_PRODUCTS, Kernel, Result, Source,
    TILE,
};
use crate::swiglu::cuda as swiglu;
use half::bf16;

static SWIGLU: Source = Source {
    name: "hopper_swiglu.cu",
    text: include_str!("../../hopper_swiglu.cu"),
    headers: &[
        HOPPER,
        HOPPER_PRODUCTS,
        TILE,
        THREE,
        PRODUCT_HEADER,
        GRADIENTS_HEADER,
        SHORT_HEADER,
        swiglu::HEADER,
    ],
};

/// As [`WIDE`], with room for two pieces of gate, two of up and one of what is activated instead of a stage.
const BACKWARD: Tile = Tile { stages: WIDE.stages - 1, staged: 5, ..WIDE };

/// Columns of gate, and of up, that a tile has.
const WIDTH: usize = WIDE.n as usize / 2;

const fn activating(tile: Tile) -> Kernel {
    tile.kernel_of(&SWIGLU, "hopper_nt_swiglu").define("RANK_GROUPS", 1)
}
const fn activating_backward(groups: usize) -> Kernel {
    let kernel = BACKWARD.kernel_of(&SWIGLU, "hopper_nn_swiglu_backward");
    kernel.define("RANK_GROUPS", groups as i64)
}

/// Every kernel of this file, with all constants that it is compiled with.
pub(super) const KERNELS: [Kernel; 6] = [
    activating(WIDE),
    activating(WIDE.with_short(SHORT_GROUPS[0])),
    activating(WIDE.with_short(SHORT_GROUPS[1])),
    activating(WIDE.with_short(SHORT_GROUPS[2])),
    activating_backward(1),
    activating_backward(2),
];

/// a `[R, n]` and the rank of an adapter whose layer reads what is activated.
type Reader<'a> = (&'a DeviceSlice<bf16>, usize);

/// What there is of [`nt_swiglu`] once it has begun.
#[derive(Default)]
#[must_use = "the rest goes on from here"]
pub struct Activating {
    begun: Begun,
    /// Of the next adapter's u, a part for each tile beside each other.
    parts: Option<DeviceBuffer<f32>>,
}

/// The beginning of [`nt_swiglu`]: u of all that is `projected`, gate's first and up's second, overwritten. `next`: a `[R, n]` and the
/// rank of an adapter of what reads `out`.
///
/// # Errors
/// A launch fails, or the arena is too small.
///
/// # Panics
/// Shapes that do not fit.
pub fn begin_swiglu(
    gpu: &Gpu,
    arena: &Arena,
    x: &DeviceSlice<bf16>,
    weights: [Weight; 2],
    projected: Projections,
    gate: &mut DeviceSlice<bf16>,
    up: &mut DeviceSlice<bf16>,
    out: &mut DeviceSlice<bf16>,
    next: Option<Reader>,
    m: usize,
    k: usize,
    n: usize,
) -> Result<Activating> {
    weights.iter().for_each(|weight| weight.assert_bare("begin_swiglu"));
    let tile = Some(WIDE).filter(|_| is_one(gpu, &weights, k, n));
    if !fit_beside(tile, &projected) {
        let begun = project_alone(gpu, x, projected, m, k)?;
        return Ok(Activating { begun, parts: None });
    }
    let next = next.filter(|(_, rank)| padded(*rank) <= ACTIVATED_RANK);
    activate_first(gpu, arena, x, weights, projected, gate, up, out, next, m, k, n)
}

pub(super) fn activate_first(
    gpu: &Gpu,
    arena: &Arena,
    x: &DeviceSlice<bf16>,
    weights: [Weight; 2],
    projected: Projections,
    gate: &mut DeviceSlice<bf16>,
    up: &mut DeviceSlice<bf16>,
    out: &mut DeviceSlice<bf16>,
    next: Option<Reader>,
    m: usize,
    k: usize,
    n: usize,
) -> Result<Activating> {
    let columns = first_of(gpu, projected, 2, WIDTH, m, k, n);
    let (begun, factors) = (columns.begun(n), [0, 1].map(|i| columns.factors(i)));
    let mut parts = next.map(|(_, rank)| parts_of(arena, m, n, rank)).transpose()?;
    let next = next.zip(parts.as_deref_mut());
    activate(gpu, columns, x, weights, factors, gate, up, out, next, m, k, n)?;
    Ok(Activating { begun, parts })
}

/// Two [`nt`] with beta 0 and [`swiglu::forward`]: `gate`, `up`, `out`: `[m, n]`; and for `next`, an adapter of what reads `out`, as
/// [`project`]. From where it has begun.
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
    activating: Activating,
) -> Result<()> {
    let one = is_one(gpu, &weights, k, n);
    // A high rank takes more from memory in parts than all of `out` is.
    let (inside, mut after) = match next {
        Some(next) if one && padded(next.rank) <= ACTIVATED_RANK => (Some(next), None),
        next => (None, next),
    };
    if one {
        activate_rest(gpu, arena, x, weights, gate, up, out, inside, m, k, n, activating)?;
    } else {
        activating.begun.assert_nothing("nt_swiglu");
        for (Weight { w, bias, adapter }, y) in weights.into_iter().zip([&mut *gate, &mut *up]) {
            nt(gpu, x, w, y, m, k, n, 0.0, bias, adapter)?;
        }
        swiglu::forward(gpu, gate, up, out)?;
    }
    match &mut after {
        Some(next) => project(gpu, out, std::slice::from_mut(next), m, n),
        None => Ok(()),
    }
}

/// Whether one kernel makes gate, up and out.
fn is_one(gpu: &Gpu, weights: &[Weight; 2], k: usize, n: usize) -> bool {
    weights.iter().all(|weight| weight.bias.is_none()) && Tile::of(gpu, k, n) == Some(WIDE)
}

/// The highest rank of which u is made with `out`; two of hopper_swiglu.cu's groups.
const ACTIVATED_RANK: usize = 32;

/// Room for u of `rank` in parts.
fn parts_of(arena: &Arena, m: usize, n: usize, rank: usize) -> Result<DeviceBuffer<f32>> {
    arena.take(n.div_ceil(WIDTH) * m * padded(rank))
}

pub(super) fn activate_rest(
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
    Activating { begun, mut parts }: Activating,
) -> Result<()> {
    let as_begun = begun.columns == 0 || parts.is_some() == next.is_some();
    assert!(as_begun, "nt_swiglu: it has begun with another adapter of what reads `out`");
    let columns = Columns::rest(WIDE, WIDTH, n, begun);
    let factors = weights.map(|weight| weight.adapter.map(Factors::from));
    if let (None, Some(next)) = (&parts, &next) {
        parts = Some(parts_of(arena, m, n, next.rank)?);
    }
    let projected = next.as_ref().map(|next| (next.a, next.rank)).zip(parts.as_deref_mut());
    activate(gpu, columns, x, weights, factors, gate, up, out, projected, m, k, n)?;
    match (next, &parts) {
        (Some(next), Some(parts)) if m > 0 => round_partials(gpu, parts, n.div_ceil(WIDTH), next.u),
        _ => Ok(()),
    }
}

/// `next`: a, the rank, and room for u in parts.
fn activate(
    gpu: &Gpu,
    columns: Columns,
    x: &DeviceSlice<bf16>,
    [of_gate, of_up]: [Weight; 2],
    factors: [Option<Factors>; 2],
    gate: &mut DeviceSlice<bf16>,
    up: &mut DeviceSlice<bf16>,
    out: &mut DeviceSlice<bf16>,
    next: Option<(Reader, &mut DeviceSlice<f32>)>,
    m: usize,
    k: usize,
    n: usize,
) -> Result<()> {
    let op = "nt_swiglu";
    let results = [("gate", gate.len(), m, n), ("up", up.len(), m, n), ("out", out.len(), m, n)];
    assert_shapes(op, results);
    let operands =
        [("x", x.len(), m, k), ("gate's w", of_gate.w.len(), n, k), ("up's", of_up.w.len(), n, k)];
    assert_shapes(op, operands);
    assert_multiples_of_8(op, [("k", k), ("n", n)]);
    for factors in factors {
        Factors::assert_fits(op, factors, m, n);
    }
    if let Some(((a, rank), parts)) = &next {
        let rank = padded(*rank);
        let parts = ("the parts of u", parts.len(), m * n.div_ceil(WIDTH), rank);
        assert_shapes(op, [("a", a.len(), rank, n), parts]);
    }
    if m * n == 0 || columns.none() {
        return Ok(());
    }
    let grid = columns.grid(gpu, m);
    let Columns { tile, first, across, shorts, .. } = columns;
    let (a, parts) = next.unzip();
    let (a, groups) = a.map_or((None, 0), |(a, rank)| (Some(a), (padded(rank) / PADDING) as i32));
    let half = Some(WIDE.n / CLUSTER);
    let [of_x, w_gate, u_gate, b_gate] = maps(gpu, (x, of_gate.w), factors[0], (m, k, n), half)?;
    let [_, w_up, u_up, b_up] = maps(gpu, (x, of_up.w), factors[1], (m, k, n), half)?;
    let gate = gpu.tensor_map_mut(gate, [m, n], PIECE)?;
    let up = gpu.tensor_map_mut(up, [m, n], PIECE)?;
    let out = gpu.tensor_map_mut(out, [m, n], PIECE)?;
    let args = args![of_x, w_gate, w_up, u_gate, b_gate, u_up, b_up];
    let args = with_shorts(gpu, args, shorts, of_x, [k; SHARING], true)?;
    let args = args.with(gate).with(up).with(out).with(a).with(groups).with(parts);
    let args = args.with(m as i32).with(n as i32).with(first as i32).with(across as i32);
    let args = args.with(k as i32);
    let ranks = factors.map(|factors| factors.map_or(0, |factors| factors.rank) as i32);
    let args = ranks.into_iter().fold(args, Args::with);
    gpu.launch(&activating(tile), grid, tile.shared_bytes(), args)
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
        let Some(Pulled { b, du, rank, .. }) = pulled else { continue };
        nn(gpu, dy, b, du, m, i, padded(rank), 0.0, None)?;
    }
    Ok(())
}

/// The highest rank of which du is made with the gradients that it is made of: sums of more do not fit in the registers beside a tile's.
const PULLED_RANK: usize = 32;

pub(super) fn activate_backward(
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
    let rank = adapter.map_or(0, |adapter| padded(adapter.rank));
    let tiles = (BACKWARD.whole(i).pairs(m), slices(n, rank));
    let parts = i.div_ceil(BACKWARD.n as usize);
    let take = |it: &Pulled| arena.take::<f32>(parts * it.du.len());
    let [of_gate, of_up] = &pulled;
    let mut gate_partial = of_gate.as_ref().map(take).transpose()?;
    let mut up_partial = of_up.as_ref().map(take).transpose()?;
    let [b_gate, b_up] = pulled.each_ref().map(|it| it.as_ref().map(|it| it.b));
    let [dy, w, du, a] = maps(gpu, (dy, w), adapter.map(Into::into), (m, n, i), None)?;
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
            rank as i32,
            with_act
        ];
        let from = Tasks::From(0);
        let shared =
            hopper::share::<1>(gpu, BACKWARD, clusters(gpu), args, tiles, now, from, gate)?;
        shared.launch(gpu, &activating_backward(pulled_rank / PADDING))?;
        hopper::launch(gpu, WIDE, clusters(gpu), None, later, from).map(|_| ())
    })?;
    for (pulled, partial) in pulled.into_iter().zip([gate_partial, up_partial]) {
        let Some((Pulled { du, .. }, partial)) = pulled.zip(partial) else { continue };
        round_partials(gpu, &partial, parts, du)?;
    }
    Ok(())
}

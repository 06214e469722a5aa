//! Attention on a GPU: [`super`]'s functions with bf16 for the numbers and f32 for log-sum-exps. Where a
//! batch's texts lie is a [`Schedule`] here, made from the layout once for all layers.
//!
//! A group has the same bits whatever it is packed with, in both directions. On compute capability 9.0 heads of 64 and 128 get
//! kernels of their own ([`hopper`]); the schedule knows which it is for.

pub(crate) mod hopper;
mod schedule;
mod tiling;

pub use schedule::{Schedule, most_numbers};

use super::Heads;
use crate::args;
use crate::cuda::{DeviceSlice, Gpu, Kernel, Result, Source};
use crate::rope::cuda as rope;
use half::bf16;
use tiling::{DECODE_ROWS, PART_KEYS, THREADS, Tiling};

const ROWS: (&str, &str) = ("rows.cuh", include_str!("rows.cuh"));
const HEADERS: &[(&str, &str)] = &[ROWS, ("tiles.cuh", include_str!("tiles.cuh"))];
static SOURCE: Source =
    Source { name: "attention.cu", text: include_str!("../attention.cu"), headers: HEADERS };
static DECODE: Source =
    Source { name: "decode.cu", text: include_str!("decode.cu"), headers: HEADERS };

/// head_dim and query heads per key head of the models that the kernels are checked for.
const SHAPES: [(usize, usize); 13] = [
    (64, 1),
    (64, 2),
    (64, 4),
    (64, 7),
    (80, 1),
    (96, 1),
    (128, 1),
    (128, 2),
    (128, 3),
    (128, 4),
    (128, 5),
    (128, 7),
    (128, 8),
];

/// Every kernel for the shapes of heads of known models; others are compiled as they are needed.
pub static KERNELS: [Kernel; 6 * SHAPES.len()] = {
    let mut all = [Tiling::new(64, 1).kernel("attention_forward"); 6 * SHAPES.len()];
    let mut i = 0;
    while i < SHAPES.len() {
        let tiling = Tiling::new(SHAPES[i].0, SHAPES[i].1);
        all[6 * i] = tiling.kernel("attention_forward");
        all[6 * i + 1] = tiling.kernel("attention_backward_delta");
        all[6 * i + 2] = tiling.kernel("attention_backward_keys");
        all[6 * i + 3] = tiling.kernel("attention_backward_queries");
        all[6 * i + 4] = tiling.decode_kernel("attention_decode");
        all[6 * i + 5] = tiling.decode_kernel("attention_decode_combine");
        i += 1;
    }
    all
};

/// `q`, `out`: `[T, heads, D]`, `k`, `v`: `[T, kv_heads, D]`, `lse`: `[T, heads]` for the way back;
/// `tables`: the schedule's numbers. Overwrites `out` and `lse`.
///
/// # Errors
/// The device's.
pub fn forward(
    gpu: &Gpu,
    q: &DeviceSlice<bf16>,
    k: &DeviceSlice<bf16>,
    v: &DeviceSlice<bf16>,
    schedule: &Schedule,
    tables: &DeviceSlice<i32>,
    out: &mut DeviceSlice<bf16>,
    lse: &mut DeviceSlice<f32>,
) -> Result<()> {
    let Schedule { heads, tiling, forward: table, .. } = schedule;
    assert_queries(schedule, &[("q", q), ("out", out)]);
    assert_keys(schedule, &[("k", k), ("v", v)]);
    assert_per_head(schedule, &[("lse", lse)]);
    assert_tables(schedule, tables);
    if table.blocks == 0 {
        return Ok(());
    }
    if let Some(hopper) = schedule.hopper {
        return hopper.forward(gpu, q, k, v, schedule, tables, out, lse);
    }
    let (tiles, runs) = table.of(tables);
    let (kv_heads, window) = (heads.kv_heads as i32, schedule.window as i32);
    let args = args![q, k, v, out, lse, tiles, runs, kv_heads, window, heads.scale()];
    let grid = [table.blocks, heads.kv_heads as u32, 1];
    gpu.launch(&tiling.kernel("attention_forward"), grid, tiling.forward_bytes(), args)
}

/// How q and k were turned before the attention: by these angles at each row's position in its text, which `positions`: `[T]` also say.
#[derive(Clone, Copy)]
pub struct Turned<'a> {
    pub table: &'a rope::Table,
    pub positions: &'a DeviceSlice<u32>,
}

/// What the kernels of the way back read once `delta` is there: see [`backward`].
#[derive(Clone, Copy)]
struct Read<'a> {
    dout: &'a DeviceSlice<bf16>,
    q: &'a DeviceSlice<bf16>,
    k: &'a DeviceSlice<bf16>,
    v: &'a DeviceSlice<bf16>,
    lse: &'a DeviceSlice<f32>,
    delta: &'a DeviceSlice<f32>,
    schedule: &'a Schedule,
    tables: &'a DeviceSlice<i32>,
}

/// The gradients of [`forward`], from its `out` and `lse`; shapes as there, `dout` and `dq` like `q`, `dk`
/// and `dv` like `k`, the two former before q and k were `turned`. `delta`: `[T, heads]`, room for rowsum(dout ∘ out); `room`:
/// [`Schedule::backward_room`]'s numbers, or none, for two kernels where Hopper has one. Overwrites `delta`, `room`, `dq`, `dk` and `dv`.
///
/// # Errors
/// The device's.
pub fn backward(
    gpu: &Gpu,
    dout: &DeviceSlice<bf16>,
    q: &DeviceSlice<bf16>,
    k: &DeviceSlice<bf16>,
    v: &DeviceSlice<bf16>,
    out: &DeviceSlice<bf16>,
    lse: &DeviceSlice<f32>,
    schedule: &Schedule,
    tables: &DeviceSlice<i32>,
    turned: Option<Turned>,
    delta: &mut DeviceSlice<f32>,
    room: &mut DeviceSlice<f32>,
    dq: &mut DeviceSlice<bf16>,
    dk: &mut DeviceSlice<bf16>,
    dv: &mut DeviceSlice<bf16>,
) -> Result<()> {
    let Schedule { heads, tiling, .. } = schedule;
    assert_queries(schedule, &[("dout", dout), ("q", q), ("out", out), ("dq", dq)]);
    assert_keys(schedule, &[("k", k), ("v", v), ("dk", dk), ("dv", dv)]);
    assert_per_head(schedule, &[("lse", lse), ("delta", delta)]);
    assert_tables(schedule, tables);
    let needed = schedule.backward_room();
    assert!([0, needed].contains(&room.len()), "attention: room must be [{needed}]");
    if schedule.rows == 0 {
        return Ok(());
    }
    let rows = schedule.rows * heads.heads;
    let warps = THREADS as usize / 32;
    let grid = [rows.div_ceil(warps) as u32, 1, 1];
    let args = args![dout, out, &mut *delta, rows as i64];
    gpu.launch(&tiling.kernel("attention_backward_delta"), grid, 0, args)?;

    let read = Read { dout, q, k, v, lse, delta, schedule, tables };
    match schedule.hopper {
        Some(hopper) if room.len() > 0 => {
            return hopper.backward(gpu, &read, turned, room, dq, dk, dv);
        }
        Some(hopper) => hopper.backward_twice(gpu, &read, dq, dk, dv)?,
        None => backward_portable(gpu, &read, dq, dk, dv)?,
    }
    let Some(Turned { table, positions }) = turned else { return Ok(()) };
    rope::backward(gpu, table, dq, heads.heads, positions)?;
    rope::backward(gpu, table, dk, heads.kv_heads, positions)
}

/// [`backward`] once `delta` is there, and nothing is turned.
fn backward_portable(
    gpu: &Gpu,
    read: &Read,
    dq: &mut DeviceSlice<bf16>,
    dk: &mut DeviceSlice<bf16>,
    dv: &mut DeviceSlice<bf16>,
) -> Result<()> {
    let &Read { dout, q, k, v, lse, delta, schedule, tables } = read;
    let Schedule { heads, tiling, .. } = schedule;
    let (kv_heads, window) = (heads.kv_heads as i32, schedule.window as i32);
    let table = &schedule.backward_keys;
    let (tiles, runs) = table.of(tables);
    let grid = [table.blocks, heads.kv_heads as u32, 1];
    let args =
        args![dout, q, k, v, lse, delta, dk, dv, tiles, runs, kv_heads, window, heads.scale()];
    let kernel = tiling.kernel("attention_backward_keys");
    gpu.launch(&kernel, grid, tiling.backward_keys_bytes(), args)?;

    let table = &schedule.backward_queries;
    let (tiles, runs) = table.of(tables);
    let grid = [table.blocks, heads.kv_heads as u32, 1];
    let args = args![dout, q, k, v, lse, delta, dq, tiles, runs, kv_heads, window, heads.scale()];
    let kernel = tiling.kernel("attention_backward_queries");
    gpu.launch(&kernel, grid, tiling.backward_queries_bytes(), args)
}

/// One new token against a cache. `q`, `out`: `[heads, D]`; `k_cache`, `v_cache`: `[n, kv_heads, D]` or
/// longer hold positions 0..n, the new token's own key and value last. `partial`: room for
/// [`decode_room`] numbers. Overwrites `out`, and as much of `partial` as it takes.
///
/// # Errors
/// The device's, or there is no kernel for these heads.
pub fn decode(
    gpu: &Gpu,
    q: &DeviceSlice<bf16>,
    k_cache: &DeviceSlice<bf16>,
    v_cache: &DeviceSlice<bf16>,
    n: usize,
    heads: &Heads,
    window: Option<usize>,
    partial: &mut DeviceSlice<f32>,
    out: &mut DeviceSlice<bf16>,
) -> Result<()> {
    heads.assert_valid();
    super::assert_window(window);
    let tiling = Tiling::of(heads)?;
    let width = heads.query_width();
    assert_eq!(q.len(), width, "attention: q must be [{width}]");
    assert_eq!(out.len(), width, "attention: out must be [{width}]");
    assert!(n > 0, "attention: the cache must hold the new token");
    for (name, cache) in [("k_cache", k_cache), ("v_cache", v_cache)] {
        let width = heads.key_width();
        assert!(cache.len() >= n * width, "attention: {name} must be [{n}, {width}] or longer");
    }
    let room = decode_room(n, heads, window);
    assert!(partial.len() >= room, "attention: partial must have room for {room} numbers");

    let keys = visible(n, window);
    let parts = keys.div_ceil(PART_KEYS);
    let (sums, statistics) = partial.split_at_mut(parts * width);
    let grid =
        [parts, heads.kv_heads, heads.sharing().div_ceil(DECODE_ROWS)].map(|blocks| blocks as u32);
    let (first_key, keys, kv_heads) = ((n - keys) as i32, keys as i32, heads.kv_heads as i32);
    let args = args![
        q,
        k_cache,
        v_cache,
        &mut *sums,
        &mut *statistics,
        first_key,
        keys,
        kv_heads,
        heads.scale()
    ];
    gpu.launch(&tiling.decode_kernel("attention_decode"), grid, tiling.decode_bytes(), args)?;
    let grid = [heads.heads as u32, 1, 1];
    let args = args![&*sums, &*statistics, out, parts as i32];
    gpu.launch(&tiling.decode_kernel("attention_decode_combine"), grid, 0, args)
}

/// Numbers that [`decode`] needs for its partial sums; more keys never need less.
pub fn decode_room(n: usize, heads: &Heads, window: Option<usize>) -> usize {
    visible(n, window).div_ceil(PART_KEYS) * heads.heads * (heads.head_dim + 2)
}

/// How many of `n` keys the last one's query sees.
fn visible(n: usize, window: Option<usize>) -> usize {
    window.map_or(n, |window| window.min(n))
}

#[track_caller]
fn assert_queries(schedule: &Schedule, queries: &[(&str, &DeviceSlice<bf16>)]) {
    let (rows, width) = (schedule.rows, schedule.heads.query_width());
    for (name, x) in queries {
        assert_eq!(x.len(), rows * width, "attention: {name} must be [{rows}, {width}]");
    }
}

#[track_caller]
fn assert_keys(schedule: &Schedule, keys: &[(&str, &DeviceSlice<bf16>)]) {
    let (rows, width) = (schedule.rows, schedule.heads.key_width());
    for (name, x) in keys {
        assert_eq!(x.len(), rows * width, "attention: {name} must be [{rows}, {width}]");
    }
}

#[track_caller]
fn assert_per_head(schedule: &Schedule, statistics: &[(&str, &DeviceSlice<f32>)]) {
    let (rows, heads) = (schedule.rows, schedule.heads.heads);
    for (name, x) in statistics {
        assert_eq!(x.len(), rows * heads, "attention: {name} must be [{rows}, {heads}]");
    }
}

#[track_caller]
fn assert_tables(schedule: &Schedule, tables: &DeviceSlice<i32>) {
    let numbers = schedule.numbers().len();
    assert_eq!(tables.len(), numbers, "attention: tables must be the schedule's {numbers} numbers");
}

#[cfg(test)]
mod tests;

//! Attention on Hopper (hopper_*.cu): what [`super::forward`] and [`super::backward`] are on a device of compute capability 9.0,
//! for heads of 64 and 128.

#[cfg(test)]
mod tests;

use super::super::Heads;
use super::{ROWS, Read, SHAPES, Schedule, Turned};
use crate::args;
use crate::cuda::{
    Args, DeviceSlice, Gpu, HOPPER, HOPPER_PRODUCTS, Kernel, Result, Source, TILE, TensorMap,
};
use crate::rope::cuda as rope;
use half::bf16;

const TILES: (&str, &str) = ("hopper_tiles.cuh", include_str!("../hopper_tiles.cuh"));
const SUMS: (&str, &str) = ("hopper_sums.cuh", include_str!("../hopper_sums.cuh"));
const HEADERS: &[(&str, &str)] = &[HOPPER, HOPPER_PRODUCTS, TILE, ROWS, TILES];
static FORWARD: Source = Source {
    name: "hopper_forward.cu",
    text: include_str!("../hopper_forward.cu"),
    headers: HEADERS,
};
static BACKWARD: Source = Source {
    name: "hopper_backward.cu",
    text: include_str!("../hopper_backward.cu"),
    headers: &[HOPPER, HOPPER_PRODUCTS, TILE, ROWS, TILES, SUMS, rope::HEADER],
};
static BACKWARD_FINISH: Source = Source {
    name: "hopper_backward_finish.cu",
    text: include_str!("../hopper_backward_finish.cu"),
    headers: &[TILE, ROWS, SUMS, rope::HEADER],
};
static BACKWARD_KEYS: Source = Source {
    name: "hopper_backward_keys.cu",
    text: include_str!("../hopper_backward_keys.cu"),
    headers: HEADERS,
};
static BACKWARD_QUERIES: Source = Source {
    name: "hopper_backward_queries.cu",
    text: include_str!("../hopper_backward_queries.cu"),
    headers: HEADERS,
};

/// Threads of a block: a warpgroup that copies and two that multiply.
const THREADS: u32 = 384;
/// Of one that makes dq of its sums.
const FINISHERS: u32 = 128;
/// Rows of a block's own tile, 64 for each warpgroup that multiplies.
pub(super) const OWN: usize = 128;
/// Keys of a tile that queries meet, and stacked queries of one that keys meet. Of the latter there is room for fewer in
/// registers: both dk and dv are there.
const KEYS: usize = 128;
const QUERIES: usize = 64;
/// Tiles of dq in one pass that are on their way to memory, and tiles of queries of which is known what they are.
const STAGED: usize = 2;
const KNOWN: usize = 8;
/// Numbers that say what a tile of queries is of, one that is met, and one that is met in one pass.
const OF_QUERIES: usize = 5;
const OF_TILE: usize = 3;
const OF_KNOWN: usize = 4;

/// What the kernels are compiled for, and the device they run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiling {
    head_dim: usize,
    sharing: usize,
    multiprocessors: u32,
}

/// How many of `SHAPES` the kernels take.
const COUNT: usize = {
    let (mut count, mut i) = (0, 0);
    while i < SHAPES.len() {
        count += Tiling::takes(SHAPES[i].0) as usize;
        i += 1;
    }
    count
};

/// Every kernel for the shapes of heads of known models.
pub static KERNELS: [Kernel; 5 * COUNT] = {
    const fn of(head_dim: usize, sharing: usize) -> Tiling {
        Tiling { head_dim, sharing, multiprocessors: 0 }
    }
    let mut all = [of(64, 1).forward_kernel(); 5 * COUNT];
    let (mut count, mut i) = (0, 0);
    while i < SHAPES.len() {
        let (head_dim, sharing) = SHAPES[i];
        if Tiling::takes(head_dim) {
            let tiling = of(head_dim, sharing);
            all[count] = tiling.forward_kernel();
            all[count + 1] = tiling.backward_kernel();
            all[count + 2] = tiling.finish_kernel();
            all[count + 3] = tiling.backward_keys_kernel();
            all[count + 4] = tiling.backward_queries_kernel();
            count += 5;
        }
        i += 1;
    }
    all
};

/// Tokens of a tile of queries that keys meet, for so many query heads to a key head.
pub(super) fn tokens_met(sharing: usize) -> usize {
    QUERIES / sharing
}

impl Tiling {
    /// None where the portable kernels are used.
    pub(super) fn of(gpu: &Gpu, heads: &Heads) -> Option<Self> {
        let (head_dim, sharing) = (heads.head_dim, heads.sharing());
        let properties = gpu.properties();
        let (hopper, multiprocessors) =
            (properties.compute_capability == (9, 0), properties.multiprocessors);
        (hopper && Self::takes(head_dim)).then_some(Self { head_dim, sharing, multiprocessors })
    }

    /// Heads whose rows are whole panels of 64 numbers. Others would multiply zeros.
    const fn takes(head_dim: usize) -> bool {
        head_dim == 64 || head_dim == 128
    }

    /// Tokens of a block of queries.
    pub(super) fn tokens(self) -> usize {
        OWN / self.sharing
    }

    /// Tokens of a tile of queries that keys meet.
    pub(super) fn tokens_met(self) -> usize {
        tokens_met(self.sharing)
    }

    /// Tiles of keys that queries meet in runs of so many.
    pub(super) fn tiles_of(self, runs: impl Iterator<Item = usize>) -> usize {
        runs.map(|tokens| tokens.div_ceil(KEYS)).sum()
    }

    /// Blocks that run at once.
    pub(super) fn blocks(self) -> usize {
        self.multiprocessors as usize
    }

    /// Tiles that are on their way or being read, as many as there is room for.
    const fn forward_stages(self) -> usize {
        if self.head_dim == 64 { 4 } else { 2 }
    }

    const fn backward_stages(self) -> usize {
        if self.head_dim == 64 { 4 } else { 2 }
    }

    const fn backward_keys_stages(self) -> usize {
        4
    }

    const fn backward_queries_stages(self) -> usize {
        if self.head_dim == 64 { 4 } else { 2 }
    }

    const fn kernel(self, source: &'static Source, name: &'static str, stages: usize) -> Kernel {
        Kernel::new(source, name, THREADS)
            .define("HEAD_DIM", self.head_dim as i64)
            .define("SHARING", self.sharing as i64)
            .define("ROWS", OWN as i64)
            .define("STAGES", stages as i64)
    }

    const fn forward_kernel(self) -> Kernel {
        let kernel = self.kernel(&FORWARD, "hopper_attention_forward", self.forward_stages());
        kernel.define("KEYS", KEYS as i64)
    }

    const fn backward_kernel(self) -> Kernel {
        let (name, stages) = ("hopper_attention_backward", self.backward_stages());
        self.kernel(&BACKWARD, name, stages).define("QUERIES", QUERIES as i64)
    }

    const fn finish_kernel(self) -> Kernel {
        Kernel::new(&BACKWARD_FINISH, "hopper_attention_backward_finish", FINISHERS)
            .define("HEAD_DIM", self.head_dim as i64)
            .define("SHARING", self.sharing as i64)
    }

    const fn backward_keys_kernel(self) -> Kernel {
        let (name, stages) = ("hopper_attention_backward_keys", self.backward_keys_stages());
        self.kernel(&BACKWARD_KEYS, name, stages).define("QUERIES", QUERIES as i64)
    }

    const fn backward_queries_kernel(self) -> Kernel {
        let (name, stages) = ("hopper_attention_backward_queries", self.backward_queries_stages());
        self.kernel(&BACKWARD_QUERIES, name, stages).define("KEYS", KEYS as i64)
    }

    const fn forward_bytes(self) -> u32 {
        let stages = self.forward_stages();
        self.bytes(2 * OWN + 2 * stages * KEYS, 2 + 4 * stages, OF_QUERIES + stages * OF_TILE)
    }

    const fn backward_bytes(self) -> u32 {
        let stages = self.backward_stages();
        // Slopes, and dq in f32.
        let fixed = 2 * OWN * QUERIES * size_of::<bf16>();
        let rows = 2 * OWN + 2 * stages * QUERIES + 2 * STAGED * QUERIES;
        let numbers = stages * 2 * QUERIES + KNOWN * OF_KNOWN + 1;
        fixed as u32 + self.bytes(rows, 1 + 2 * stages + 2 * STAGED, numbers)
    }

    const fn backward_keys_bytes(self) -> u32 {
        let stages = self.backward_keys_stages();
        let statistics = 2 * QUERIES;
        let rows = 2 * OWN + 2 * stages * QUERIES;
        self.bytes(rows, 1 + 2 * stages, stages * (statistics + OF_TILE))
    }

    const fn backward_queries_bytes(self) -> u32 {
        let stages = self.backward_queries_stages();
        self.bytes(3 * OWN + 2 * stages * KEYS, 2 + 2 * stages, OF_QUERIES + stages * OF_TILE)
    }

    /// Of rows of tiles, barriers and numbers.
    const fn bytes(self, rows: usize, barriers: usize, numbers: usize) -> u32 {
        let rows = rows * self.head_dim * size_of::<bf16>();
        (rows + barriers * size_of::<u64>() + numbers * size_of::<i32>()) as u32
    }

    /// A map of queries or their like, in boxes of a tile of `rows`.
    fn queries<'a>(
        self,
        gpu: &Gpu,
        x: &'a DeviceSlice<bf16>,
        schedule: &Schedule,
        rows: usize,
    ) -> Result<TensorMap<'a>> {
        let (tokens, Heads { heads, head_dim, .. }) = (schedule.rows, schedule.heads);
        let boxes = [rows / self.sharing, self.sharing].map(|side| side as u32);
        gpu.tensor_map_of_heads(x, [tokens, heads, head_dim], boxes)
    }

    /// A map of keys or values, in boxes of a tile of `rows`.
    fn keys<'a>(
        self,
        gpu: &Gpu,
        x: &'a DeviceSlice<bf16>,
        schedule: &Schedule,
        rows: usize,
    ) -> Result<TensorMap<'a>> {
        let (tokens, Heads { kv_heads, head_dim, .. }) = (schedule.rows, schedule.heads);
        gpu.tensor_map_of_heads(x, [tokens, kv_heads, head_dim], [rows as u32, 1])
    }

    /// Maps of dout, q, k and v, in boxes of tiles of so many queries and keys, lse and delta: what each kernel of the way back
    /// begins with.
    fn inputs<'a>(
        self,
        gpu: &Gpu,
        read: &Read<'a>,
        [queries, keys]: [usize; 2],
    ) -> Result<Args<'a>> {
        let &Read { dout, q, k, v, lse, delta, schedule, .. } = read;
        let (dout, q) =
            (self.queries(gpu, dout, schedule, queries)?, self.queries(gpu, q, schedule, queries)?);
        let (k, v) = (self.keys(gpu, k, schedule, keys)?, self.keys(gpu, v, schedule, keys)?);
        Ok(args![dout, q, k, v, lse, delta])
    }

    /// Arguments of a kernel in which keys meet queries and that writes this.
    fn of_keys<'a>(self, gpu: &Gpu, read: &Read<'a>, written: Args<'a>) -> Result<Args<'a>> {
        let &Read { schedule: Schedule { heads, window, backward_keys, .. }, tables, .. } = read;
        let (tiles, runs) = backward_keys.of(tables);
        let (kv_heads, window) = (heads.kv_heads as i32, *window as i32);
        let args = self.inputs(gpu, read, [QUERIES, OWN])?.and(written);
        Ok(args.and(args![tiles, runs, kv_heads, window, heads.scale()]))
    }

    /// A block for each multiprocessor, which has one task after the other, or for each task.
    fn grid(self, schedule: &Schedule) -> [u32; 3] {
        let tasks = schedule.forward.blocks * schedule.heads.kv_heads as u32;
        [tasks.min(self.multiprocessors), 1, 1]
    }

    /// As [`super::forward`], whose checks are made; there is at least one row.
    pub(super) fn forward(
        self,
        gpu: &Gpu,
        q: &DeviceSlice<bf16>,
        k: &DeviceSlice<bf16>,
        v: &DeviceSlice<bf16>,
        schedule: &Schedule,
        tables: &DeviceSlice<i32>,
        out: &mut DeviceSlice<bf16>,
        lse: &mut DeviceSlice<f32>,
    ) -> Result<()> {
        let Schedule { heads, forward: table, .. } = schedule;
        let q = self.queries(gpu, q, schedule, OWN)?;
        let (k, v) = (self.keys(gpu, k, schedule, KEYS)?, self.keys(gpu, v, schedule, KEYS)?);
        let (tiles, runs) = table.of(tables);
        let (kv_heads, window) = (heads.kv_heads as i32, schedule.window as i32);
        let (next, count) = (schedule.next(tables), table.blocks as i32);
        let args =
            args![q, k, v, out, lse, tiles, runs, next, count, kv_heads, window, heads.scale()];
        gpu.launch(&self.forward_kernel(), self.grid(schedule), self.forward_bytes(), args)
    }

    /// As [`super::backward`], whose checks are made; there is at least one row, and room for one pass.
    pub(super) fn backward(
        self,
        gpu: &Gpu,
        read: &Read,
        turned: Option<Turned>,
        room: &mut DeviceSlice<f32>,
        dq: &mut DeviceSlice<bf16>,
        dk: &mut DeviceSlice<bf16>,
        dv: &mut DeviceSlice<bf16>,
    ) -> Result<()> {
        let &Read { schedule, tables, .. } = read;
        let heads = &schedule.heads;
        let (sums, words) = room.split_at_mut(schedule.rows * heads.query_width());
        gpu.zero(words)?;
        let angles = turned.map(|turned| turned.table.angles());
        let positions = turned.map_or(0, |turned| turned.table.positions()) as u32;
        let written = args![&mut *sums, words, dk, dv];
        let args = self.of_keys(gpu, read, written)?.with(angles).with(positions);
        let grid = [schedule.backward_keys.blocks * heads.kv_heads as u32, 1, 1];
        gpu.launch(&self.backward_kernel(), grid, self.backward_bytes(), args)?;

        let (tiles, count) = schedule.met_queries(tables);
        let kv_heads = heads.kv_heads;
        let args = args![&*sums, dq, tiles, kv_heads as i32, heads.scale(), angles, positions];
        gpu.launch(&self.finish_kernel(), [count as u32, kv_heads as u32, 1], 0, args)
    }

    /// The same in two kernels, without room, and nothing is turned.
    pub(super) fn backward_twice(
        self,
        gpu: &Gpu,
        read: &Read,
        dq: &mut DeviceSlice<bf16>,
        dk: &mut DeviceSlice<bf16>,
        dv: &mut DeviceSlice<bf16>,
    ) -> Result<()> {
        let &Read { schedule, tables, .. } = read;
        let heads = &schedule.heads;
        let args = self.of_keys(gpu, read, args![dk, dv])?;
        let grid = [schedule.backward_keys.blocks, heads.kv_heads as u32, 1];
        gpu.launch(&self.backward_keys_kernel(), grid, self.backward_keys_bytes(), args)?;

        let table = &schedule.backward_queries;
        let (tiles, runs) = table.of(tables);
        let (next, count) = (schedule.next(tables), table.blocks as i32);
        let (kv_heads, window) = (heads.kv_heads as i32, schedule.window as i32);
        let args = args![dq, tiles, runs, next, count, kv_heads, window, heads.scale()];
        let args = self.inputs(gpu, read, [OWN, KEYS])?.and(args);
        let (kernel, bytes) = (self.backward_queries_kernel(), self.backward_queries_bytes());
        gpu.launch(&kernel, self.grid(schedule), bytes, args)
    }
}

//! The products on Hopper (hopper.cu): what [`super::nt`] and [`super::nn`] are on a device of compute capability 9.0.

mod gradients;
mod short;
#[cfg(test)]
mod tests;

pub(super) use gradients::{Gradient, Tasks, launch, nn_with_gradients, share, with_waiting};
pub use short::Begun;
pub(crate) use short::Factors;
pub(super) use short::{Columns, SHORT_GROUPS, groups_of, with_shorts};

use super::Layer;
use super::adapter::{SHARING, THREE};
use crate::args;
use crate::cuda::{
    DeviceSlice, Gpu, HOPPER, HOPPER_PRODUCTS, Kernel, Result, Source, TILE, TensorMap,
};
use half::bf16;

pub(crate) const PRODUCT_HEADER: (&str, &str) =
    ("hopper_product.cuh", include_str!("../hopper_product.cuh"));
pub(super) const GRADIENTS_HEADER: (&str, &str) =
    ("hopper_gradients.cuh", include_str!("../hopper_gradients.cuh"));
pub(super) const SHORT_HEADER: (&str, &str) =
    ("hopper_short.cuh", include_str!("../hopper_short.cuh"));
static PRODUCT: Source = Source {
    name: "hopper.cu",
    text: include_str!("../hopper.cu"),
    headers: &[
        HOPPER,
        HOPPER_PRODUCTS,
        TILE,
        THREE,
        PRODUCT_HEADER,
        GRADIENTS_HEADER,
        SHORT_HEADER,
    ],
};

/// Blocks of a cluster, rows of a block's tile and of the piece that one warpgroup stores; as hopper_product.cuh.
pub(crate) const CLUSTER: u32 = 2;
const TILE_M: u32 = 128;
pub(crate) const PIECE: u32 = 64;
/// Of the depth.
const SLICE: usize = 64;
const ROW_BYTES: u32 = 128;
const THREADS: u32 = 384;

/// How a product is cut up: columns of a tile, slices and pieces in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    pub n: u32,
    pub stages: u32,
    /// Pieces on their way to or from global memory, for each of the two warpgroups that multiply.
    pub staged: u32,
    /// Groups of 16 of the ranks of short sides that are made beside it.
    pub short: u32,
}

/// For wide weights: a slice of 256 columns for 128 rows is what the tensor cores need to be kept busy.
pub(crate) const WIDE: Tile = Tile { n: 256, stages: 4, staged: 2, short: 0 };
/// For narrow ones, of which wide tiles would leave multiprocessors idle.
pub(crate) const NARROW: Tile = Tile { n: 128, stages: 6, staged: 2, short: 0 };

/// Every kernel of this file, with all constants that it is compiled with.
pub const KERNELS: [Kernel; 10] = [
    WIDE.kernel("hopper_nt"),
    WIDE.kernel("hopper_nn"),
    NARROW.kernel("hopper_nt"),
    NARROW.kernel("hopper_nn"),
    WIDE.with_short(SHORT_GROUPS[0]).kernel("hopper_nt"),
    WIDE.with_short(SHORT_GROUPS[0]).kernel("hopper_nn"),
    WIDE.with_short(SHORT_GROUPS[1]).kernel("hopper_nt"),
    WIDE.with_short(SHORT_GROUPS[1]).kernel("hopper_nn"),
    WIDE.with_short(SHORT_GROUPS[2]).kernel("hopper_nt"),
    WIDE.with_short(SHORT_GROUPS[2]).kernel("hopper_nn"),
];

impl Tile {
    const fn kernel(self, name: &'static str) -> Kernel {
        self.kernel_of(&PRODUCT, name)
    }

    pub(crate) const fn kernel_of(self, source: &'static Source, name: &'static str) -> Kernel {
        Kernel::new(source, name, THREADS)
            .define("TILE_N", self.n as i64)
            .define("STAGES", self.stages as i64)
            .define("STAGED", self.staged as i64)
            .define("SHORT_GROUPS", self.short as i64)
    }

    /// With room for short sides in each stage, of which there is one less.
    pub(crate) const fn with_short(self, groups: u32) -> Self {
        Self { stages: self.stages - 1, short: groups, ..self }
    }

    pub(crate) const fn shared_bytes(self) -> u32 {
        let staged = self.staged * (TILE_M / PIECE);
        let barriers = (2 * self.stages + staged) * size_of::<u64>() as u32;
        let beside = if self.short > 0 { PIECE } else { 0 };
        (self.stages * (TILE_M + self.n + beside) + staged * PIECE) * ROW_BYTES + barriers
    }

    /// By the weight alone, of which rows' bits may depend; none for an adapter's short side, which has no use for such tiles, and
    /// without a depth.
    pub(crate) fn of(gpu: &Gpu, depth: usize, columns: usize) -> Option<Self> {
        let hopper = gpu.properties().compute_capability == (9, 0);
        match columns {
            _ if !hopper || depth == 0 => None,
            ..=64 => None,
            65..1024 => Some(NARROW),
            _ => Some(WIDE),
        }
    }

    /// As many clusters as run at once, none without a tile.
    pub(crate) fn grid(self, gpu: &Gpu, rows: usize, columns: usize) -> [u32; 3] {
        self.whole(columns).grid(gpu, rows)
    }

    /// All columns of an output.
    pub(super) fn whole<'a>(self, columns: usize) -> Columns<'a> {
        Columns::rest(self, self.n as usize, columns, Begun::default())
    }

    /// Of a slice of a gradient's task.
    const fn tokens(self) -> u32 {
        self.n / 2
    }
}

/// Slices of a tile; the rank is 0 without an adapter.
pub(super) fn slices(depth: usize, rank: usize) -> usize {
    depth.div_ceil(SLICE) + rank.div_ceil(SLICE)
}

/// That run at once.
pub(super) fn clusters(gpu: &Gpu) -> u32 {
    (gpu.properties().multiprocessors / CLUSTER).max(1)
}

/// Tensor maps of both factors and of the adapter's; what it lacks are the weight's, and not read. `box_rows`: of `right`
/// `[columns, depth]`, which is `[depth, columns]` where there is none.
pub(crate) fn maps<'a>(
    gpu: &Gpu,
    (left, right): (&'a DeviceSlice<bf16>, &'a DeviceSlice<bf16>),
    adapter: Option<Factors<'a>>,
    (rows, depth, columns): (usize, usize, usize),
    box_rows: Option<u32>,
) -> Result<[TensorMap<'a>; 4]> {
    let of_left = |left, depth| gpu.tensor_map(left, [rows, depth], TILE_M);
    let of_right = |right, depth| match box_rows {
        Some(box_rows) => gpu.tensor_map(right, [columns, depth], box_rows),
        None => gpu.tensor_map(right, [depth, columns], PIECE),
    };
    let (x, w) = (of_left(left, depth)?, of_right(right, depth)?);
    let (mut u, mut b) = (x, w);
    if let Some(Factors { left, right, rank }) = adapter.filter(|adapter| adapter.rank > 0) {
        b = of_right(right, rank)?;
        if let Some(left) = left {
            u = of_left(left, rank)?;
        }
    }
    Ok([x, w, u, b])
}

/// As [`super::nt`], whose checks are made, some `columns`; `before`: another matrix that is added to, or whether y is.
pub(super) fn nt(
    gpu: &Gpu,
    columns: Columns,
    x: &DeviceSlice<bf16>,
    w: &DeviceSlice<bf16>,
    (before, itself): (Option<&DeviceSlice<bf16>>, bool),
    y: &mut DeviceSlice<bf16>,
    m: usize,
    k: usize,
    n: usize,
    bias: Option<&DeviceSlice<bf16>>,
    adapter: Option<Factors>,
) -> Result<()> {
    if columns.none() {
        return Ok(());
    }
    let grid = columns.grid(gpu, m);
    let Columns { tile, first, across, shorts, .. } = columns;
    let rank = adapter.map_or(0, |adapter| adapter.rank) as i32;
    let [x, w, u, b] = maps(gpu, (x, w), adapter, (m, k, n), Some(tile.n / CLUSTER))?;
    let y = gpu.tensor_map_mut(y, [m, n], PIECE)?;
    let add = i32::from(itself || before.is_some());
    let before = match before {
        Some(before) => gpu.tensor_map(before, [m, n], PIECE)?,
        None => y,
    };
    let args = with_shorts(gpu, args![x, w, u, b], shorts, x, [k; SHARING], true)?;
    let args = args.with(bias).with(before).with(y).with(m as i32).with(n as i32);
    let args = args.with(first as i32).with(across as i32);
    let args = args.with(k as i32).with(rank).with(add);
    gpu.launch(&tile.kernel("hopper_nt"), grid, tile.shared_bytes(), args)
}

/// What [`launch`] makes: as [`super::nn_together`], whose checks are made.
pub(super) struct Product<'a> {
    /// One to three with one input, and their adapters'.
    pub layers: &'a [Layer<'a>],
    pub adapters: [Option<Factors<'a>>; SHARING],
    /// `[m, k]`, and which of its columns.
    pub dx: &'a mut DeviceSlice<bf16>,
    pub columns: Columns<'a>,
    pub m: usize,
    pub k: usize,
    /// To what dx is.
    pub add: bool,
}

impl<'a> Product<'a> {
    /// All of it.
    pub fn whole(
        tile: Tile,
        layers: &'a [Layer<'a>],
        dx: &'a mut DeviceSlice<bf16>,
        (m, k): (usize, usize),
        add: bool,
    ) -> Self {
        let columns = tile.whole(k);
        Self { layers, adapters: factors(layers), dx, columns, m, k, add }
    }

    /// Slices of a tile.
    fn slices(&self) -> usize {
        let ranks = self.adapters.map(|adapter| adapter.map_or(0, |adapter| adapter.rank));
        self.layers.iter().zip(ranks).map(|(layer, rank)| slices(layer.n, rank)).sum()
    }
}

/// Of layers whose adapters have their left factors.
pub(super) fn factors<'a>(layers: &[Layer<'a>]) -> [Option<Factors<'a>>; SHARING] {
    std::array::from_fn(|i| Some(layers.get(i)?.adapter?.into()))
}

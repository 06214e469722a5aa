//! The products on Hopper (hopper.cu): what [`super::nt`] and [`super::nn`] are on a device of compute capability 9.0.

mod gradients;
#[cfg(test)]
mod tests;

pub(super) use gradients::{launch, nn_with_gradients, share, with_waiting};

use super::{Adapter, Layer, short};
use crate::args;
use crate::cuda::{
    DeviceSlice, Gpu, HOPPER, HOPPER_PRODUCTS, Kernel, Result, Source, TILE, TensorMap,
};
use half::bf16;

pub(crate) const PRODUCT_HEADER: (&str, &str) =
    ("hopper_product.cuh", include_str!("../hopper_product.cuh"));
pub(super) const GRADIENTS_HEADER: (&str, &str) =
    ("hopper_gradients.cuh", include_str!("../hopper_gradients.cuh"));
static PRODUCT: Source = Source {
    name: "hopper.cu",
    text: include_str!("../hopper.cu"),
    headers: &[HOPPER, HOPPER_PRODUCTS, TILE, PRODUCT_HEADER, GRADIENTS_HEADER],
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
}

/// For wide weights: a slice of 256 columns for 128 rows is what the tensor cores need to be kept busy.
pub(crate) const WIDE: Tile = Tile { n: 256, stages: 4, staged: 2 };
/// For narrow ones, of which wide tiles would leave multiprocessors idle.
pub(crate) const NARROW: Tile = Tile { n: 128, stages: 6, staged: 2 };

/// Every kernel of this file, with all constants that it is compiled with.
pub const KERNELS: [Kernel; 4] = [
    WIDE.kernel("hopper_nt"),
    WIDE.kernel("hopper_nn"),
    NARROW.kernel("hopper_nt"),
    NARROW.kernel("hopper_nn"),
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
    }

    pub(crate) const fn shared_bytes(self) -> u32 {
        let staged = self.staged * (TILE_M / PIECE);
        let barriers = (2 * self.stages + staged) * size_of::<u64>() as u32;
        (self.stages * (TILE_M + self.n) + staged * PIECE) * ROW_BYTES + barriers
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
        [clusters(gpu).min(self.pairs(rows, columns)) * CLUSTER, 1, 1]
    }

    /// Of a slice of a gradient's task.
    const fn tokens(self) -> u32 {
        self.n / 2
    }

    /// Pairs of tiles of an output, of which a cluster makes one at a time.
    pub(super) fn pairs(self, rows: usize, columns: usize) -> u32 {
        short(rows).div_ceil(CLUSTER * TILE_M) * short(columns).div_ceil(self.n)
    }
}

/// Slices of a tile.
pub(super) fn slices(depth: usize, adapter: Option<Adapter>) -> usize {
    depth.div_ceil(SLICE) + adapter.map_or(0, |adapter| adapter.rank.div_ceil(SLICE))
}

/// That run at once.
pub(super) fn clusters(gpu: &Gpu) -> u32 {
    (gpu.properties().multiprocessors / CLUSTER).max(1)
}

/// Tensor maps of both factors and of the adapter's; without an adapter its own are the weight's, and not read. `box_rows`: of
/// `right` `[columns, depth]`, which is `[depth, columns]` where there is none.
pub(crate) fn maps<'a>(
    gpu: &Gpu,
    (left, right): (&'a DeviceSlice<bf16>, &'a DeviceSlice<bf16>),
    adapter: Option<Adapter<'a>>,
    (rows, depth, columns): (usize, usize, usize),
    box_rows: Option<u32>,
) -> Result<[TensorMap<'a>; 4]> {
    let of = |left, right, depth| -> Result<[TensorMap<'a>; 2]> {
        let left = gpu.tensor_map(left, [rows, depth], TILE_M)?;
        let right = match box_rows {
            Some(box_rows) => gpu.tensor_map(right, [columns, depth], box_rows)?,
            None => gpu.tensor_map(right, [depth, columns], PIECE)?,
        };
        Ok([left, right])
    };
    let weight = of(left, right, depth)?;
    let more = match adapter {
        Some(Adapter { left, right, .. }) if left.len() > 0 => of(left, right, left.len() / rows)?,
        _ => weight,
    };
    Ok([weight[0], weight[1], more[0], more[1]])
}

/// As [`super::nt`], whose checks are made; `before`: another matrix that is added to, or whether y is.
pub(super) fn nt(
    gpu: &Gpu,
    tile: Tile,
    x: &DeviceSlice<bf16>,
    w: &DeviceSlice<bf16>,
    (before, itself): (Option<&DeviceSlice<bf16>>, bool),
    y: &mut DeviceSlice<bf16>,
    m: usize,
    k: usize,
    n: usize,
    bias: Option<&DeviceSlice<bf16>>,
    adapter: Option<Adapter>,
) -> Result<()> {
    let (grid, (_, _, rank)) = (tile.grid(gpu, m, n), Adapter::parts(adapter));
    let [x, w, u, b] = maps(gpu, (x, w), adapter, (m, k, n), Some(tile.n / CLUSTER))?;
    let y = gpu.tensor_map_mut(y, [m, n], PIECE)?;
    let add = i32::from(itself || before.is_some());
    let before = match before {
        Some(before) => gpu.tensor_map(before, [m, n], PIECE)?,
        None => y,
    };
    let (rows, columns, depth) = (m as i32, n as i32, k as i32);
    let args = args![x, w, u, b, bias, before, y, rows, columns, depth, rank, add];
    gpu.launch(&tile.kernel("hopper_nt"), grid, tile.shared_bytes(), args)
}

/// What [`nn`] makes.
pub(super) struct Product<'a> {
    /// One to three with one input.
    pub layers: &'a [Layer<'a>],
    /// `[m, k]`.
    pub dx: &'a mut DeviceSlice<bf16>,
    pub m: usize,
    pub k: usize,
    /// To what dx is.
    pub add: bool,
}

impl Product<'_> {
    /// Slices of a tile.
    fn slices(&self) -> usize {
        self.layers.iter().map(|layer| slices(layer.n, layer.adapter)).sum()
    }
}

/// As [`super::nn_together`], whose checks are made.
pub(super) fn nn(gpu: &Gpu, tile: Tile, product: Product) -> Result<()> {
    launch(gpu, tile, clusters(gpu), Some(product), &mut [])
}

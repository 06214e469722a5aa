//! The products on a device: bf16 in and out, sums in f32.
//!
//! ```text
//! nt    y [m,n] = beta y  + x [m,k] w[n,k]ᵀ + u [m,r] b[n,r]ᵀ + bias [n]      or before [m,n] in the place of beta y
//! few   the same for up to eight rows
//! nn    dx[m,k] = beta dx + dy[m,n] w[n,k]  + du[m,r] a[r,k]                  or a sum of several such
//! ```
//!
//! The second product, an adapter's, is part of the first (see matmul.cu); its matrices are packed by
//! [`adapter::pack`]. A product with an adapter's own short side, u = x aᵀ, is an [`nt`] as well.
//!
//! m is arbitrary. k, n and the adapter's padded rank are multiples of 8, since rows are copied 16 bytes at
//! a time; for [`few`], n is arbitrary too.
//!
//! A row has the same bits whatever other rows there are: each of [`nt`], [`nn`] and [`few`] sums every
//! element in one order, whichever tile a shape gets. On compute capability 9.0 most weights get kernels of their own
//! ([`hopper`]); which, the weight's shape alone decides.

pub mod adapter;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod full_size;
pub mod fused;
pub(crate) mod hopper;
#[cfg(test)]
mod tests;
mod together;

use crate::args;
use crate::cuda::{DeviceSlice, Gpu, Kernel, Result, Source, TILE};
use half::bf16;

pub use adapter::Adapter;
pub use hopper::Begun;
use hopper::Columns;
pub use together::{Layer, begin_together, nn_together};

pub(crate) const PRODUCT_HEADER: (&str, &str) = ("product.cuh", include_str!("product.cuh"));
static PRODUCT: Source = Source {
    name: "matmul.cu",
    text: include_str!("../matmul.cu"),
    headers: &[TILE, PRODUCT_HEADER],
};
static FEW: Source = Source { name: "few.cu", text: include_str!("few.cu"), headers: &[TILE] };

/// How a product is cut up.
#[derive(Clone, Copy, Debug)]
struct Tile {
    /// Rows and columns of the output that a block makes, depth of a slice.
    m: u32,
    n: u32,
    k: u32,
    /// Warps side by side, down and across.
    warps: (u32, u32),
    /// Slices in shared memory.
    stages: u32,
}

/// For most of the work. Four warps of 64 x 64 each: reading fragments from shared memory then takes as long as
/// multiplying them on an H100, with smaller pieces longer; two such blocks fit in an SM.
const LARGE: Tile = Tile { m: 128, n: 128, k: 32, warps: (2, 2), stages: 4 };
/// Where there would be too few large ones.
const SMALL: Tile = Tile { m: 64, n: 64, k: 64, warps: (2, 2), stages: 4 };
/// For an adapter's rank, where x is to be read once, and for few rows.
const NARROW: [Tile; 2] = [
    Tile { m: 64, n: 16, k: 64, warps: (4, 1), stages: 4 },
    Tile { m: 64, n: 32, k: 64, warps: (4, 1), stages: 4 },
];

/// SMs of an H100. A constant, so that how a product is cut up depends on shapes alone.
const MULTIPROCESSORS: u32 = 132;

/// Up to this many rows [`few`] takes.
pub const FEW_ROWS: usize = 8;

impl Tile {
    const fn kernel(self, name: &'static str) -> Kernel {
        Kernel::new(&PRODUCT, name, self.warps.0 * self.warps.1 * 32)
            .define("TILE_M", self.m as i64)
            .define("TILE_N", self.n as i64)
            .define("TILE_K", self.k as i64)
            .define("WARPS_M", self.warps.0 as i64)
            .define("WARPS_N", self.warps.1 as i64)
            .define("STAGES", self.stages as i64)
    }

    const fn shared_bytes(self) -> u32 {
        self.stages * (self.m + self.n) * self.k * size_of::<bf16>() as u32
    }

    /// Tiles of an output.
    fn count(self, rows: u32, columns: u32) -> u32 {
        rows.div_ceil(self.m) * columns.div_ceil(self.n)
    }

    /// The largest tile that fits an output and makes enough blocks to occupy a GPU.
    fn of(rows: u32, columns: u32) -> Self {
        let enough = |tile: Self| tile.count(rows, columns) >= MULTIPROCESSORS;
        match columns {
            ..=16 => NARROW[0],
            17..=32 => NARROW[1],
            65.. if enough(LARGE) => LARGE,
            _ if enough(SMALL) => SMALL,
            _ => NARROW[1],
        }
    }
}

/// Which kernels make a product.
#[derive(Clone, Copy, Debug)]
enum Way {
    Portable(Tile),
    Hopper(hopper::Tile),
}

impl Way {
    fn of(gpu: &Gpu, rows: usize, depth: usize, columns: usize) -> Self {
        match hopper::Tile::of(gpu, depth, columns) {
            Some(tile) => Self::Hopper(tile),
            None => Self::Portable(Tile::of(short(rows), short(columns))),
        }
    }
}

/// What a product is added to.
#[derive(Clone, Copy)]
enum Before<'a> {
    Nothing,
    /// What it overwrites.
    Itself,
    Other(&'a DeviceSlice<bf16>),
}

impl Before<'_> {
    fn of(op: &str, beta: f32) -> Self {
        if adds(op, beta) { Self::Itself } else { Self::Nothing }
    }
}

const fn few_kernel(most_rows: i64) -> Kernel {
    Kernel::new(&FEW, "few", 128).define("MOST_ROWS", most_rows)
}

/// Every kernel of this file, with all constants that it is compiled with.
pub const KERNELS: [Kernel; 12] = [
    LARGE.kernel("nt"),
    LARGE.kernel("nn"),
    SMALL.kernel("nt"),
    SMALL.kernel("nn"),
    NARROW[0].kernel("nt"),
    NARROW[0].kernel("nn"),
    NARROW[1].kernel("nt"),
    NARROW[1].kernel("nn"),
    few_kernel(1),
    few_kernel(2),
    few_kernel(4),
    few_kernel(8),
];

/// `y = beta y + x wᵀ + bias + adapter`; shapes as above, `beta` 0 or 1.
///
/// # Errors
/// Of the launch.
///
/// # Panics
/// Shapes that do not fit.
pub fn nt(
    gpu: &Gpu,
    x: &DeviceSlice<bf16>,
    w: &DeviceSlice<bf16>,
    y: &mut DeviceSlice<bf16>,
    m: usize,
    k: usize,
    n: usize,
    beta: f32,
    bias: Option<&DeviceSlice<bf16>>,
    adapter: Option<Adapter>,
) -> Result<()> {
    let (way, before) = (Way::of(gpu, m, k, n), Before::of("nt", beta));
    nt_by(gpu, way, x, w, before, y, m, k, n, bias, adapter, Begun::default())
}

fn nt_by(
    gpu: &Gpu,
    way: Way,
    x: &DeviceSlice<bf16>,
    w: &DeviceSlice<bf16>,
    before: Before,
    y: &mut DeviceSlice<bf16>,
    m: usize,
    k: usize,
    n: usize,
    bias: Option<&DeviceSlice<bf16>>,
    adapter: Option<Adapter>,
    begun: Begun,
) -> Result<()> {
    Adapter::assert_fits("nt", adapter, m, n);
    let (before, add) = match before {
        Before::Nothing => (None, 0),
        Before::Itself => (None, 1),
        Before::Other(before) => (Some(before), 0),
    };
    assert_nt("nt", x, w, (bias, before), y, m, k, n);
    if m * n == 0 {
        return Ok(());
    }
    let tile = match way {
        Way::Portable(tile) => {
            begun.assert_nothing("nt");
            tile
        }
        Way::Hopper(tile) => {
            let columns = Columns::rest(tile, tile.n as usize, n, begun);
            let (before, adapter) = ((before, add == 1), adapter.map(Into::into));
            return hopper::nt(gpu, columns, x, w, before, y, m, k, n, bias, adapter);
        }
    };
    let (u, b, rank) = Adapter::parts(adapter);
    let (rows, columns) = (m as i32, n as i32);
    gpu.launch(
        &tile.kernel("nt"),
        [tile.count(short(m), short(n)), 1, 1],
        tile.shared_bytes(),
        args![x, w, k as i32, u, b, rank, bias, before, y, rows, columns, add],
    )
}

/// `dx = beta dx + dy w + adapter`; shapes as above, `beta` 0 or 1.
///
/// # Errors
/// Of the launch.
///
/// # Panics
/// Shapes that do not fit.
pub fn nn(
    gpu: &Gpu,
    dy: &DeviceSlice<bf16>,
    w: &DeviceSlice<bf16>,
    dx: &mut DeviceSlice<bf16>,
    m: usize,
    n: usize,
    k: usize,
    beta: f32,
    adapter: Option<Adapter>,
) -> Result<()> {
    nn_by(gpu, Way::of(gpu, m, n, k), dy, w, dx, m, n, k, beta, adapter)
}

fn nn_by(
    gpu: &Gpu,
    way: Way,
    dy: &DeviceSlice<bf16>,
    w: &DeviceSlice<bf16>,
    dx: &mut DeviceSlice<bf16>,
    m: usize,
    n: usize,
    k: usize,
    beta: f32,
    adapter: Option<Adapter>,
) -> Result<()> {
    assert_shapes("nn", [("dy", dy.len(), m, n), ("w", w.len(), n, k), ("dx", dx.len(), m, k)]);
    assert_multiples_of_8("nn", [("n", n), ("k", k)]);
    Adapter::assert_fits("nn", adapter, m, k);
    if m * k == 0 {
        return Ok(());
    }
    let add = adds("nn", beta);
    let tile = match way {
        Way::Portable(tile) => tile,
        Way::Hopper(tile) => {
            let layers = &[Layer { dy, w, n, adapter }];
            let product = hopper::Product::whole(tile, layers, dx, (m, k), add);
            let from = hopper::Tasks::From(0);
            return hopper::launch(gpu, tile, hopper::clusters(gpu), Some(product), &mut [], from)
                .map(|_| ());
        }
    };
    let (du, a, rank) = Adapter::parts(adapter);
    let (rows, columns, add) = (m as i32, k as i32, i32::from(add));
    gpu.launch(
        &tile.kernel("nn"),
        [tile.count(short(m), short(k)), 1, 1],
        tile.shared_bytes(),
        args![dy, w, n as i32, du, a, rank, dx, rows, columns, add],
    )
}

/// [`nt`] for at most [`FEW_ROWS`] rows, as when text is generated: w is read once, at the memory's speed.
/// With more rows it is [`nt`]. A row's last bits differ from those of [`nt`].
///
/// # Errors
/// Of the launch.
///
/// # Panics
/// Shapes that do not fit.
pub fn few(
    gpu: &Gpu,
    x: &DeviceSlice<bf16>,
    w: &DeviceSlice<bf16>,
    y: &mut DeviceSlice<bf16>,
    m: usize,
    k: usize,
    n: usize,
    beta: f32,
    bias: Option<&DeviceSlice<bf16>>,
    adapter: Option<Adapter>,
) -> Result<()> {
    if m > FEW_ROWS {
        return nt(gpu, x, w, y, m, k, n, beta, bias, adapter);
    }
    assert_shapes("few", [("x", x.len(), m, k), ("w", w.len(), n, k), ("y", y.len(), m, n)]);
    assert_multiples_of_8("few", [("k", k)]);
    assert_bias("few", bias, n);
    Adapter::assert_fits("few", adapter, m, n);
    if m * n == 0 {
        return Ok(());
    }
    let (u, b, rank) = Adapter::parts(adapter);
    let (rows, columns, add) = (m as i32, n as i32, i32::from(adds("few", beta)));
    let most_rows = m.next_power_of_two() as u32;
    // As few.cu: four warps, each with so many columns.
    let columns_of_block = 4 * (most_rows / 2).max(1);
    gpu.launch(
        &few_kernel(i64::from(most_rows)),
        [short(n).div_ceil(columns_of_block), 1, 1],
        0,
        args![x, w, k as i32, u, b, rank, bias, y, rows, columns, add],
    )
}

/// A side of a matrix, which kernels count in 31 bits.
fn short(side: usize) -> u32 {
    assert!(side <= i32::MAX as usize, "matmul: a side of {side} is more than kernels count");
    side as u32
}

fn adds(op: &str, beta: f32) -> bool {
    assert!(
        beta == 0.0 || beta == 1.0,
        "matmul::{op} on a device: beta is {beta}, it must be 0 or 1"
    );
    beta == 1.0
}

/// Operands by name, with their lengths and the shapes that these must fit.
fn assert_shapes<const N: usize>(op: &str, operands: [(&str, usize, usize, usize); N]) {
    for (name, len, rows, cols) in operands {
        assert_eq!(len, rows * cols, "matmul::{op} on a device: {name} must be [{rows}, {cols}]");
        short(rows);
        short(cols);
    }
}

fn assert_multiples_of_8<const N: usize>(op: &str, sides: [(&str, usize); N]) {
    for (name, side) in sides {
        assert!(
            side.is_multiple_of(8),
            "matmul::{op} on a device: {name} is {side}, it must be a multiple of 8"
        );
    }
}

/// Operands of [`nt`] and of its beginning: a bias, and another matrix that is added to, where there are any.
fn assert_nt(
    op: &str,
    x: &DeviceSlice<bf16>,
    w: &DeviceSlice<bf16>,
    (bias, before): (Option<&DeviceSlice<bf16>>, Option<&DeviceSlice<bf16>>),
    y: &DeviceSlice<bf16>,
    m: usize,
    k: usize,
    n: usize,
) {
    assert_shapes(op, [("x", x.len(), m, k), ("w", w.len(), n, k), ("y", y.len(), m, n)]);
    assert_multiples_of_8(op, [("k", k), ("n", n)]);
    assert_bias(op, bias, n);
    if let Some(before) = before {
        assert_shapes(op, [("before", before.len(), m, n)]);
    }
}

fn assert_bias(op: &str, bias: Option<&DeviceSlice<bf16>>, n: usize) {
    if let Some(bias) = bias {
        assert_eq!(bias.len(), n, "matmul::{op} on a device: bias must be [{n}]");
    }
}

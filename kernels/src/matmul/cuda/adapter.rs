//! What an adapter adds to a linear layer on a device, beside its part in the main products: its matrices
//! as the tensor cores want them, its gradients and du.
//!
//! ```text
//! forward    u = x aᵀ                                     y += u (scale b)ᵀ   inside the main nt
//! backward   du = dy (scale b)   db += scale dyᵀ u        da += duᵀ x         dx += du a   inside the main nn
//! ```
//!
//! All of them are bound by reading x or dy: u, and da, of layers that have one x are made in one visit to that ([`project`],
//! [`Gradient`]), du and db in one visit to dy. On compute capability 9.0 u and du are made where a product of the same rows begins
//! ([`super::Begun`]), or apart ([`pull`]), and the gradients with a product that comes later.
//!
//! m rows, k and n widths, multiples of 8; r rank. a `[r, k]` and b `[n, r]` in f32 are what is trained. The
//! products take a `[R, k]` and scale b `[n, R]` in bf16 with R = [`padded`]`(r)` and zeros beyond r. u and
//! du are `[m, R]`, with zeros beyond r because a's and b's are.

use super::hopper::Factors;
use super::{assert_shapes, short};
use crate::args;
use crate::cuda::{DeviceSlice, Gpu, Kernel, Result, Source, TILE};
use half::bf16;

mod gradient;
mod project;
#[cfg(test)]
pub(super) mod tests;

use gradient::COLLECTING;
pub use gradient::{
    Gradient, GradientOfA, GradientOfB, Input, Norm, Pulled, add_to_gradient_of_b,
    add_to_gradients, add_to_gradients_of_a, gradients_wait, pull, workspace_of_a, workspace_of_b,
};
use project::projecting;
pub use project::{Projected, project};

static PARTIALS: Source =
    Source { name: "partials.cu", text: include_str!("../partials.cu"), headers: &[TILE] };

pub(super) const THREE: (&str, &str) = ("three.cuh", include_str!("../three.cuh"));

/// Most layers that have one input: queries, keys and values.
pub const SHARING: usize = 3;

/// Ranks are filled up to a multiple of this, the depth of one step of the tensor cores.
pub(super) const PADDING: usize = 16;
/// The highest rank.
pub const MOST_RANK: usize = 256;
/// Threads of every kernel here.
const THREADS: u32 = 256;

/// The rank with which an adapter's matrices are multiplied.
pub const fn padded(rank: usize) -> usize {
    rank.next_multiple_of(PADDING)
}

/// An adapter's part in a product: `left right`, a sum over the padded rank.
#[derive(Clone, Copy)]
pub struct Adapter<'a> {
    /// `[m, R]`: u on the way forward, du on the way back.
    pub left: &'a DeviceSlice<bf16>,
    /// scale b `[n, R]` on the way forward, a `[R, k]` on the way back, as [`pack_b`] and [`pack_a`] leave them.
    pub right: &'a DeviceSlice<bf16>,
    /// r or R.
    pub rank: usize,
}

impl<'a> Adapter<'a> {
    pub(super) fn assert_fits(op: &str, adapter: Option<Self>, m: usize, columns: usize) {
        Factors::assert_fits(op, adapter.map(Into::into), m, columns);
    }

    /// The matrices and the padded rank, as kernels take them.
    pub(crate) fn parts(
        adapter: Option<Self>,
    ) -> (Option<&'a DeviceSlice<bf16>>, Option<&'a DeviceSlice<bf16>>, i32) {
        match adapter {
            Some(Self { left, right, rank }) => (Some(left), Some(right), padded(rank) as i32),
            None => (None, None, 0),
        }
    }
}

/// Every kernel of an adapter, with all constants that it is compiled with.
pub const KERNELS: [Kernel; 13] = [
    COLLECTING[0].kernel(false),
    COLLECTING[1].kernel(false),
    COLLECTING[2].kernel(false),
    COLLECTING[0].kernel(true),
    COLLECTING[1].kernel(true),
    ADD_PARTIALS,
    ROUND_PARTIALS,
    PACK,
    JOIN,
    projecting(1),
    projecting(2),
    projecting(3),
    projecting(4),
];
const ADD_PARTIALS: Kernel = Kernel::new(&PARTIALS, "add_partials", THREADS);
const ROUND_PARTIALS: Kernel = Kernel::new(&PARTIALS, "round_partials", THREADS);
const PACK: Kernel = Kernel::new(&PARTIALS, "pack", THREADS);
const JOIN: Kernel = Kernel::new(&PARTIALS, "join", THREADS);

/// Where the second and the third of up to [`SHARING`] matrices begin beside each other, and where all end, in padded ranks.
fn beside(ranks: impl Iterator<Item = usize>) -> [usize; SHARING] {
    let (mut ends, mut end) = ([0; SHARING], 0);
    let mut ranks = ranks.map(padded);
    for to in &mut ends {
        end += ranks.next().unwrap_or(0);
        *to = end;
    }
    assert!(ranks.next().is_none(), "at most {SHARING} adapters have one input");
    ends
}

/// a `[r, k]` for the products: `[R, k]` in bf16. Overwrites `packed`.
///
/// # Errors
/// Of the launch.
///
/// # Panics
/// Shapes that do not fit.
pub fn pack_a(
    gpu: &Gpu,
    a: &DeviceSlice<f32>,
    packed: &mut DeviceSlice<bf16>,
    rank: usize,
    k: usize,
) -> Result<()> {
    pack(gpu, "pack_a", a, 1.0, packed, (rank, k), (padded(rank), k))
}

/// b `[n, r]` for the products: scale b, `[n, R]` in bf16. Overwrites `packed`.
///
/// # Errors
/// Of the launch.
///
/// # Panics
/// Shapes that do not fit.
pub fn pack_b(
    gpu: &Gpu,
    b: &DeviceSlice<f32>,
    packed: &mut DeviceSlice<bf16>,
    n: usize,
    rank: usize,
    scale: f32,
) -> Result<()> {
    pack(gpu, "pack_b", b, scale, packed, (n, rank), (n, padded(rank)))
}

fn pack(
    gpu: &Gpu,
    op: &str,
    from: &DeviceSlice<f32>,
    scale: f32,
    to: &mut DeviceSlice<bf16>,
    (rows, columns): (usize, usize),
    (to_rows, to_columns): (usize, usize),
) -> Result<()> {
    assert_shapes(
        op,
        [
            ("the matrix", from.len(), rows, columns),
            ("the packed one", to.len(), to_rows, to_columns),
        ],
    );
    let grid = one_thread_each(to.len());
    let (rows, columns) = (rows as i32, columns as i32);
    let (to_rows, to_columns) = (to_rows as i32, to_columns as i32);
    gpu.launch(&PACK, grid, 0, args![from, rows, columns, scale, to, to_rows, to_columns])
}

/// `to = Σ partial`: `parts` of `to`'s length. Overwrites `to`.
pub(super) fn round_partials(
    gpu: &Gpu,
    partial: &DeviceSlice<f32>,
    parts: usize,
    to: &mut DeviceSlice<bf16>,
) -> Result<()> {
    let (grid, length) = (one_thread_each(to.len()), to.len());
    gpu.launch(&ROUND_PARTIALS, grid, 0, args![partial, parts as i32, length, to])
}

/// `to`: `[m, …]` has one to three matrices `[m, R]`, given with their ranks, beside each other, each row times its factor.
pub(super) fn join(
    gpu: &Gpu,
    each: &[(&DeviceSlice<bf16>, usize)],
    factors: Option<&DeviceSlice<f32>>,
    to: &mut DeviceSlice<bf16>,
    m: usize,
) -> Result<()> {
    let op = "join";
    for (u, rank) in each {
        assert_shapes(op, [("one", u.len(), m, padded(*rank))]);
    }
    let ends = beside(each.iter().map(|(_, rank)| *rank));
    let [second_at, third_at, width] = ends.map(|end| end as i32);
    assert_shapes(op, [("all", to.len(), m, width as usize)]);
    if let Some(factors) = factors {
        assert_shapes(op, [("the factors", factors.len(), m, 1)]);
    }
    if m == 0 {
        return Ok(());
    }
    let [first, second, third] = std::array::from_fn(|i| each.get(i).map(|(u, _)| *u));
    let grid = one_thread_each(to.len() / 8);
    let args = args![first, second, third, second_at, third_at, width, factors, m as i32, to];
    gpu.launch(&JOIN, grid, 0, args)
}

fn one_thread_each(len: usize) -> [u32; 3] {
    [short(len.div_ceil(THREADS as usize)), 1, 1]
}

pub(super) fn assert_rank(op: &str, rank: usize) {
    assert!(
        (1..=MOST_RANK).contains(&rank),
        "matmul::{op} on a device: the rank is {rank}, it must be 1 to {MOST_RANK}"
    );
}

//! u, an adapter's short side.

use super::super::{assert_multiples_of_8, assert_shapes, short};
use super::{PADDING, SHARING, THREE, assert_rank, beside, padded};
use crate::args;
use crate::cuda::{DeviceSlice, Gpu, Kernel, Result, Source, TILE};
use half::bf16;

static PROJECTION: Source =
    Source { name: "project.cu", text: include_str!("../../project.cu"), headers: &[TILE, THREE] };

/// Threads, rows and slices in shared memory, and most groups of 16 of the ranks that a block takes; as project.cu.
const THREADS: u32 = 128;
const ROWS: usize = 64;
const STAGES: usize = 4;
const MOST_GROUPS: usize = 4;

pub(super) const fn projecting(groups: usize) -> Kernel {
    Kernel::new(&PROJECTION, "project", THREADS)
        .define("GROUPS", groups as i64)
        .define("STAGES", STAGES as i64)
}

/// An adapter's part in [`project`], or where a product begins.
pub struct Projected<'a> {
    /// `[R, k]`, as [`super::pack_a`] leaves it.
    pub a: &'a DeviceSlice<bf16>,
    /// `[m, R]`.
    pub u: &'a mut DeviceSlice<bf16>,
    pub rank: usize,
    /// scale b `[n, R]`, if the product that begins is of this adapter's layer.
    pub b: Option<&'a DeviceSlice<bf16>>,
}

/// `u = x aᵀ` for up to three adapters with one `x`: `[m, k]`, which is read once. Overwrites each `u`; a row has the same bits
/// whatever other rows and adapters there are.
///
/// # Errors
/// Of the launch.
///
/// # Panics
/// Shapes that do not fit.
pub fn project(
    gpu: &Gpu,
    x: &DeviceSlice<bf16>,
    adapters: &mut [Projected],
    m: usize,
    k: usize,
) -> Result<()> {
    let op = "project";
    assert_multiples_of_8(op, [("k", k)]);
    assert_shapes(op, [("x", x.len(), m, k)]);
    for Projected { a, u, rank, .. } in &*adapters {
        assert_rank(op, *rank);
        assert_shapes(op, [("a", a.len(), padded(*rank), k), ("u", u.len(), m, padded(*rank))]);
    }
    let ends = beside(adapters.iter().map(|adapter| adapter.rank));
    if m == 0 || adapters.is_empty() {
        return Ok(());
    }
    let [second_at, third_at, groups] = ends.map(|end| (end / PADDING) as i32);
    let taken = (groups as usize).min(MOST_GROUPS);
    let mut each = adapters.iter_mut();
    let [(a0, u0), (a1, u1), (a2, u2)] =
        [(); SHARING].map(|()| each.next().map(|adapter| (adapter.a, &mut *adapter.u)).unzip());
    let grid = [short(m.div_ceil(ROWS)), short((groups as usize).div_ceil(taken)), 1];
    let shared = STAGES * (ROWS + PADDING * taken) * 64 * size_of::<bf16>();
    let args = args![x, m as i32, k as i32, a0, a1, a2, u0, u1, u2, second_at, third_at, groups];
    gpu.launch(&projecting(taken), grid, shared as u32, args)
}

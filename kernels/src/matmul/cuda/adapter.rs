//! What an adapter adds to a linear layer on a device, beside its part in the main products: its matrices
//! as the tensor cores want them, its gradients and du.
//!
//! ```text
//! forward    u = x aᵀ                                     y += u (scale b)ᵀ   inside the main nt
//! backward   du = dy (scale b)   db += scale dyᵀ u        da += duᵀ x         dx += du a   inside the main nn
//! ```
//!
//! All of them are bound by reading x or dy. du and db are made in one visit to dy; u, and da, of layers that have one x in one
//! visit to that ([`project`], [`add_to_gradients_of_a`]).
//!
//! m rows, k and n widths, multiples of 8; r rank. a `[r, k]` and b `[n, r]` in f32 are what is trained. The
//! products take a `[R, k]` and scale b `[n, R]` in bf16 with R = [`padded`]`(r)` and zeros beyond r. u and
//! du are `[m, R]`, with zeros beyond r because a's and b's are.

use super::{MULTIPROCESSORS, assert_multiples_of_8, assert_shapes, nn, short};
use crate::args;
use crate::cuda::{DeviceSlice, Gpu, Kernel, Result, Source, TILE};
use crate::elementwise::cuda::scale_rows;
use half::bf16;

mod project;
#[cfg(test)]
pub(super) mod tests;

use project::projecting;
pub use project::{Projected, project};

static LOWRANK: Source =
    Source { name: "lowrank.cu", text: include_str!("../lowrank.cu"), headers: &[TILE] };
static PARTIALS: Source =
    Source { name: "partials.cu", text: include_str!("../partials.cu"), headers: &[] };

/// Most layers that have one input: queries, keys and values.
pub const SHARING: usize = 3;

/// Ranks are filled up to a multiple of this, the depth of one step of the tensor cores.
const PADDING: usize = 16;
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
        let Some(Self { left, right, rank }) = adapter else { return };
        let rank = padded(rank);
        assert_shapes(
            op,
            [
                ("the adapter's left", left.len(), m, rank),
                ("its right", right.len(), columns, rank),
            ],
        );
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

/// How a gradient is collected: constants of lowrank.cu.
#[derive(Clone, Copy)]
struct Collecting {
    /// Columns of u that a block takes.
    rank: usize,
    /// Tokens in a slice, slices in shared memory.
    tokens: usize,
    stages: usize,
}

/// By what a block takes of the rank. All keep below the 99 KB of shared memory that every GPU from sm_80 on has.
const COLLECTING: [Collecting; 3] = [
    Collecting { rank: 16, tokens: 16, stages: 3 },
    Collecting { rank: 32, tokens: 16, stages: 4 },
    Collecting { rank: 64, tokens: 32, stages: 4 },
];
/// From here on du is a product of its own.
const FUSED_RANK: usize = 32;

impl Collecting {
    fn of(rank: usize) -> Self {
        let fits = COLLECTING.into_iter().find(|way| padded(rank) <= way.rank);
        fits.unwrap_or(COLLECTING[2])
    }

    const fn kernel(self, with_du: bool) -> Kernel {
        Kernel::new(&LOWRANK, "gradient", THREADS)
            .define("RANK", self.rank as i64)
            .define("TOKENS", self.tokens as i64)
            .define("STAGES", self.stages as i64)
            .define("WITH_DU", with_du as i64)
    }

    /// Columns of a slab.
    const fn columns(self) -> usize {
        16384 / self.rank
    }

    const fn shared_bytes(self) -> u32 {
        (self.stages * self.tokens * (self.columns() + self.rank) * size_of::<bf16>()) as u32
    }
}

/// Every kernel of this file, with all constants that it is compiled with.
pub const KERNELS: [Kernel; 12] = [
    COLLECTING[0].kernel(false),
    COLLECTING[1].kernel(false),
    COLLECTING[2].kernel(false),
    COLLECTING[0].kernel(true),
    COLLECTING[1].kernel(true),
    ADD_PARTIALS,
    ROUND_PARTIALS,
    PACK,
    projecting(1),
    projecting(2),
    projecting(3),
    projecting(4),
];
const ADD_PARTIALS: Kernel = Kernel::new(&PARTIALS, "add_partials", THREADS);
const ROUND_PARTIALS: Kernel = Kernel::new(&PARTIALS, "round_partials", THREADS);
const PACK: Kernel = Kernel::new(&PARTIALS, "pack", THREADS);

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

/// How one gradient, `[columns, rank]` or its transpose, is divided among blocks.
struct Division {
    way: Collecting,
    slabs: usize,
    /// Tokens of a span.
    span: usize,
    spans: usize,
    /// Parts of the rank.
    parts: usize,
}

impl Division {
    /// As many spans as occupy a GPU, none so short that partial gradients cost much.
    fn of(m: usize, columns: usize, rank: usize) -> Self {
        let way = Collecting::of(rank);
        let (slabs, parts) = (columns.div_ceil(way.columns()), padded(rank).div_ceil(way.rank));
        let most = m.div_ceil(SHORTEST_SPAN).max(1);
        let spans = (MULTIPROCESSORS as usize / (slabs * parts).max(1)).clamp(1, most);
        let span = m.div_ceil(spans).next_multiple_of(way.tokens);
        Self { way, slabs, span, spans: m.div_ceil(span.max(1)), parts }
    }

    /// A partial gradient `vᵀ u` for each span, and with b a partial `v b` for each slab; `v`: `[m, columns]`; `u`: up to three
    /// beside each other, `ends` as [`beside`] has them, of which `rank` columns count.
    /// `strides`: of a column and of the rank in the gradient.
    fn collect(
        &self,
        gpu: &Gpu,
        v: &DeviceSlice<bf16>,
        u: [Option<&DeviceSlice<bf16>>; SHARING],
        ends: [usize; SHARING],
        partial: &mut DeviceSlice<f32>,
        (m, columns, rank): (usize, usize, usize),
        strides: (usize, usize),
        with_du: Option<(&DeviceSlice<bf16>, &mut DeviceSlice<f32>)>,
    ) -> Result<()> {
        let kernel = self.way.kernel(with_du.is_some());
        let (b, du_partial) = with_du.unzip();
        let [second_at, third_at, ranks] = ends.map(|end| end as i32);
        let (tokens, wide) = (m as i32, columns as i32);
        let (span, rank) = (self.span as i32, rank as i32);
        let (column_stride, rank_stride) = (strides.0 as i32, strides.1 as i32);
        let grid = [self.slabs as u32, self.spans as u32, self.parts as u32];
        let args = args![
            v,
            u[0],
            u[1],
            u[2],
            second_at,
            third_at,
            ranks,
            b,
            tokens,
            wide,
            span,
            partial,
            rank,
            column_stride,
            rank_stride,
            du_partial
        ];
        gpu.launch(&kernel, grid, self.way.shared_bytes(), args)
    }
}

/// Tokens that a block visits at least.
const SHORTEST_SPAN: usize = 128;

/// Numbers of workspace that [`add_to_gradients_of_a`] needs for m rows.
pub fn workspace_of_a(m: usize, k: usize, ranks: &[usize]) -> usize {
    let all = ranks.iter().copied().map(padded).sum();
    // du times what the norm multiplied a row by takes half a number each.
    Division::of(m, k, all).spans * k * all + m * all / 2
}

/// Numbers of workspace that [`add_to_gradient_of_b`] needs for m rows.
pub fn workspace_of_b(m: usize, n: usize, rank: usize) -> usize {
    let division = Division::of(m, n, rank);
    let of_du = if padded(rank) <= FUSED_RANK { division.slabs * m * padded(rank) } else { 0 };
    division.spans * n * rank + of_du
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

/// What layers read, `[m, k]`: x, or `w (s x)`, which RMSNorm made of it.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    pub x: &'a DeviceSlice<bf16>,
    pub norm: Option<Norm<'a>>,
}

/// See [`crate::rmsnorm::cuda`].
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    /// w: `[k]`.
    pub weight: &'a DeviceSlice<bf16>,
    /// s: `[m]`.
    pub inv_rms: &'a DeviceSlice<f32>,
}

/// An adapter's part in [`add_to_gradients_of_a`].
pub struct GradientOfA<'a> {
    /// `[m, R]`.
    pub du: &'a DeviceSlice<bf16>,
    /// `[r, k]`.
    pub da: &'a mut DeviceSlice<f32>,
    pub rank: usize,
}

/// `da += duᵀ input` for up to three adapters with one input, which is read once. Accumulates into each `da`. What a norm made is
/// not needed: `duᵀ (w (s x)) = w ((s du)ᵀ x)`. `workspace`: at least [`workspace_of_a`] numbers.
///
/// # Errors
/// Of the launches.
///
/// # Panics
/// Shapes that do not fit.
pub fn add_to_gradients_of_a(
    gpu: &Gpu,
    input: Input,
    adapters: &mut [GradientOfA],
    m: usize,
    k: usize,
    workspace: &mut DeviceSlice<f32>,
) -> Result<()> {
    let op = "add_to_gradients_of_a";
    assert_multiples_of_8(op, [("k", k)]);
    assert_shapes(op, [("x", input.x.len(), m, k)]);
    for GradientOfA { du, da, rank } in &*adapters {
        assert_rank(op, *rank);
        assert_shapes(op, [("du", du.len(), m, padded(*rank)), ("da", da.len(), *rank, k)]);
    }
    let ends = beside(adapters.iter().map(|adapter| adapter.rank));
    if m * k == 0 || adapters.is_empty() {
        return Ok(());
    }
    let ranks = ends[SHARING - 1];
    let division = Division::of(m, k, ranks);
    let (partial, rest) = workspace.split_at_mut(division.spans * k * ranks);
    let mut scaled = rest[..m * ranks / 2].halves_mut();
    let mut du = [None; SHARING];
    for (to, adapter) in du.iter_mut().zip(&*adapters) {
        let Some(Norm { inv_rms, .. }) = input.norm else {
            *to = Some(adapter.du);
            continue;
        };
        let rest = scaled;
        let (own, after) = rest.split_at_mut(adapter.du.len());
        scale_rows(gpu, adapter.du, inv_rms, own)?;
        (*to, scaled) = (Some(&*own), after);
    }
    // Element (column, r) at r k + column.
    division.collect(gpu, input.x, du, ends, partial, (m, k, ranks), (1, k), None)?;
    let weight = input.norm.map(|norm| norm.weight);
    let mut each = adapters.iter_mut().map(|adapter| &mut *adapter.da);
    let gradients = [(); SHARING].map(|()| each.next());
    let begins = [0, ends[0] * k, ends[1] * k];
    add_partials(gpu, partial, (division.spans, ranks * k), 1.0, weight, gradients, begins)
}

/// `db += scale dyᵀ u` and `du = dy (scale b)`; `dy`: `[m, n]`, `u`, `du`: `[m, R]`, `b`: scale b as
/// [`pack_b`] leaves it, `db`: `[n, r]`. Accumulates into `db`, overwrites `du`. `workspace`: at least
/// [`workspace_of_b`] numbers. Up to a padded rank of 32 dy is read once.
///
/// # Errors
/// Of the launches.
///
/// # Panics
/// Shapes that do not fit.
pub fn add_to_gradient_of_b(
    gpu: &Gpu,
    dy: &DeviceSlice<bf16>,
    u: &DeviceSlice<bf16>,
    b: &DeviceSlice<bf16>,
    db: &mut DeviceSlice<f32>,
    du: &mut DeviceSlice<bf16>,
    m: usize,
    n: usize,
    rank: usize,
    scale: f32,
    workspace: &mut DeviceSlice<f32>,
) -> Result<()> {
    let op = "add_to_gradient_of_b";
    assert_rank(op, rank);
    assert_multiples_of_8(op, [("n", n)]);
    let pitch = padded(rank);
    assert_shapes(op, [("dy", dy.len(), m, n), ("u", u.len(), m, pitch), ("b", b.len(), n, pitch)]);
    assert_shapes(op, [("db", db.len(), n, rank), ("du", du.len(), m, pitch)]);
    if m * n == 0 {
        return Ok(());
    }
    let division = Division::of(m, n, rank);
    let (partial, rest) = workspace.split_at_mut(division.spans * n * rank);
    let (strides, u, ends) = ((rank, 1), [Some(u), None, None], [pitch; SHARING]);
    let (parts, db) = ((division.spans, n * rank), [Some(db), None, None]);
    if pitch > FUSED_RANK {
        division.collect(gpu, dy, u, ends, partial, (m, n, rank), strides, None)?;
        add_partials(gpu, partial, parts, scale, None, db, [0; SHARING])?;
        return nn(gpu, dy, b, du, m, n, pitch, 0.0, None);
    }
    let du_partial = &mut rest[..division.slabs * m * pitch];
    let with_du = Some((b, &mut *du_partial));
    division.collect(gpu, dy, u, ends, partial, (m, n, rank), strides, with_du)?;
    add_partials(gpu, partial, parts, scale, None, db, [0; SHARING])?;
    round_partials(gpu, du_partial, division.slabs, du)
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

/// `gradients += scale columns Σ partial`: `parts` of so many numbers, in which each gradient begins at its place; `columns`: what
/// every row of a gradient is multiplied by, if anything.
fn add_partials(
    gpu: &Gpu,
    partial: &DeviceSlice<f32>,
    (parts, stride): (usize, usize),
    scale: f32,
    columns: Option<&DeviceSlice<bf16>>,
    gradients: [Option<&mut DeviceSlice<f32>>; SHARING],
    begins: [usize; SHARING],
) -> Result<()> {
    let lengths = gradients.each_ref().map(|it| it.as_ref().map_or(0, |gradient| gradient.len()));
    let [across, ..] = one_thread_each(lengths.into_iter().max().unwrap_or(0));
    let down = gradients.iter().flatten().count() as u32;
    let width = columns.map_or(1, DeviceSlice::len) as i32;
    let [first, second, third] = gradients;
    let [length0, length1, length2] = lengths;
    let [_, begin1, begin2] = begins;
    let args = args![
        partial,
        parts as i32,
        stride,
        scale,
        columns,
        width,
        first,
        length0,
        second,
        begin1,
        length1,
        third,
        begin2,
        length2
    ];
    gpu.launch(&ADD_PARTIALS, [across, down, 1], 0, args)
}

fn one_thread_each(len: usize) -> [u32; 3] {
    [short(len.div_ceil(THREADS as usize)), 1, 1]
}

fn assert_rank(op: &str, rank: usize) {
    assert!(
        (1..=MOST_RANK).contains(&rank),
        "matmul::{op} on a device: the rank is {rank}, it must be 1 to {MOST_RANK}"
    );
}

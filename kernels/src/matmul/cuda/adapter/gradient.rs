//! An adapter's gradients, and du.

use super::super::{MULTIPROCESSORS, assert_multiples_of_8, assert_shapes, hopper, nn};
use super::{
    ADD_PARTIALS, SHARING, THREADS, assert_rank, beside, one_thread_each, padded, round_partials,
};
use crate::args;
use crate::cuda::{Arena, DeviceSlice, Gpu, Kernel, Result, Source, TILE};
use crate::elementwise::cuda::scale_rows;
use half::bf16;

static LOWRANK: Source =
    Source { name: "lowrank.cu", text: include_str!("../../lowrank.cu"), headers: &[TILE] };

/// How a gradient is collected: constants of lowrank.cu.
#[derive(Clone, Copy)]
pub(super) struct Collecting {
    /// Columns of u that a block takes.
    rank: usize,
    /// Tokens in a slice, slices in shared memory.
    tokens: usize,
    stages: usize,
}

/// By what a block takes of the rank. All keep below the 99 KB of shared memory that every GPU from sm_80 on has.
pub(super) const COLLECTING: [Collecting; 3] = [
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

    pub(super) const fn kernel(self, with_du: bool) -> Kernel {
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

    pub const fn shared_bytes(self) -> u32 {
        (self.stages * self.tokens * (self.columns() + self.rank) * size_of::<bf16>()) as u32
    }
}

/// How one gradient, `[columns, rank]` or its transpose, is divided among blocks.
pub(super) struct Division {
    way: Collecting,
    pub slabs: usize,
    /// Tokens of a span.
    pub span: usize,
    pub spans: usize,
    /// Parts of the rank.
    parts: usize,
}

impl Division {
    /// As many spans as occupy a GPU, none so short that partial gradients cost much.
    pub fn of(m: usize, columns: usize, rank: usize) -> Self {
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

/// An adapter's part in [`add_to_gradient_of_b`].
pub struct GradientOfB<'a> {
    /// `[m, n]`.
    pub dy: &'a DeviceSlice<bf16>,
    /// `[m, R]`.
    pub u: &'a DeviceSlice<bf16>,
    /// `[n, r]`.
    pub db: &'a mut DeviceSlice<f32>,
    pub rank: usize,
    pub scale: f32,
}

impl GradientOfB<'_> {
    /// The same for a while.
    pub(in super::super) fn reborrowed(&mut self) -> GradientOfB<'_> {
        let Self { dy, u, db, rank, scale } = self;
        GradientOfB { dy, u, db, rank: *rank, scale: *scale }
    }
}

/// `db += scale dyᵀ u`, and `with_du`, scale b `[n, R]` as [`super::pack_b`] leaves it and du `[m, R]`, also `du = dy (scale b)`.
/// Accumulates into `db`, overwrites `du`. `workspace`: at least [`workspace_of_b`] numbers. Up to a padded rank of 32 dy is read
/// once.
///
/// # Errors
/// Of the launches.
///
/// # Panics
/// Shapes that do not fit.
pub fn add_to_gradient_of_b(
    gpu: &Gpu,
    GradientOfB { dy, u, db, rank, scale }: GradientOfB,
    with_du: Option<(&DeviceSlice<bf16>, &mut DeviceSlice<bf16>)>,
    m: usize,
    n: usize,
    workspace: &mut DeviceSlice<f32>,
) -> Result<()> {
    let op = "add_to_gradient_of_b";
    assert_rank(op, rank);
    assert_multiples_of_8(op, [("n", n)]);
    let pitch = padded(rank);
    assert_shapes(
        op,
        [("dy", dy.len(), m, n), ("u", u.len(), m, pitch), ("db", db.len(), n, rank)],
    );
    if let Some((b, du)) = &with_du {
        assert_shapes(op, [("b", b.len(), n, pitch), ("du", du.len(), m, pitch)]);
    }
    if m * n == 0 {
        return Ok(());
    }
    let division = Division::of(m, n, rank);
    let (partial, rest) = workspace.split_at_mut(division.spans * n * rank);
    let (strides, u, ends) = ((rank, 1), [Some(u), None, None], [pitch; SHARING]);
    let (parts, db) = ((division.spans, n * rank), [Some(db), None, None]);
    let (inside, apart) = if pitch > FUSED_RANK { (None, with_du) } else { (with_du, None) };
    let du_partial = &mut rest[..inside.as_ref().map_or(0, |_| division.slabs * m * pitch)];
    let collected = inside.as_ref().map(|(b, _)| (*b, &mut *du_partial));
    division.collect(gpu, dy, u, ends, partial, (m, n, rank), strides, collected)?;
    add_partials(gpu, partial, parts, scale, None, db, [0; SHARING])?;
    if let Some((_, du)) = inside {
        round_partials(gpu, du_partial, division.slabs, du)?;
    }
    match apart {
        Some((b, du)) => nn(gpu, dy, b, du, m, n, pitch, 0.0, None),
        None => Ok(()),
    }
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

/// Gradients that may wait until a product is made ([`super::super::nn_together`]), or be made alone.
pub enum Gradient<'a> {
    /// As [`add_to_gradients_of_a`]: of up to three adapters with one input, `[m, k]`.
    A { input: Input<'a>, k: usize, adapters: Vec<GradientOfA<'a>> },
    /// As [`add_to_gradient_of_b`] without du: of one adapter.
    B(GradientOfB<'a>),
}

/// Whether gradients wait for a product, and du is made apart from them: on compute capability 9.0.
pub fn gradients_wait(gpu: &Gpu) -> bool {
    gpu.properties().compute_capability == (9, 0)
}

/// An adapter's part where du is made with what dy is read for, or with dy itself.
pub struct Pulled<'a> {
    /// scale b `[n, R]`, as [`super::pack_b`] leaves it.
    pub b: &'a DeviceSlice<bf16>,
    /// `[m, R]`.
    pub du: &'a mut DeviceSlice<bf16>,
    pub rank: usize,
    /// `[R, k]`, if the product that begins is of this adapter's layer.
    pub a: Option<&'a DeviceSlice<bf16>>,
}

/// `du = dy (scale b)`: `[m, R]`, which the way back goes on with; `b`: `[n, R]`. dB is made with it in one visit to dy, or on
/// compute capability 9.0 returned, to be made later. Accumulates into dB, overwrites `du`.
///
/// # Errors
/// A launch fails, or the arena is too small.
///
/// # Panics
/// Shapes that do not fit.
pub fn pull<'a>(
    gpu: &Gpu,
    arena: &Arena,
    of_b: GradientOfB<'a>,
    b: &DeviceSlice<bf16>,
    du: &mut DeviceSlice<bf16>,
    m: usize,
    n: usize,
) -> Result<Option<GradientOfB<'a>>> {
    let rank = of_b.rank;
    if gradients_wait(gpu) {
        nn(gpu, of_b.dy, b, du, m, n, padded(rank), 0.0, None)?;
        return Ok(Some(of_b));
    }
    let mut workspace = arena.take(workspace_of_b(m, n, rank))?;
    add_to_gradient_of_b(gpu, of_b, Some((b, du)), m, n, &mut workspace)?;
    Ok(None)
}

/// Makes gradients that wait for no product, of `m` rows each.
///
/// # Errors
/// A launch fails, or the arena is too small.
///
/// # Panics
/// Shapes that do not fit.
pub fn add_to_gradients(
    gpu: &Gpu,
    arena: &Arena,
    gradients: Vec<Gradient>,
    m: usize,
) -> Result<()> {
    if gradients_wait(gpu) {
        return hopper::nn_with_gradients(gpu, arena, hopper::WIDE, None, gradients, m, 0);
    }
    for gradient in gradients {
        match gradient {
            Gradient::A { input, k, mut adapters } => {
                let ranks: Vec<usize> = adapters.iter().map(|adapter| adapter.rank).collect();
                let mut workspace = arena.take(workspace_of_a(m, k, &ranks))?;
                add_to_gradients_of_a(gpu, input, &mut adapters, m, k, &mut workspace)?;
            }
            Gradient::B(of_b) => {
                let n = of_b.db.len() / of_b.rank;
                let mut workspace =
                    arena.take(Division::of(m, n, of_b.rank).spans * n * of_b.rank)?;
                add_to_gradient_of_b(gpu, of_b, None, m, n, &mut workspace)?;
            }
        }
    }
    Ok(())
}

//! The way back of linear layers: dx, and gradients of adapters by clusters that have a tile less than others
//! (hopper_gradients.cuh).

#[cfg(test)]
mod tests;

use super::super::adapter::{
    Gradient as Waiting, GradientOfA, GradientOfB, SHARING, assert_rank, join, padded,
};
use super::super::{assert_multiples_of_8, assert_shapes, short};
use super::{CLUSTER, PIECE, Product, Tile, clusters, maps, with_shorts};
use crate::cuda::{Arena, Args, DeviceBuffer, DeviceSlice, Gpu, Kernel, Result, TensorMap};
use half::bf16;

/// Columns of a gradient and ranks that a task takes, and bytes of a gradient in shared memory; as hopper_gradients.cuh.
const TASK_COLUMNS: usize = 256;
const TASK_RANKS: usize = 64;
const GRADIENT_BYTES: u32 = 96;
const SIDES: usize = 11;
/// Gradients of a launch of `hopper_nn`, whose arguments take 4044 bytes of the 4096 that every driver takes.
const MOST: usize = 5;

/// How long a slice of a task takes, and one of a tile: 128 tokens of 128 columns at 90 GB/s for a multiprocessor, a guess, and 64 of
/// the depth at the speed that docs/kernels.md expects.
const TASK_TIME: usize = 5;
const TILE_TIME: usize = 9;
/// Where a product begins: it multiplies more, and all rows are read at once.
const FIRST_TIME: usize = 11;

/// A gradient `to += scale weight ∘ (vᵀ u)`.
pub(in super::super) struct Gradient<'a> {
    /// `[m, columns]`.
    pub v: &'a DeviceSlice<bf16>,
    /// `[m, R]` with R the sum of the padded ranks: a matrix for each of `to`, beside each other.
    pub u: &'a DeviceSlice<bf16>,
    /// `[columns, rank]`, each with its rank; the first is there.
    pub to: [Option<(&'a mut DeviceSlice<f32>, usize)>; SHARING],
    /// They are `[rank, columns]`.
    pub transposed: bool,
    pub scale: f32,
    /// `[columns]`.
    pub weight: Option<&'a DeviceSlice<bf16>>,
    pub m: usize,
    pub columns: usize,
}

/// A product with gradients that have waited for it, or these alone; each of `m` rows. The first `from` of their tasks have been made.
pub(in super::super) fn nn_with_gradients(
    gpu: &Gpu,
    arena: &Arena,
    tile: Tile,
    product: Option<Product>,
    waiting: Vec<Waiting>,
    m: usize,
    from: usize,
) -> Result<()> {
    with_waiting(gpu, arena, waiting, m, |gradients| {
        launch(gpu, tile, clusters(gpu), product, gradients, Tasks::From(from)).map(|_| ())
    })
}

/// Which tasks of its gradients a launch makes.
#[derive(Clone, Copy)]
pub(in super::super) enum Tasks {
    /// The first, as many as idle clusters have time for, and so many at most.
    Idle(usize),
    /// All from this one on.
    From(usize),
}

/// Calls `launch` with what has waited, of `m` rows each.
pub(in super::super) fn with_waiting(
    gpu: &Gpu,
    arena: &Arena,
    waiting: Vec<Waiting>,
    m: usize,
    launch: impl FnOnce(&mut [Gradient]) -> Result<()>,
) -> Result<()> {
    let mut joined = Vec::new();
    for gradient in &waiting {
        joined.push(joined_du(gpu, arena, gradient, m)?);
    }
    let each = waiting.into_iter().zip(&joined);
    let gradients = each.filter_map(|(waiting, du)| Gradient::of(waiting, du.as_deref(), m));
    launch(&mut gradients.collect::<Vec<_>>())
}

/// du of the adapters of one input beside each other, times what the input's norm multiplied a row by; none where one is all as it is.
fn joined_du(
    gpu: &Gpu,
    arena: &Arena,
    waiting: &Waiting,
    m: usize,
) -> Result<Option<DeviceBuffer<bf16>>> {
    let Waiting::A { input, adapters, .. } = waiting else { return Ok(None) };
    if adapters.is_empty() || adapters.len() == 1 && input.norm.is_none() {
        return Ok(None);
    }
    let width: usize = adapters.iter().map(|adapter| padded(adapter.rank)).sum();
    let mut joined = arena.take(m * width)?;
    let factors = input.norm.map(|norm| norm.inv_rms);
    let each: Vec<(&DeviceSlice<bf16>, usize)> =
        adapters.iter().map(|adapter| (adapter.du, adapter.rank)).collect();
    join(gpu, &each, factors, &mut joined, m)?;
    Ok(Some(joined))
}

impl<'a> Gradient<'a> {
    /// Nothing where there is nothing to add.
    fn of(waiting: Waiting<'a>, joined: Option<&'a DeviceSlice<bf16>>, m: usize) -> Option<Self> {
        let gradient = match waiting {
            Waiting::A { input, k, adapters } => {
                let u = joined.or(adapters.first().map(|first| first.du))?;
                let mut each = adapters.into_iter();
                let to = [(); SHARING].map(|()| {
                    let GradientOfA { da, rank, .. } = each.next()?;
                    Some((da, rank))
                });
                assert!(each.next().is_none(), "at most {SHARING} adapters have one input");
                let weight = input.norm.map(|norm| norm.weight);
                Self { v: input.x, u, to, transposed: true, scale: 1.0, weight, m, columns: k }
            }
            Waiting::B(of_b) => Self::of_b(of_b, m),
        };
        (gradient.m * gradient.columns > 0).then_some(gradient)
    }

    pub fn of_b(GradientOfB { dy, u, db, rank, scale }: GradientOfB<'a>, m: usize) -> Self {
        let columns = db.len() / rank;
        let to = [Some((db, rank)), None, None];
        Self { v: dy, u, to, transposed: false, scale, weight: None, m, columns }
    }
}

impl Gradient<'_> {
    fn ranks(&self) -> [usize; SHARING] {
        self.to.each_ref().map(|to| to.as_ref().map_or(0, |(_, rank)| *rank))
    }

    /// Of `u`.
    fn width(&self) -> usize {
        self.ranks().map(padded).iter().sum()
    }

    fn check(&self) {
        let (op, m, columns) = ("a gradient", self.m, self.columns);
        assert_multiples_of_8(op, [("its columns", columns)]);
        assert_shapes(op, [("v", self.v.len(), m, columns), ("u", self.u.len(), m, self.width())]);
        for (to, rank) in self.to.iter().flatten() {
            assert_rank(op, *rank);
            assert_shapes(op, [("it", to.len(), columns, *rank)]);
            short(to.len());
        }
        if let Some(weight) = self.weight {
            assert_shapes(op, [("the weight", weight.len(), 1, columns)]);
        }
    }

    fn tasks(&self) -> usize {
        self.columns.div_ceil(TASK_COLUMNS) * self.width().div_ceil(TASK_RANKS)
    }

    /// `Sides` of hopper_gradients.cuh.
    fn sides(&self) -> [u32; SIDES] {
        let ranks = self.ranks();
        let [first, second, _] = ranks.map(padded);
        // The second and third have no strides of their own, so only transposed ones may be several.
        let strides = if self.transposed { [1, self.columns] } else { [ranks[0], 1] };
        assert!(self.transposed || ranks[1..] == [0, 0], "gradients beside each other");
        let [m, columns, width, second_at, third_at] =
            [self.m, self.columns, self.width(), first, first + second].map(short);
        let ([r0, r1, r2], [column, rank]) = (ranks.map(short), strides.map(short));
        [m, columns, width, second_at, third_at, r0, r1, r2, column, rank, self.scale.to_bits()]
    }
}

/// Tasks of a cluster that has a tile less than others, or of each where none has, such that the last to be done is done soonest.
/// `times`: of a tile and of a task.
fn of_idle(clusters: usize, tiles: usize, tasks: usize, times: [usize; 2]) -> usize {
    let [tile, task] = times;
    let busy = tiles % clusters;
    let idle = clusters - busy;
    let last = |of_idle: usize| {
        let rest = tasks.saturating_sub(of_idle * idle);
        let of_busy = match busy {
            0 if rest == 0 => 0,
            0 => usize::MAX,
            _ => tile + rest.div_ceil(busy) * task,
        };
        of_busy.max(of_idle * task)
    };
    (0..=tasks.div_ceil(idle)).min_by_key(|of_idle| last(*of_idle)).unwrap_or(0)
}

/// On so many `clusters` at most; with a product or without, and `gradients` of whose matrices none is empty. Returns how many of their
/// tasks are there now.
pub(in super::super) fn launch<'a>(
    gpu: &Gpu,
    tile: Tile,
    clusters: u32,
    product: Option<Product<'a>>,
    gradients: &'a mut [Gradient],
    tasks: Tasks,
) -> Result<usize> {
    let (gradients, later) = gradients.split_at_mut(gradients.len().min(MOST));
    let all: usize = gradients.iter().map(Gradient::tasks).sum();
    let made = if let Tasks::From(task) = tasks { task } else { 0 };
    assert!(made <= all, "{made} of {all} tasks of gradients have been made");
    if product.is_none() && made == all {
        return if later.is_empty() {
            Ok(all)
        } else {
            launch(gpu, tile, clusters, None, later, Tasks::From(0))
        };
    }
    // In the place of what is not there; nothing is read of it.
    let any = match (&product, gradients.first()) {
        (Some(Product { layers, m, .. }), _) => (layers[0].dy, [*m, layers[0].n]),
        (None, Some(&Gradient { v, m, columns, .. })) => (v, [m, columns]),
        (None, None) => unreachable!("no product and no gradient"),
    };
    let any = gpu.tensor_map(any.0, any.1, PIECE)?;
    let tile = product.as_ref().map_or(tile, |product| product.columns.tile);
    let tiles = product.as_ref().map_or(0, |product| product.columns.pairs(product.m));
    let slices = product.as_ref().map_or(0, Product::slices);
    let args = with_product(gpu, Args::default(), product, any)?;
    let shared = share::<MOST>(gpu, tile, clusters, args, (tiles, slices), gradients, tasks, any)?;
    let last = shared.last;
    shared.launch(gpu, &tile.kernel("hopper_nn"))?;
    if let Tasks::From(_) = tasks {
        launch(gpu, tile, clusters, None, later, Tasks::From(0))?;
    }
    Ok(last)
}

/// A launch that makes gradients besides tiles.
pub(in super::super) struct Shared<'a> {
    /// Tasks that are there once it is launched.
    last: usize,
    clusters: u32,
    bytes: u32,
    args: Args<'a>,
}

impl Shared<'_> {
    pub(in super::super) fn launch(self, gpu: &Gpu, kernel: &Kernel) -> Result<()> {
        gpu.launch(kernel, [self.clusters * CLUSTER, 1, 1], self.bytes, self.args)
    }
}

/// Adds the arguments that come last: how clusters share the tasks, and at most `MOST` gradients. `tiles`: how many pairs there are, and
/// slices of each.
pub(in super::super) fn share<'a, const MOST: usize>(
    gpu: &Gpu,
    tile: Tile,
    clusters: u32,
    args: Args<'a>,
    (tiles, slices): (u32, usize),
    gradients: &'a mut [Gradient],
    tasks: Tasks,
    any: TensorMap<'a>,
) -> Result<Shared<'a>> {
    assert!(gradients.len() <= MOST, "{} gradients, {MOST} at most", gradients.len());
    gradients.iter().for_each(Gradient::check);
    let all: usize = gradients.iter().map(Gradient::tasks).sum();
    let tokens = gradients.iter().map(|it| it.m).max().unwrap_or(0);
    let times = [TILE_TIME * slices, TASK_TIME * tokens.div_ceil(tile.tokens() as usize)];
    let (task, last, of_idle, clusters) = match tasks {
        Tasks::From(task) => {
            let clusters = clusters.min(tiles + short(all - task));
            let of_idle = of_idle(clusters as usize, tiles as usize, all - task, times);
            (task, all, of_idle, clusters)
        }
        Tasks::Idle(most) => {
            let idle = if tiles.is_multiple_of(clusters) { 0 } else { clusters - tiles % clusters };
            let of_idle = FIRST_TIME * slices / times[1].max(1);
            let last = all.min(most).min(idle as usize * of_idle);
            (0, last, of_idle, clusters.min(if last > 0 { tiles + idle } else { tiles }))
        }
    };
    let args = args.with(of_idle as i32).with(task as i32).with(last as i32);
    let args = with_gradients::<MOST>(gpu, tile, args, gradients, any)?;
    let bytes = tile.shared_bytes() + MOST as u32 * GRADIENT_BYTES;
    Ok(Shared { last, clusters, bytes, args })
}

/// The arguments up to `add`.
fn with_product<'a>(
    gpu: &Gpu,
    mut args: Args<'a>,
    product: Option<Product<'a>>,
    any: TensorMap<'a>,
) -> Result<Args<'a>> {
    let Some(Product { layers, adapters, dx, columns, m, k, add }) = product else {
        let args = (0..4 * SHARING).fold(args, |args, _| args.with(any));
        let args = with_shorts(gpu, args, Default::default(), any, [0; SHARING], false)?;
        return Ok((0..2 * SHARING + 5).fold(args.with(any), |args, _| args.with(0)));
    };
    for (i, adapter) in adapters.into_iter().enumerate() {
        let layer = layers
            .get(i)
            .map(|layer| maps(gpu, (layer.dy, layer.w), adapter, (m, layer.n, k), None));
        args = layer.transpose()?.unwrap_or([any; 4]).into_iter().fold(args, Args::with);
    }
    let depths = std::array::from_fn(|i| layers.get(i).map_or(0, |layer| layer.n));
    let args = with_shorts(gpu, args, columns.shorts, any, depths, false)?;
    let args = args.with(gpu.tensor_map_mut(dx, [m, k], PIECE)?).with(m as i32).with(k as i32);
    let args = args.with(columns.first as i32).with(columns.across as i32);
    let args = depths.into_iter().zip(adapters).fold(args, |args, (depth, adapter)| {
        args.with(depth as i32).with(adapter.map_or(0, |adapter| adapter.rank) as i32)
    });
    Ok(args.with(i32::from(add)))
}

/// The arguments from there on.
fn with_gradients<'a, const MOST: usize>(
    gpu: &Gpu,
    tile: Tile,
    mut args: Args<'a>,
    gradients: &'a mut [Gradient],
    any: TensorMap<'a>,
) -> Result<Args<'a>> {
    let mut each = gradients.iter_mut();
    for _ in 0..MOST {
        let Some(gradient) = each.next() else {
            let nothing: [Option<&mut DeviceSlice<f32>>; SHARING] = Default::default();
            args = nothing.into_iter().fold(args.with(any).with(any), Args::with);
            args = args.with(None::<&DeviceSlice<bf16>>).with([0; SIDES]);
            continue;
        };
        let (sides, width) = (gradient.sides(), gradient.width());
        let &mut Gradient { v, u, weight, m, columns, ref mut to, .. } = gradient;
        let v = gpu.tensor_map(v, [m, columns], tile.tokens())?;
        let u = gpu.tensor_map(u, [m, width], tile.tokens() / CLUSTER)?;
        let to = to.each_mut().map(|to| to.as_mut().map(|(to, _)| &mut **to));
        args = to.into_iter().fold(args.with(v).with(u), Args::with).with(weight).with(sides);
    }
    Ok(args)
}

//! An adapter's gradients on a device against f64.

use super::super::tests::{random_padded, sum_of_products};
use super::super::{Begun, Layer, nn_together};
use super::gradient::Division;
use super::*;
use crate::cuda::Arena;
use crate::testing::{
    Real, assert_accurate, assert_accurate_bf16, gpu, hopper_gpu, random, random_bf16, round,
};

const SEEDS: [u64; 4] = [0, 1, 2, 3];
const SCALE: f32 = 0.75;

/// One layer's way back: m rows, n columns of dy, rank.
pub(in super::super) struct Case {
    m: usize,
    n: usize,
    rank: usize,
    dy: Vec<bf16>,
    u: Vec<bf16>,
    b: Vec<bf16>,
    before: Vec<f32>,
}

impl Case {
    pub(in super::super) fn new((m, n): (usize, usize), rank: usize) -> Self {
        Self {
            m,
            n,
            rank,
            dy: random_bf16(m * n, 1),
            u: random_padded(m, rank, 2),
            b: random_padded(n, rank, 3),
            before: random(n * rank, 4),
        }
    }

    /// db and du.
    fn gradient_of_b(&self, gpu: &Gpu) -> Result<(Vec<f32>, Vec<bf16>)> {
        let Self { m, n, rank, .. } = *self;
        let (dy, u, b) = (gpu.uploaded(&self.dy)?, gpu.uploaded(&self.u)?, gpu.uploaded(&self.b)?);
        let mut db = gpu.uploaded(&self.before)?;
        let mut du = gpu.alloc(m * padded(rank))?;
        let mut workspace = gpu.alloc(workspace_of_b(m, n, rank))?;
        let of_b = GradientOfB { dy: &dy, u: &u, db: &mut db, rank, scale: SCALE };
        add_to_gradient_of_b(gpu, of_b, Some((&b, &mut du)), m, n, &mut workspace)?;
        Ok((gpu.downloaded(&db)?, gpu.downloaded(&du)?))
    }

    /// All gradients as the way back has them: du first, dB with it or with a product of `k` columns, dA with that.
    fn on_the_way_back(&self, gpu: &Gpu, k: usize) -> Result<Gradients> {
        let Self { m, n, rank, .. } = *self;
        let arena = Arena::new(gpu, 0)?;
        let (dy, u, b) = (gpu.uploaded(&self.dy)?, gpu.uploaded(&self.u)?, gpu.uploaded(&self.b)?);
        let (mut da, mut db) = (gpu.uploaded(&self.before)?, gpu.uploaded(&self.before)?);
        let mut du = gpu.alloc(m * padded(rank))?;
        let of_b = GradientOfB { dy: &dy, u: &u, db: &mut db, rank, scale: SCALE };
        let of_b = pull(gpu, &arena, of_b, &b, &mut du, m, n)?;
        assert_eq!(of_b.is_some(), gpu.properties().compute_capability == (9, 0));
        let adapters = vec![GradientOfA { du: &u, da: &mut da, rank }];
        let of_a = Gradient::A { input: Input { x: &dy, norm: None }, k: n, adapters };
        let w = gpu.uploaded(&random_bf16(n * k, 7))?;
        let mut dx = gpu.alloc(m * k)?;
        let layers = [Layer { dy: &dy, w: &w, n, adapter: None }];
        let gradients = of_b.map(Gradient::B).into_iter().chain([of_a]).collect();
        nn_together(gpu, &arena, &layers, &mut dx, gradients, m, k, Begun::default())?;
        let [da, db] = [da, db].map(|gradient| gpu.downloaded(&gradient).unwrap());
        Ok(Gradients { da, db, du: gpu.downloaded(&du)? })
    }

    /// da: `[rank, n]`, with dy for x and u for du.
    fn gradient_of_a(&self, gpu: &Gpu) -> Result<Vec<f32>> {
        let Self { m, n, rank, .. } = *self;
        let (x, du) = (gpu.uploaded(&self.dy)?, gpu.uploaded(&self.u)?);
        let mut da = gpu.uploaded(&self.before)?;
        let mut workspace = gpu.alloc(workspace_of_a(m, n, &[rank]))?;
        let of = &mut [GradientOfA { du: &du, da: &mut da, rank }];
        add_to_gradients_of_a(gpu, Input { x: &x, norm: None }, of, m, n, &mut workspace)?;
        gpu.downloaded(&da)
    }

    fn db_reference<R: Real>(&self) -> Vec<R> {
        let Self { m, n, rank, .. } = *self;
        let (dy, u) = (|i, l: usize| self.dy[l * n + i], |l, j| self.u[l * padded(rank) + j]);
        let sums = sum_of_products::<R>((n, m, rank), dy, u);
        let both = sums.into_iter().zip(&self.before);
        both.map(|(sum, before)| R::of((*before).into()) + R::of(SCALE.into()) * sum).collect()
    }

    fn du_reference<R: Real>(&self) -> Vec<R> {
        let Self { m, n, rank, .. } = *self;
        let pitch = padded(rank);
        let (dy, b) = (|i, l| self.dy[i * n + l], |l, j| self.b[l * pitch + j]);
        sum_of_products((m, n, pitch), dy, b)
    }

    fn da_reference<R: Real>(&self) -> Vec<R> {
        let Self { m, n, rank, .. } = *self;
        let (du, x) = (|i, l: usize| self.u[l * padded(rank) + i], |l, j| self.dy[l * n + j]);
        let sums = sum_of_products::<R>((rank, m, n), du, x);
        let both = sums.into_iter().zip(&self.before);
        both.map(|(sum, before)| R::of((*before).into()) + sum).collect()
    }

    pub(in super::super) fn run(&self, gpu: &Gpu) -> Result<Gradients> {
        let (db, du) = self.gradient_of_b(gpu)?;
        Ok(Gradients { db, du, da: self.gradient_of_a(gpu)? })
    }

    pub(in super::super) fn assert_accurate(&self, found: &Gradients) {
        let what = format!("{} rows, {} columns, rank {}", self.m, self.n, self.rank);
        let Gradients { db, du, da } = found;
        assert_accurate(&format!("db {what}"), db, &self.db_reference(), &self.db_reference());
        let (plain, exact) = (round(&self.du_reference()), self.du_reference());
        assert_accurate_bf16(&format!("du {what}"), du, &plain, &exact);
        assert_accurate(&format!("da {what}"), da, &self.da_reference(), &self.da_reference());
    }
}

#[derive(PartialEq)]
pub(in super::super) struct Gradients {
    db: Vec<f32>,
    du: Vec<bf16>,
    da: Vec<f32>,
}

/// One row, one slab and several, one span and several, slices that end within them.
const SHAPES: [(usize, usize); 5] = [(1, 8), (5, 72), (130, 264), (67, 1064), (300, 40)];

#[test]
fn gradients_agree_with_f64() {
    let shapes_and_ranks =
        SHAPES.into_iter().flat_map(|shape| [1, 8, 16, 29, 64].map(|rank| (shape, rank)));
    let high_ranks = [40, 100, 256].map(|rank| ((37, 264), rank));
    for ((shape, rank), seed) in shapes_and_ranks.chain(high_ranks).zip(SEEDS.into_iter().cycle()) {
        let case = Case::new(shape, rank);
        case.assert_accurate(&case.run(&gpu(seed)).unwrap());
    }
}

/// Wherever they are made: with a product of Hopper's, with one for narrow weights, with a portable one.
#[test]
fn gradients_that_wait_agree_with_f64() {
    let cases = [((5, 72), 5, 8), ((130, 264), 16, 72), ((300, 40), 20, 136), ((67, 328), 100, 72)];
    for ((shape, rank, k), seed) in cases.into_iter().zip(SEEDS) {
        for gpu in [gpu(seed), hopper_gpu(seed)] {
            let case = Case::new(shape, rank);
            case.assert_accurate(&case.on_the_way_back(&gpu, k).unwrap());
        }
    }
    let wide = Case::new((3, 1032), 16);
    wide.assert_accurate(&wide.on_the_way_back(&hopper_gpu(1), 1024).unwrap());
}

#[test]
fn gradients_have_the_same_bits_in_any_order_of_threads() {
    for rank in [16, 20, 64] {
        let case = Case::new((300, 136), rank);
        let first = case.run(&gpu(0)).unwrap();
        let alike = |seed| case.run(&gpu(seed)).unwrap() == first;
        assert!(SEEDS.into_iter().all(alike), "rank {rank}");
    }
}

#[test]
fn no_rows_add_nothing() {
    let nothing = Shared::new((0, 8), &[4, 20], true);
    let found = nothing.run(&gpu(0)).unwrap();
    assert!(
        found.iter().zip(&nothing.before).all(|((u, da), before)| u.is_empty() && da == before)
    );
    let case = Case::new((0, 8), 4);
    let (db, du) = case.gradient_of_b(&gpu(0)).unwrap();
    assert_eq!((&db, du.len()), (&case.before, 0));
    assert_eq!(case.gradient_of_a(&gpu(0)).unwrap(), case.before);
}

/// Layers with one input, `[m, k]`, which a norm may have made.
pub(in super::super) struct Shared {
    m: usize,
    k: usize,
    ranks: Vec<usize>,
    x: Vec<bf16>,
    /// w and s.
    norm: Option<(Vec<bf16>, Vec<f32>)>,
    /// Of each layer a `[R, k]`, du `[m, R]` and what da `[r, k]` is before.
    a: Vec<Vec<bf16>>,
    du: Vec<Vec<bf16>>,
    before: Vec<Vec<f32>>,
}

/// Of each layer u and da.
pub(in super::super) type UAndDa = Vec<(Vec<bf16>, Vec<f32>)>;

impl Shared {
    pub(in super::super) fn new((m, k): (usize, usize), ranks: &[usize], normed: bool) -> Self {
        let roots = || random(m, 9).iter().map(|x| 0.5 + x.abs()).collect();
        let each = |of: &dyn Fn(usize, u64) -> Vec<bf16>| -> Vec<Vec<bf16>> {
            ranks.iter().zip(10..).map(|(&rank, seed)| of(rank, seed)).collect()
        };
        let a = each(&|rank, seed| {
            let mut a = random_bf16(rank * k, seed);
            a.resize(padded(rank) * k, bf16::ZERO);
            a
        });
        Self {
            m,
            k,
            ranks: ranks.to_vec(),
            x: random_bf16(m * k, 7),
            norm: normed.then(|| (random_bf16(k, 8), roots())),
            a,
            du: each(&|rank, seed| random_padded(m, rank, seed + 10)),
            before: ranks.iter().map(|rank| random(rank * k, 30)).collect(),
        }
    }

    /// Some of the layers, and of the rows the first.
    fn part(&self, layers: std::ops::Range<usize>, m: usize) -> Self {
        let rows = |x: &Vec<bf16>, width: usize| x[..m * width].to_vec();
        Self {
            m,
            k: self.k,
            ranks: self.ranks[layers.clone()].to_vec(),
            x: rows(&self.x, self.k),
            norm: self.norm.as_ref().map(|(w, s)| (w.clone(), s[..m].to_vec())),
            a: self.a[layers.clone()].to_vec(),
            du: layers.clone().map(|i| rows(&self.du[i], padded(self.ranks[i]))).collect(),
            before: self.before[layers].to_vec(),
        }
    }

    pub(in super::super) fn run(&self, gpu: &Gpu) -> Result<UAndDa> {
        self.run_by(gpu, |gpu, input, mut of| {
            let (m, k) = (self.m, self.k);
            let mut workspace = gpu.alloc(workspace_of_a(m, k, &self.ranks))?;
            add_to_gradients_of_a(gpu, input, &mut of, m, k, &mut workspace)
        })
    }

    /// The same with gradients as they wait for a product, though there is none.
    pub(in super::super) fn run_waiting(&self, gpu: &Gpu) -> Result<UAndDa> {
        self.run_by(gpu, |gpu, input, adapters| {
            let of_a = Gradient::A { input, k: self.k, adapters };
            add_to_gradients(gpu, &Arena::new(gpu, 0)?, vec![of_a], self.m)
        })
    }

    fn run_by(
        &self,
        gpu: &Gpu,
        add: impl FnOnce(&Gpu, Input, Vec<GradientOfA>) -> Result<()>,
    ) -> Result<UAndDa> {
        let (m, k, ranks) = (self.m, self.k, &self.ranks);
        let x = gpu.uploaded(&self.x)?;
        let on =
            |of: &[Vec<bf16>]| -> Result<Vec<_>> { of.iter().map(|x| gpu.uploaded(x)).collect() };
        let (a, du) = (on(&self.a)?, on(&self.du)?);
        let mut u: Vec<_> =
            ranks.iter().map(|rank| gpu.alloc(m * padded(*rank))).collect::<Result<_>>()?;
        let each = ranks.iter().zip(&a).zip(&mut u);
        let mut sides: Vec<_> =
            each.map(|((&rank, a), u)| Projected { a, u, rank, b: None }).collect();
        project(gpu, &x, &mut sides, m, k)?;

        let norm = self.norm.as_ref();
        let norm = norm.map(|(w, s)| Ok((gpu.uploaded(w)?, gpu.uploaded(s)?))).transpose()?;
        let norm = norm.as_ref().map(|(weight, inv_rms)| Norm { weight, inv_rms });
        let mut da: Vec<_> = self.before.iter().map(|x| gpu.uploaded(x)).collect::<Result<_>>()?;
        let each = ranks.iter().zip(&du).zip(&mut da);
        let of = each.map(|((&rank, du), da)| GradientOfA { du, da, rank }).collect();
        add(gpu, Input { x: &x, norm }, of)?;
        u.iter().zip(&da).map(|(u, da)| Ok((gpu.downloaded(u)?, gpu.downloaded(da)?))).collect()
    }

    fn u_reference<R: Real>(&self, i: usize) -> Vec<R> {
        let a = |l, j| self.a[i][j * self.k + l];
        sum_of_products((self.m, self.k, padded(self.ranks[i])), |t, l| self.x[t * self.k + l], a)
    }

    /// `round`: what becomes of s du on its way.
    fn da_reference<R: Real>(&self, i: usize, round: fn(R) -> R) -> Vec<R> {
        let (m, k, rank) = (self.m, self.k, self.ranks[i]);
        let wide = |x: bf16| R::of(x.to_f64());
        let elements = (0..rank * k).map(|at| {
            let (r, column) = (at / k, at % k);
            let mut sum = R::of(0.0);
            for t in 0..m {
                let du = wide(self.du[i][t * padded(rank) + r]);
                let du = match &self.norm {
                    Some((_, s)) => round(R::of(s[t].into()) * du),
                    None => du,
                };
                sum += du * wide(self.x[t * k + column]);
            }
            let weight = self.norm.as_ref().map_or(R::of(1.0), |(w, _)| wide(w[column]));
            R::of(self.before[i][at].into()) + weight * sum
        });
        elements.collect()
    }

    pub(in super::super) fn assert_accurate(&self, found: &UAndDa) {
        assert_eq!(found.len(), self.ranks.len());
        for (i, (u, da)) in found.iter().enumerate() {
            let what = format!("{} x {}, {:?}, layer {i}", self.m, self.k, self.ranks);
            let plain = round(&self.u_reference(i));
            assert_accurate_bf16(&format!("u {what}"), u, &plain, &self.u_reference(i));
            let rounded: fn(f32) -> f32 = |x| bf16::from_f32(x).to_f32();
            let (plain, exact) = (self.da_reference(i, rounded), self.da_reference(i, |x| x));
            assert_accurate(&format!("da {what}"), da, &plain, &exact);
        }
    }
}

const TOGETHER: [&[usize]; 6] =
    [&[16], &[5, 16], &[16, 16, 16], &[1, 29, 8], &[64, 64, 64], &[100, 3, 40]];

#[test]
fn layers_with_one_input_agree_with_f64() {
    let cases = TOGETHER.into_iter().flat_map(|ranks| [false, true].map(|normed| (ranks, normed)));
    for ((ranks, normed), seed) in cases.zip(SEEDS.into_iter().cycle()) {
        for shape in [(1, 8), (67, 264), (131, 72)] {
            let case = Shared::new(shape, ranks, normed);
            case.assert_accurate(&case.run(&gpu(seed)).unwrap());
            for gpu in [gpu(seed), hopper_gpu(seed)] {
                case.assert_accurate(&case.run_waiting(&gpu).unwrap());
            }
        }
    }
    // One that a batch is too short for is made by spans, which end within slices.
    let case = Shared::new((300, 40), &[16, 8], true);
    case.assert_accurate(&case.run(&gpu(1)).unwrap());
}

/// u is a part of every row.
#[test]
fn a_row_of_u_has_the_same_bits_in_any_company() {
    let case = Shared::new((150, 200), &[16, 40, 5], true);
    let all = case.run(&gpu(0)).unwrap();
    for (layers, m, seed) in [(0..3, 150, 1), (0..1, 150, 2), (1..3, 64, 3), (2..3, 1, 0)] {
        let some = case.part(layers.clone(), m).run(&gpu(seed)).unwrap();
        for (i, (u, _)) in layers.zip(&some) {
            assert!(*u == all[i].0[..u.len()], "layer {i}, {m} rows");
        }
    }
    for seed in SEEDS {
        assert!(case.run(&gpu(seed)).unwrap() == all, "seed {seed}");
    }
}

#[test]
fn packed_matrices_are_rounded_scaled_and_filled_up() {
    let gpu = gpu(1);
    for (rank, width) in [(1, 8), (16, 40), (29, 264)] {
        let pitch = padded(rank);
        let numbers = random(rank * width, 1);
        let from = gpu.uploaded(&numbers).unwrap();
        let mut to = gpu.alloc(pitch * width).unwrap();
        pack_a(&gpu, &from, &mut to, rank, width).unwrap();
        let mut expected: Vec<bf16> = numbers.iter().map(|x| bf16::from_f32(*x)).collect();
        expected.resize(pitch * width, bf16::ZERO);
        assert_eq!(gpu.downloaded(&to).unwrap(), expected);

        pack_b(&gpu, &from, &mut to, width, rank, SCALE).unwrap();
        let packed = gpu.downloaded(&to).unwrap();
        for (packed, row) in packed.chunks(pitch).zip(numbers.chunks(rank)) {
            let scaled = row.iter().map(|x| bf16::from_f32(SCALE * x));
            assert!(scaled.eq(packed[..rank].iter().copied()));
            assert!(packed[rank..].iter().all(|x| x.to_bits() == 0));
        }
    }
}

/// What is filled up stays zero all the way round, without anybody clearing it.
#[test]
fn what_is_filled_up_stays_zero() {
    let (m, k, n, rank) = (37, 24, 40, 5);
    let (gpu, pitch) = (gpu(2), padded(rank));
    let upload = |len, seed| gpu.uploaded(&random(len, seed)).unwrap();
    let upload_bf16 = |len, seed| gpu.uploaded(&random_bf16(len, seed)).unwrap();
    let (mut a, mut b) = (gpu.alloc(pitch * k).unwrap(), gpu.alloc(n * pitch).unwrap());
    pack_a(&gpu, &upload(rank * k, 1), &mut a, rank, k).unwrap();
    pack_b(&gpu, &upload(n * rank, 2), &mut b, n, rank, SCALE).unwrap();
    let (x, dy) = (upload_bf16(m * k, 3), upload_bf16(m * n, 4));
    let (mut u, mut du) = (gpu.alloc(m * pitch).unwrap(), gpu.alloc(m * pitch).unwrap());
    project(&gpu, &x, &mut [Projected { a: &a, u: &mut u, rank, b: None }], m, k).unwrap();
    let mut workspace = gpu.alloc(workspace_of_b(m, n, rank)).unwrap();
    let mut db = upload(n * rank, 5);
    let of_b = GradientOfB { dy: &dy, u: &u, db: &mut db, rank, scale: SCALE };
    add_to_gradient_of_b(&gpu, of_b, Some((&b, &mut du)), m, n, &mut workspace).unwrap();
    for padded in [u, du] {
        for row in gpu.downloaded(&padded).unwrap().chunks(pitch) {
            assert!(row[..rank].iter().all(|x| *x != bf16::ZERO));
            assert!(row[rank..].iter().all(|x| *x == bf16::ZERO));
        }
    }
}

#[test]
fn a_long_batch_is_divided_into_few_spans() {
    // Mistral-7B at 16k tokens: spans times slabs occupy a GPU about once.
    for (columns, slabs, spans) in [(4096, 4, 32), (1024, 1, 128), (28672, 28, 4)] {
        let division = Division::of(16384, columns, 16);
        assert_eq!((division.slabs, division.spans), (slabs, spans));
        assert!(division.span * (spans - 1) < 16384 && division.span * spans >= 16384);
    }
    for way in COLLECTING {
        assert!(way.shared_bytes() <= 99 << 10);
    }
}

#[test]
#[should_panic(expected = "the rank is 257, it must be 1 to 256")]
fn too_high_a_rank_is_refused() {
    let _ = Case::new((1, 8), 257).gradient_of_a(&gpu(0));
}

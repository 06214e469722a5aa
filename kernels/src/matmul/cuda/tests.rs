//! The products on a device against f64.

use super::*;
use crate::cuda::Arena;
use crate::testing::{Real, assert_accurate_bf16, gpu, hopper_gpu, random_bf16, round};

/// Orders in which threads run.
const SEEDS: [u64; 4] = [0, 1, 2, 3];

/// A matrix `[rows, padded(rank)]` that is zero beyond the rank.
pub(super) fn random_padded(rows: usize, rank: usize, seed: u64) -> Vec<bf16> {
    let pitch = adapter::padded(rank);
    let mut numbers = random_bf16(rows * pitch, seed);
    for row in numbers.chunks_mut(pitch.max(1)) {
        row[rank..].fill(bf16::ZERO);
    }
    numbers
}

/// `a b` with one product at a time; `a`: `[m, k]`, `b`: by row and column.
pub(super) fn sum_of_products<R: Real>(
    (m, k, n): (usize, usize, usize),
    a: impl Fn(usize, usize) -> bf16,
    b: impl Fn(usize, usize) -> bf16,
) -> Vec<R> {
    let wide = |x: bf16| R::of(x.to_f64());
    let elements = (0..m * n).map(|at| {
        let mut sum = R::of(0.0);
        for l in 0..k {
            sum += wide(a(at / n, l)) * wide(b(l, at % n));
        }
        sum
    });
    elements.collect()
}

/// `nt`, `nn` or `few` with its operands.
#[derive(Clone)]
pub(super) struct Case {
    op: &'static str,
    m: usize,
    /// The depth of the sum, and the columns of the output.
    depth: usize,
    columns: usize,
    beta: f32,
    /// Whether what is added to is another matrix than the output.
    apart: bool,
    left: Vec<bf16>,
    right: Vec<bf16>,
    bias: Option<Vec<bf16>>,
    /// Rank, left and right.
    adapter: Option<(usize, Vec<bf16>, Vec<bf16>)>,
    before: Vec<bf16>,
}

impl Case {
    pub(super) fn new(op: &'static str, (m, depth, columns): (usize, usize, usize)) -> Self {
        Self {
            op,
            m,
            depth,
            columns,
            beta: 0.0,
            apart: false,
            left: random_bf16(m * depth, 1),
            right: random_bf16(depth * columns, 2),
            bias: None,
            adapter: None,
            before: vec![bf16::NAN; m * columns],
        }
    }

    pub(super) fn adding(mut self) -> Self {
        self.beta = 1.0;
        self.before = random_bf16(self.m * self.columns, 3);
        self
    }

    /// Adds to another matrix.
    pub(super) fn adding_apart(self) -> Self {
        Self { apart: true, ..self.adding() }
    }

    pub(super) fn biased(mut self) -> Self {
        self.bias = Some(random_bf16(self.columns, 4));
        self
    }

    pub(super) fn adapted(mut self, rank: usize) -> Self {
        let pitch = adapter::padded(rank);
        let left = random_padded(self.m, rank, 5);
        let right = match self.op {
            "nn" => {
                let mut a = random_bf16(pitch * self.columns, 6);
                a[rank * self.columns..].fill(bf16::ZERO);
                a
            }
            _ => random_padded(self.columns, rank, 6),
        };
        self.adapter = Some((rank, left, right));
        self
    }

    /// With a fresh adapter: b is 0, and so is du = dy b.
    pub(super) fn without_effect(mut self) -> Self {
        let (_, left, right) = self.adapter.as_mut().unwrap();
        if self.op == "nn" { left } else { right }.fill(bf16::ZERO);
        self
    }

    /// The first rows alone.
    pub(super) fn rows(mut self, m: usize) -> Self {
        self.left.truncate(m * self.depth);
        self.before.truncate(m * self.columns);
        if let Some((rank, left, _)) = &mut self.adapter {
            left.truncate(m * adapter::padded(*rank));
        }
        Self { m, ..self }
    }

    pub(super) fn run(&self, gpu: &Gpu, tile: Option<Tile>) -> Result<Vec<bf16>> {
        let chosen = || Way::of(gpu, self.m, self.depth, self.columns);
        self.run_by(gpu, tile.map_or_else(chosen, Way::Portable))
    }

    pub(super) fn run_by(&self, gpu: &Gpu, way: Way) -> Result<Vec<bf16>> {
        let (left, right) = (gpu.uploaded(&self.left)?, gpu.uploaded(&self.right)?);
        let bias = self.bias.as_ref().map(|bias| gpu.uploaded(bias)).transpose()?;
        let adapter = match &self.adapter {
            Some((_, left, right)) => Some((gpu.uploaded(left)?, gpu.uploaded(right)?)),
            None => None,
        };
        let adapter = adapter.as_ref().map(|(left, right)| Adapter {
            left,
            right,
            rank: self.adapter.as_ref().unwrap().0,
        });
        let bias = bias.as_deref();
        let before = gpu.uploaded(&self.before)?;
        let mut out = match self.beta {
            1.0 if !self.apart => gpu.uploaded(&self.before)?,
            // As it comes: NaN where it isn't overwritten.
            _ => gpu.alloc(self.before.len())?,
        };
        let (m, depth, columns, beta) = (self.m, self.depth, self.columns, self.beta);
        match self.op {
            "nt" => {
                let before = match self.apart {
                    true => Before::Other(&before),
                    false => Before::of("nt", beta),
                };
                let all = Begun::default();
                nt_by(
                    gpu, way, &left, &right, before, &mut out, m, depth, columns, bias, adapter,
                    all,
                )?
            }
            "nn" => nn_by(gpu, way, &left, &right, &mut out, m, depth, columns, beta, adapter)?,
            _ => few(gpu, &left, &right, &mut out, m, depth, columns, beta, bias, adapter)?,
        }
        gpu.downloaded(&out)
    }

    fn reference<R: Real>(&self) -> Vec<R> {
        let (m, depth, columns) = (self.m, self.depth, self.columns);
        let product = |left: &[bf16], right: &[bf16], depth: usize| {
            let right_at = |l: usize, j: usize| match self.op {
                "nn" => right[l * columns + j],
                _ => right[j * depth + l],
            };
            sum_of_products::<R>((m, depth, columns), |i, l| left[i * depth + l], right_at)
        };
        let mut out = product(&self.left, &self.right, depth);
        if let Some((rank, left, right)) = &self.adapter {
            let more = product(left, right, adapter::padded(*rank));
            out.iter_mut().zip(more).for_each(|(out, more)| *out += more);
        }
        for (at, out) in out.iter_mut().enumerate() {
            if let Some(bias) = &self.bias {
                *out += R::of(bias[at % columns].to_f64());
            }
            if self.beta == 1.0 {
                *out += R::of(self.before[at].to_f64());
            }
        }
        out
    }

    pub(super) fn assert_accurate(&self, out: &[bf16], tile: impl std::fmt::Debug) {
        let Self { op, m, depth, columns, beta, .. } = self;
        let rank = self.adapter.as_ref().map(|adapter| adapter.0);
        let bias = self.bias.is_some();
        let what =
            format!("{op} {m}x{depth}x{columns} rank {rank:?} beta {beta} bias {bias} {tile:?}");
        assert_accurate_bf16(&what, out, &round(&self.reference()), &self.reference());
    }

    fn check(&self, gpu: &Gpu, tile: Option<Tile>) {
        self.assert_accurate(&self.run(gpu, tile).unwrap(), tile);
    }
}

/// The ways back of layers with one input: depths, and ranks of which 0 is none.
pub(super) struct Together(Vec<Case>);

impl Together {
    pub(super) fn new(m: usize, columns: usize, layers: &[(usize, usize)]) -> Self {
        let case = |&(depth, rank): &(usize, usize)| {
            let case = Case::new("nn", (m, depth, columns));
            if rank == 0 { case } else { case.adapted(rank) }
        };
        Self(layers.iter().map(case).collect())
    }

    pub(super) fn run(&self, gpu: &Gpu) -> Result<Vec<bf16>> {
        let uploaded = |numbers: &Vec<bf16>| gpu.uploaded(numbers);
        let mut on = Vec::new();
        for case in &self.0 {
            let adapter = case.adapter.as_ref().map(|(_, u, a)| Ok((uploaded(u)?, uploaded(a)?)));
            on.push((uploaded(&case.left)?, uploaded(&case.right)?, adapter.transpose()?));
        }
        let layers = self.0.iter().zip(&on).map(|(case, (dy, w, adapter))| {
            let rank = case.adapter.as_ref().map_or(0, |adapter| adapter.0);
            let adapter = adapter.as_ref().map(|(left, right)| Adapter { left, right, rank });
            Layer { dy, w, n: case.depth, adapter }
        });
        let Case { m, columns, .. } = self.0[0];
        let mut out = gpu.alloc(m * columns)?;
        let arena = Arena::new(gpu, 0)?;
        let layers: Vec<_> = layers.collect();
        let (none, all) = (Vec::new(), Begun::default());
        nn_together(gpu, &arena, &layers, &mut out, none, m, columns, all)?;
        gpu.downloaded(&out)
    }

    fn reference<R: Real>(&self, round: fn(R) -> R) -> Vec<R> {
        let sums = self.0.iter().map(|case| case.reference::<R>());
        let added = |all: Vec<R>, more: Vec<R>| {
            all.into_iter().zip(more).map(|(sum, more)| round(sum) + more).collect()
        };
        sums.reduce(added).unwrap()
    }

    /// `once`: nothing is rounded between layers.
    pub(super) fn assert_accurate(&self, out: &[bf16], once: bool) {
        let between: fn(f32) -> f32 = if once { |x| x } else { |x| bf16::from_f32(x).to_f32() };
        let (plain, exact) = (self.reference(between), self.reference(|x| x));
        let what = format!("{} layers together, once: {once}", self.0.len());
        assert_accurate_bf16(&what, out, &round(&plain), &exact);
    }
}

#[test]
fn layers_with_one_input_are_added_up() {
    let layers: [&[(usize, usize)]; 4] =
        [&[(72, 16), (264, 0), (40, 80)], &[(8, 5), (136, 16)], &[(328, 0)], &[(64, 0), (8, 40)]];
    for (layers, seed) in layers.into_iter().zip(SEEDS) {
        for (gpu, once) in [(gpu(seed), false), (hopper_gpu(seed), true)] {
            // On a device that is one, both are Hopper.
            let once = once || gpu.properties().compute_capability == (9, 0);
            let case = Together::new(270, 136, layers);
            case.assert_accurate(&case.run(&gpu).unwrap(), once);
        }
    }
    let case = Together::new(3, 1032, &[(8, 16), (72, 16), (8, 0)]);
    case.assert_accurate(&case.run(&hopper_gpu(1)).unwrap(), true);
}

/// Rows, depth and columns: within a fragment, past the edges of every tile, depths past the ring.
const SHAPES: [(usize, usize, usize); 7] = [
    (1, 8, 8),
    (3, 24, 40),
    (17, 136, 16),
    (65, 72, 24),
    (129, 264, 136),
    (130, 40, 200),
    (200, 520, 64),
];

fn all_tiles() -> [Tile; 4] {
    [LARGE, SMALL, NARROW[0], NARROW[1]]
}

fn check_products(op: &'static str) {
    let seeds = SEEDS.into_iter().cycle();
    let shapes_and_tiles = SHAPES.iter().flat_map(|shape| all_tiles().map(|tile| (*shape, tile)));
    for ((shape, tile), seed) in shapes_and_tiles.zip(seeds) {
        let gpu = gpu(seed);
        Case::new(op, shape).check(&gpu, Some(tile));
        Case::new(op, shape).adapted(16).adding().check(&gpu, Some(tile));
    }
    for (rank, seed) in [1, 8, 16, 64, 100, 256].into_iter().zip(0..) {
        let case = Case::new(op, (67, 104, 72)).adapted(rank);
        if op == "nt" { case.biased() } else { case }.check(&gpu(seed), None);
    }
}

#[test]
fn nt_agrees_with_f64() {
    check_products("nt");
    Case::new("nt", (70, 80, 40)).biased().adding().check(&gpu(0), None);
    for tile in all_tiles() {
        Case::new("nt", (70, 80, 40)).biased().adding_apart().check(&gpu(1), Some(tile));
    }
}

#[test]
fn nn_agrees_with_f64() {
    check_products("nn");
}

#[test]
fn few_agrees_with_f64() {
    for m in 1..=FEW_ROWS {
        let gpu = gpu(m as u64 - 1);
        for (depth, columns) in [(8, 1), (264, 37), (1000, 9)] {
            Case::new("few", (m, depth, columns)).check(&gpu, None);
            let case = Case::new("few", (m, depth, columns)).adapted(m * m).biased();
            case.adding().check(&gpu, None);
        }
    }
    Case::new("few", (FEW_ROWS + 1, 24, 40)).adapted(3).check(&gpu(0), None);
}

#[test]
fn nothing_to_do_is_done() {
    let gpu = gpu(0);
    for op in ["nt", "nn", "few"] {
        assert_eq!(Case::new(op, (0, 8, 8)).run(&gpu, None).unwrap(), []);
        assert_eq!(Case::new(op, (3, 8, 0)).run(&gpu, None).unwrap(), []);
        let empty_sum = Case::new(op, (3, 0, 8)).run(&gpu, None).unwrap();
        assert_eq!(empty_sum, [bf16::ZERO; 24]);
    }
}

/// The bits, by which NaN or -0 would be told apart.
pub(super) fn bits(numbers: &[bf16]) -> Vec<u16> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

/// What packing rests on.
#[test]
fn a_row_has_the_same_bits_in_any_company_tile_and_order() {
    for op in ["nt", "nn"] {
        let case = Case::new(op, (150, 264, 72)).adapted(16).adding();
        let all = bits(&case.run(&gpu(0), Some(LARGE)).unwrap());
        for (m, seed) in [(1, 1), (2, 2), (17, 3), (64, 4), (129, 5), (150, 6)] {
            for tile in all_tiles() {
                let alone = case.clone().rows(m).run(&gpu(seed), Some(tile)).unwrap();
                assert!(bits(&alone) == all[..m * 72], "{op}: {m} of 150 rows, {tile:?}");
            }
        }
    }
    let case = Case::new("few", (FEW_ROWS, 520, 37)).adapted(8).adding();
    let all = bits(&case.run(&gpu(0), None).unwrap());
    for m in 1..=FEW_ROWS {
        let alone = case.clone().rows(m).run(&gpu(m as u64), None).unwrap();
        assert!(bits(&alone) == all[..m * 37], "few: {m} of {FEW_ROWS} rows");
    }
}

/// At step 0 the policy is its own reference, bit for bit.
#[test]
fn a_fresh_adapter_and_none_give_the_same_bits() {
    for op in ["nt", "nn", "few"] {
        for rank in [1, 16, 40] {
            let m = if op == "few" { 5 } else { 70 };
            let plain = Case::new(op, (m, 136, 72)).adding();
            let fresh = plain.clone().adapted(rank).without_effect();
            let (plain, fresh) = (plain.run(&gpu(0), None), fresh.run(&gpu(1), None));
            assert_eq!(bits(&plain.unwrap()), bits(&fresh.unwrap()), "{op} rank {rank}");
        }
    }
}

#[test]
fn large_shapes_get_large_tiles() {
    let tile = |rows, columns| {
        let Tile { m, n, .. } = Tile::of(rows, columns);
        (m, n)
    };
    assert_eq!(tile(16384, 4096), (128, 128));
    assert_eq!(tile(16384, 1024), (128, 128));
    assert_eq!(tile(16384, 64), (64, 64));
    assert_eq!(tile(64, 14336), (64, 64));
    assert_eq!(tile(64, 4096), (64, 32));
    assert_eq!(tile(16384, 16), (64, 16));
    assert_eq!(tile(16384, 32), (64, 32));
    assert_eq!(LARGE.count(32768, 152_064), 256 * 1188);
    for tile in all_tiles() {
        assert!(tile.shared_bytes() <= 99 << 10, "what every GPU from sm_80 on has");
    }
}

#[test]
#[should_panic(expected = "matmul::nt on a device: k is 12, it must be a multiple of 8")]
fn an_odd_depth_is_refused() {
    let _ = Case::new("nt", (2, 12, 8)).run(&gpu(0), None);
}

#[test]
#[should_panic(expected = "matmul::nn on a device: beta is 0.5, it must be 0 or 1")]
fn another_beta_is_refused() {
    let case = Case { beta: 0.5, ..Case::new("nn", (2, 16, 8)).adding() };
    let _ = case.run(&gpu(0), None);
}

#[test]
#[should_panic(expected = "the adapter's left must be [2, 16]")]
fn an_adapter_of_another_shape_is_refused() {
    let mut case = Case::new("nt", (2, 16, 8)).adapted(8);
    case.adapter.as_mut().unwrap().1.pop();
    let _ = case.run(&gpu(0), None);
}

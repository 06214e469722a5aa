//! An adapter's gradients on a device against f64.

use super::super::nt;
use super::super::tests::{random_padded, sum_of_products};
use super::*;
use crate::testing::{
    Real, assert_accurate, assert_accurate_bf16, gpu, random, random_bf16, round,
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
        add_to_gradient_of_b(
            gpu,
            &dy,
            &u,
            &b,
            &mut db,
            &mut du,
            m,
            n,
            rank,
            SCALE,
            &mut workspace,
        )?;
        Ok((gpu.downloaded(&db)?, gpu.downloaded(&du)?))
    }

    /// da: `[rank, n]`, with dy for x and u for du.
    fn gradient_of_a(&self, gpu: &Gpu) -> Result<Vec<f32>> {
        let Self { m, n, rank, .. } = *self;
        let (x, du) = (gpu.uploaded(&self.dy)?, gpu.uploaded(&self.u)?);
        let mut da = gpu.uploaded(&self.before)?;
        let mut workspace = gpu.alloc(workspace_of_a(m, n, rank))?;
        add_to_gradient_of_a(gpu, &du, &x, &mut da, m, rank, n, &mut workspace)?;
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
    let case = Case::new((0, 8), 4);
    let (db, du) = case.gradient_of_b(&gpu(0)).unwrap();
    assert_eq!((&db, du.len()), (&case.before, 0));
    assert_eq!(case.gradient_of_a(&gpu(0)).unwrap(), case.before);
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
    nt(&gpu, &x, &a, &mut u, m, k, pitch, 0.0, None, None).unwrap();
    let mut workspace = gpu.alloc(workspace_of_b(m, n, rank)).unwrap();
    let mut db = upload(n * rank, 5);
    add_to_gradient_of_b(&gpu, &dy, &u, &b, &mut db, &mut du, m, n, rank, SCALE, &mut workspace)
        .unwrap();
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

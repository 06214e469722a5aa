//! Gradients as tasks of a launch against f64, and faults put into them.

use super::super::super::Layer;
use super::super::super::adapter::tests::Shared;
use super::super::super::tests::{bits, random_padded, sum_of_products};
use super::super::{NARROW, WIDE};
use super::*;
use crate::cuda::Fault;
use crate::testing::{Real, assert_accurate, hopper_gpu as gpu, random, random_bf16};
use std::panic::{AssertUnwindSafe, catch_unwind};

const SCALE: f32 = 0.75;

/// A gradient of m rows and so many columns, or several beside each other.
#[derive(Clone)]
struct Case {
    m: usize,
    columns: usize,
    ranks: Vec<usize>,
    transposed: bool,
    v: Vec<bf16>,
    u: Vec<Vec<bf16>>,
    weight: Option<Vec<bf16>>,
    before: Vec<Vec<f32>>,
}

impl Case {
    fn new(m: usize, columns: usize, ranks: &[usize], transposed: bool) -> Self {
        let seeds = 10 * (m + columns) as u64..;
        Self {
            m,
            columns,
            ranks: ranks.to_vec(),
            transposed,
            v: random_bf16(m * columns, seeds.start),
            u: ranks.iter().zip(seeds.clone()).map(|(r, i)| random_padded(m, *r, i + 1)).collect(),
            weight: None,
            before: ranks.iter().zip(seeds).map(|(r, i)| random(columns * r, i + 4)).collect(),
        }
    }

    fn of_b(m: usize, columns: usize, rank: usize) -> Self {
        Self::new(m, columns, &[rank], false)
    }

    fn of_a(m: usize, columns: usize, ranks: &[usize]) -> Self {
        Self::new(m, columns, ranks, true)
    }

    fn normed(mut self) -> Self {
        self.weight = Some(random_bf16(self.columns, 3));
        self
    }

    /// All u beside each other.
    fn beside(&self) -> Vec<bf16> {
        let widths = self.ranks.iter().copied().map(padded);
        let rows = (0..self.m).flat_map(|row| {
            let parts = self.u.iter().zip(widths.clone());
            parts.flat_map(move |(u, width)| &u[row * width..][..width])
        });
        rows.copied().collect()
    }

    fn reference<R: Real>(&self, i: usize) -> Vec<R> {
        let (rank, pitch) = (self.ranks[i], padded(self.ranks[i]));
        let v = |column: usize, l: usize| self.v[l * self.columns + column];
        let sums =
            sum_of_products::<R>((self.columns, self.m, rank), v, |l, r| self.u[i][l * pitch + r]);
        let at = |at: usize| match self.transposed {
            true => (at % self.columns, at / self.columns),
            false => (at / rank, at % rank),
        };
        let each = self.before[i].iter().enumerate().map(|(place, before)| {
            let (column, r) = at(place);
            let weight = self.weight.as_ref().map_or(1.0, |weight| weight[column].to_f64());
            let factor = R::of(f64::from(SCALE)) * R::of(weight);
            R::of((*before).into()) + factor * sums[column * rank + r]
        });
        each.collect()
    }

    fn assert_accurate(&self, found: &[Vec<f32>]) {
        assert_eq!(found.len(), self.ranks.len());
        for (i, found) in found.iter().enumerate() {
            let Self { m, columns, ranks, transposed, .. } = self;
            let what = format!("{m} rows, {columns} columns, {i} of ranks {ranks:?}, {transposed}");
            assert_accurate(&what, found, &self.reference(i), &self.reference(i));
        }
    }
}

/// A launch: rows, depth and columns of a product if there is one, and gradients.
#[derive(Clone)]
struct Launch {
    tile: Tile,
    clusters: u32,
    product: Option<[usize; 3]>,
    cases: Vec<Case>,
}

/// dx, and the gradients of each case.
type Made = (Vec<bf16>, Vec<Vec<Vec<f32>>>);

impl Launch {
    fn run(&self, gpu: &Gpu) -> Result<Made> {
        let mut on = Vec::new();
        for case in &self.cases {
            let (v, u) = (gpu.uploaded(&case.v)?, gpu.uploaded(&case.beside())?);
            let weight = case.weight.as_ref().map(|weight| gpu.uploaded(weight)).transpose()?;
            let to = case.before.iter().map(|before| gpu.uploaded(before));
            on.push((v, u, weight, to.collect::<Result<Vec<_>>>()?));
        }
        let gradients = self.cases.iter().zip(&mut on).map(|(case, (v, u, weight, to))| {
            let mut each = to.iter_mut().zip(&case.ranks);
            let to = [(); SHARING].map(|()| each.next().map(|(to, rank)| (&mut **to, *rank)));
            let (m, columns, transposed) = (case.m, case.columns, case.transposed);
            let weight = weight.as_deref();
            Gradient { v, u, to, transposed, scale: SCALE, weight, m, columns }
        });
        let mut gradients: Vec<Gradient> = gradients.collect();
        let [m, n, k] = self.product.unwrap_or_default();
        let (dy, w) = (random_bf16(m * n, 1), random_bf16(n * k, 2));
        let (dy, w) = (gpu.uploaded(&dy)?, gpu.uploaded(&w)?);
        let mut dx = gpu.alloc(m * k)?;
        let layers = [Layer { dy: &dy, w: &w, n, adapter: None }];
        let product =
            self.product.map(|_| Product::whole(self.tile, &layers, &mut dx, (m, k), false));
        let all = Tasks::From(0);
        launch(gpu, self.tile, self.clusters, product, &mut gradients, all)?;
        drop(gradients);
        let all = on.iter().map(|(.., to)| to.iter().map(|to| gpu.downloaded(to)).collect());
        Ok((gpu.downloaded(&dx)?, all.collect::<Result<_>>()?))
    }

    fn assert_accurate(&self, (_, gradients): &Made) {
        let each = self.cases.iter().zip(gradients);
        each.for_each(|(case, found)| case.assert_accurate(found));
    }

    fn check(&self, seed: u64) {
        self.assert_accurate(&self.run(&gpu(seed)).unwrap());
    }
}

/// Rows and columns: less than a box, past the edges of slices, of a block's columns and of a cluster's, a ring gone round.
const SHAPES: [(usize, usize); 6] =
    [(1, 8), (63, 72), (130, 264), (129, 136), (600, 520), (9, 1000)];

#[test]
fn gradients_agree_with_f64() {
    let shapes_and_ranks =
        SHAPES.into_iter().flat_map(|shape| [8, 16, 24, 64].map(|rank| (shape, rank)));
    let high_ranks = [1, 33, 100, 256].map(|rank| ((67, 264), rank));
    for (((m, columns), rank), seed) in shapes_and_ranks.chain(high_ranks).zip(0..) {
        let tile = if seed % 3 == 2 { NARROW } else { WIDE };
        let cases = vec![Case::of_b(m, columns, rank), Case::of_a(m, columns, &[rank]).normed()];
        Launch { tile, clusters: 1 + seed as u32 % 2, product: None, cases }.check(seed);
    }
}

#[test]
fn gradients_beside_each_other_read_their_input_once() {
    for (ranks, seed) in
        [&[16, 16, 16][..], &[5, 40], &[8, 16, 24], &[64, 1], &[100, 33, 70]].into_iter().zip(0..)
    {
        let cases = vec![Case::of_a(140, 328, ranks).normed()];
        Launch { tile: WIDE, clusters: 2, product: None, cases }.check(seed);
    }
}

/// A launch with more gradients than it has room for, of different lengths, and a product with few tiles or with many.
fn together(product: Option<[usize; 3]>, clusters: u32) -> Launch {
    let cases = vec![
        Case::of_b(300, 520, 16),
        Case::of_a(70, 136, &[16, 40]).normed(),
        Case::of_b(8, 264, 100),
        Case::of_a(257, 776, &[8]),
        Case::of_b(1100, 72, 8),
        Case::of_b(33, 264, 20),
        Case::of_a(1, 1032, &[3, 3, 3]),
    ];
    Launch { tile: if clusters == 3 { NARROW } else { WIDE }, clusters, product, cases }
}

/// More tasks than clusters, fewer tiles; a tile each; none; more tiles for some than for others.
#[test]
fn tasks_and_tiles_are_made_beside_each_other() {
    let products = [None, Some([40, 72, 264]), Some([300, 136, 264]), Some([600, 264, 1000])];
    for (product, seed) in products.into_iter().zip(0..) {
        for clusters in [1, 3, 5, 40] {
            let launch = together(product, clusters);
            let alone = Launch { cases: Vec::new(), ..launch.clone() };
            let made = launch.run(&gpu(seed)).unwrap();
            launch.assert_accurate(&made);
            // The product is what it is without gradients.
            assert!(bits(&made.0) == bits(&alone.run(&gpu(seed + 1)).unwrap().0), "{product:?}");
        }
    }
}

/// Whoever makes a task, and when.
#[test]
fn gradients_have_the_same_bits_in_any_order_and_company() {
    let bits_of = |(_, all): &Made| -> Vec<u32> {
        all.iter().flatten().flatten().map(|x| x.to_bits()).collect()
    };
    let product = Some([600, 136, 520]);
    let first = bits_of(&together(product, 5).run(&gpu(0)).unwrap());
    for (clusters, seed) in [(5, 1), (2, 2), (5, 3), (40, 4)] {
        assert!(bits_of(&together(product, clusters).run(&gpu(seed)).unwrap()) == first);
    }
    assert!(bits_of(&together(None, 2).run(&gpu(5)).unwrap()) == first);
    let mut narrow = together(None, 2);
    narrow.tile = NARROW;
    // The order of additions is that of the tokens, however many are in a slice.
    assert!(bits_of(&narrow.run(&gpu(6)).unwrap()) == first);
}

#[test]
fn tasks_go_to_who_has_time() {
    // 66 clusters of an H100: gate and up of Mistral-7B, o, q with k and v; and no product.
    assert_eq!(of_idle(66, 1024, 200, [9 * 450, 5 * 128]), 7);
    assert_eq!(of_idle(66, 1024, 32, [9 * 65, 5 * 128]), 1);
    assert_eq!(of_idle(66, 1024, 40, [9 * 99, 5 * 128]), 2);
    assert_eq!(of_idle(66, 0, 40, [0, 640]), 1);
    assert_eq!(of_idle(66, 132, 67, [1000, 1]), 2);
    // A product of which every cluster but one has a tile more.
    assert_eq!(of_idle(66, 65, 66, [1, 10]), 1);
    assert_eq!(of_idle(66, 65, 5, [100, 10]), 5);
    assert_eq!(of_idle(66, 0, 0, [0, 0]), 0);
}

const SEEDS: u64 = 8;

fn is_right<T>(run: Result<T>, assert_accurate: impl FnOnce(&T)) -> bool {
    match run {
        Ok(made) => catch_unwind(AssertUnwindSafe(|| assert_accurate(&made))).is_ok(),
        Err(error) => {
            // A fault that does not compile would prove nothing.
            assert!(error.to_string().starts_with("kernel "), "{error}");
            false
        }
    }
}

fn assert_caught(
    file: &'static str,
    faults: &[(&'static str, &'static str)],
    are_right: impl Fn(&Gpu) -> bool,
) {
    for &(from, to) in faults {
        let gpu = |seed| Gpu::emulated_hopper_with_fault(seed, Fault { file, from, to }).unwrap();
        let caught = (0..SEEDS).any(|seed| !are_right(&gpu(seed)));
        assert!(caught, "{file}: nothing is wrong with {to:?} for {from:?}");
    }
}

#[test]
fn faults_in_gradients_are_caught() {
    let launches = [together(Some([600, 136, 520]), 5), together(None, 2)];
    let faults = [
        // Phases, waits, counts of bytes, stages given back too early or not at all.
        ("turn.parity ^ 1);", "turn.parity);"),
        ("barrier_wait(shared.empty + turn.stage, turn.parity ^ 1);", ""),
        ("barrier_wait(shared.full + turn.stage, turn.parity);", ""),
        (
            "barrier_arrive_expecting(full, SLICE_BYTES);",
            "barrier_arrive_expecting(full, STAGE_BYTES - 1024);",
        ),
        (
            "(token > first) release(shared, before, part.thread);",
            "(token > first) release(shared, turn.stage, part.thread);",
        ),
        ("hold(sums);\n            release(", "hold(sums);\n            if (false) release("),
        ("wgmma_wait<1>();", "wgmma_wait<2>();"),
        ("wgmma_wait<0>();", ""),
        ("wgmma_fence();", ""),
        ("all[i] += sums[i]", "all[i] = sums[i]"),
        // Descriptors, panels and boxes.
        ("advanced(v, STEP * ROW_BYTES * k)", "advanced(v, 32 * k)"),
        ("advanced(u, STEP * ROW_BYTES * k)", "advanced(u, STEP * ROW_BYTES)"),
        ("stage + part.index * PANEL_BYTES", "stage"),
        ("column + 64 * panel, token", "column, token"),
        ("rank * (PANEL_BYTES / CLUSTER), *it.u", "0, *it.u"),
        ("token + rank * (TOKENS / CLUSTER)", "token"),
        ("token < it.sides.tokens", "token + TOKENS < it.sides.tokens"),
        ("divide_up(min(it.sides.ranks - rank, TASK_RANKS), 16)", "1"),
        // What is written.
        ("column_of(i) < sides.columns", "true"),
        ("rank_of(i) < count", "true"),
        ("before[i] + factor", "factor"),
        ("sides.scale * to_float(weight[column_of(i)])", "sides.scale"),
        ("(in_third ? sides.third_at : in_second ? sides.second_at : 0)", "0"),
        // Who makes what.
        ("task -= it->tasks()", "task = 0"),
        ("Share{border + cluster, busy, last}", "Share{border + cluster, busy, border}"),
        (
            "Share{task + cluster - busy, idle, border}",
            "Share{task + cluster - busy, idle + 1, border}",
        ),
    ];
    assert_caught("hopper_gradients.cuh", &faults, |gpu| {
        let right = |it: &Launch| is_right(it.run(gpu), |made| it.assert_accurate(made));
        launches.iter().all(right)
    });
}

#[test]
fn faults_in_what_is_joined_are_caught() {
    let cases = [Shared::new((70, 72), &[16, 40, 5], true), Shared::new((9, 72), &[3, 20], false)];
    let faults = [
        ("if (row >= rows) return;", ""),
        ("third ? u2 : second ? u1 : u0", "second ? u1 : u0"),
        ("(column - begin)", "column"),
        ("third ? width : second ? third_at : second_at", "second ? third_at : second_at"),
        ("factors ? factors[row] : 1.0f", "1.0f"),
    ];
    assert_caught("partials.cu", &faults, |gpu| {
        let right = |it: &Shared| is_right(it.run_waiting(gpu), |made| it.assert_accurate(made));
        cases.iter().all(right)
    });
}

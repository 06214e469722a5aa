use super::super::tests::SETTINGS;
use super::*;
use crate::testing::{SEEDS, assert_faults_are_caught, gpu, random, round};

/// Rows, width and pitch: from one element to more than two pieces.
const SHAPES: [(usize, usize, usize); 5] =
    [(1, 1, 1), (100, 3, 16), (16, 300, 300), (7, 8, 16), (77, 109, 112)];
/// Elements before each tensor and each copy that are none of theirs.
const GAP: usize = 3;
/// What is there, and in a copy's rows beyond the width.
const KEPT: f32 = 7.0;

/// All tensors, on the processor and on the device.
struct Twins {
    tensors: Vec<Tensor>,
    /// Parameters, gradients, m and v.
    here: [Vec<f32>; 4],
    there: [DeviceBuffer<f32>; 4],
    copies: DeviceBuffer<bf16>,
    table: Table,
}

impl Twins {
    fn new(gpu: &Gpu, shapes: &[(usize, usize, usize)]) -> Self {
        let (mut end, mut copy_end) = (0, 0);
        let mut tensors = Vec::new();
        for (&(rows, width, pitch), seed) in shapes.iter().zip(1..) {
            let (start, copy_start) = (end + GAP, copy_end + GAP);
            let copy_scale = 0.5 + seed as f32;
            tensors.push(Tensor { start, rows, width, copy_start, pitch, copy_scale });
            (end, copy_end) = (start + rows * width, copy_start + rows * pitch);
        }
        let mut here = [random(end, 1), random(end, 2), vec![0.0; end], vec![0.0; end]];
        let mut all = vec![true; end];
        tensors.iter().for_each(|t| all[t.start..t.start + t.len()].fill(false));
        for values in &mut here {
            values.iter_mut().zip(&all).filter(|(_, gap)| **gap).for_each(|(x, _)| *x = KEPT);
        }
        let there = [0, 1, 2, 3].map(|i| gpu.uploaded(&here[i]).unwrap());
        let copies = gpu.uploaded(&vec![bf16::from_f32(KEPT); copy_end]).unwrap();
        let table = Table::new(gpu, &tensors).unwrap();
        Self { tensors, here, there, copies, table }
    }

    fn step(&mut self, gpu: &Gpu, settings: &AdamW) {
        let Self { there: [params, grads, m, v], copies, table, .. } = self;
        step(gpu, table, params, grads, m, v, copies, settings).unwrap_or_else(|e| panic!("{e}"));
        for tensor in &self.tensors {
            let [params, grads, m, v] = self.here.each_mut();
            let of = tensor.start..tensor.start + tensor.len();
            let moments = (&mut m[of.clone()], &mut v[of.clone()]);
            let grads = &grads[of.clone()];
            crate::adamw::step(&mut params[of], grads, moments.0, moments.1, settings);
        }
    }

    fn check(&self, gpu: &Gpu) {
        for (here, there) in self.here.iter().zip(&self.there) {
            assert_eq!(here, &gpu.downloaded(there).unwrap());
        }
        let copies = gpu.downloaded(&self.copies).unwrap();
        let mut expected = vec![bf16::from_f32(KEPT); copies.len()];
        for &Tensor { start, rows, width, copy_start, pitch, copy_scale } in &self.tensors {
            for row in 0..rows {
                let params = &self.here[0][start + row * width..][..width];
                let scaled: Vec<f32> = params.iter().map(|p| copy_scale * p).collect();
                expected[copy_start + row * pitch..][..width].copy_from_slice(&round(&scaled));
            }
        }
        assert_eq!(copies, expected);
    }

    /// Σ grad², which was the first that was not finite, and the sum in f64.
    fn norm(&self, gpu: &Gpu) -> (f64, Option<u32>, f64) {
        let mut norm = Norm::new(gpu, &self.table).unwrap();
        norm.take(gpu, &self.table, &self.there[1], 1).unwrap_or_else(|error| panic!("{error}"));
        let squares = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        let of =
            |t: &Tensor| self.here[1][t.start..][..t.len()].chunks(PIECE).map(squares).sum::<f64>();
        let exact = self.tensors.iter().map(of).sum();
        let (found, first) = norm.read(gpu).unwrap();
        (found, first, exact)
    }
}

fn check_steps(gpu: &Gpu) {
    let mut twins = Twins::new(gpu, &SHAPES);
    for round in 1..=3 {
        twins.step(gpu, &AdamW { step: round, ..SETTINGS });
        twins.check(gpu);
        twins.here[1] = random(twins.here[1].len(), 100 + round);
        gpu.upload(&twins.here[1], &mut twins.there[1]).unwrap();
    }
}

fn check_norm(gpu: &Gpu) -> f64 {
    let (found, first, exact) = Twins::new(gpu, &SHAPES).norm(gpu);
    assert!((found - exact).abs() <= 1e-12 * exact, "{found} {exact}");
    assert_eq!(first, None);
    found
}

fn check_first(gpu: &Gpu) {
    let mut twins = Twins::new(gpu, &SHAPES[1..3]);
    let mut norm = Norm::new(gpu, &twins.table).unwrap();
    let last = twins.here[1].len() - 1;
    for (number, broken) in [(1, 1.0), (2, f32::INFINITY), (3, f32::NAN)] {
        twins.here[1][last] = broken;
        gpu.upload(&twins.here[1], &mut twins.there[1]).unwrap();
        norm.take(gpu, &twins.table, &twins.there[1], number).unwrap();
    }
    let (sum, first) = norm.read(gpu).unwrap();
    assert!(sum.is_nan() && first == Some(2), "{sum} {first:?}");
    norm.clear(gpu).unwrap();
    assert_eq!(norm.read(gpu).unwrap(), (0.0, None));
}

#[test]
fn gives_the_same_bits_as_the_processor_whatever_the_order() {
    SEEDS.into_iter().for_each(|seed| check_steps(&gpu(seed)));
}

#[test]
fn norm_agrees_with_f64_with_the_same_bits_whatever_the_order() {
    let first = check_norm(&gpu(0));
    assert!(SEEDS.into_iter().all(|seed| check_norm(&gpu(seed)) == first));
}

#[test]
fn the_first_gradient_that_is_not_finite_is_remembered() {
    check_first(&gpu(1));
}

/// More pieces than the last sum has threads.
#[test]
fn a_norm_over_many_pieces_agrees_with_f64() {
    let gpu = gpu(1);
    let (found, _, exact) = Twins::new(&gpu, &[(300, PIECE, PIECE)]).norm(&gpu);
    assert!((found - exact).abs() <= 1e-12 * exact, "{found} {exact}");
}

#[test]
fn nothing_to_update_is_fine() {
    let gpu = gpu(0);
    let mut none = Twins::new(&gpu, &[]);
    none.step(&gpu, &SETTINGS);
    assert_eq!(none.norm(&gpu), (0.0, None, 0.0));
}

#[test]
#[should_panic(expected = "adamw: copies has 1602 elements, the tensors' copies end at 1603")]
fn copies_that_are_too_small_are_refused() {
    let gpu = gpu(0);
    let mut twins = Twins::new(&gpu, &SHAPES[1..2]);
    twins.copies = gpu.alloc(100 * 16 + GAP - 1).unwrap();
    twins.step(&gpu, &SETTINGS);
}

#[test]
fn planted_faults_are_caught() {
    let faults = [
        (
            "adamw.cu",
            "m = __fadd_rn(m, __fmul_rn(one_minus_beta1",
            "m = __fadd_rn(0.0f, __fmul_rn(one_minus_beta1",
        ),
        ("adamw.cu", "* it.pitch + i % it.width", "* it.width + i % it.width"),
        ("adamw.cu", "vs[i] = v;", ""),
        (
            "adamw.cu",
            "x += __shfl_xor_sync(ALL_LANES, x, distance);\n    if",
            "x = __shfl_xor_sync(ALL_LANES, x, distance);\n    if",
        ),
        ("adamw.cu", "    __syncthreads();\n    double sum", "    double sum"),
        ("adamw.cu", "i < n; i += THREADS", "i + 1 < n; i += THREADS"),
        ("adamw.cu", "params += it.start, grads", "grads"),
        ("adamw.cu", " && total[1] == 0.0", ""),
    ];
    assert_faults_are_caught(
        |gpu| {
            check_steps(gpu);
            check_norm(gpu);
            check_first(gpu);
        },
        &faults,
    );
}

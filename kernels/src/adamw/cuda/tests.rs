use super::super::tests::SETTINGS;
use super::*;
use crate::testing::{SEEDS, assert_faults_are_caught, gpu, random, round};

/// Rows, width and pitch: from one element to more than two pieces.
const SHAPES: [(usize, usize, usize); 5] =
    [(1, 1, 1), (100, 3, 16), (16, 300, 300), (7, 8, 16), (77, 109, 112)];

/// A tensor on the processor and on the device.
struct Twins {
    shape: (usize, usize, usize),
    scale: f32,
    /// Parameters, gradient, m and v.
    here: [Vec<f32>; 4],
    there: [DeviceBuffer<f32>; 4],
    copy: DeviceBuffer<bf16>,
}

/// What the copy holds where nothing is written.
const KEPT: f32 = 7.0;

impl Twins {
    fn all(gpu: &Gpu) -> Vec<Self> {
        SHAPES.iter().zip(1..).map(|(shape, seed)| Self::new(gpu, *shape, seed)).collect()
    }

    fn new(gpu: &Gpu, shape: (usize, usize, usize), seed: u64) -> Self {
        let (rows, width, pitch) = shape;
        let n = rows * width;
        let here = [random(n, seed), random(n, 10 + seed), vec![0.0; n], vec![0.0; n]];
        let there = [0, 1, 2, 3].map(|i| gpu.uploaded(&here[i]).unwrap());
        let copy = gpu.uploaded(&vec![bf16::from_f32(KEPT); rows * pitch]).unwrap();
        Self { shape, scale: 0.5 + seed as f32, here, there, copy }
    }

    fn tensor(&mut self) -> Tensor<'_> {
        let [param, grad, m, v] = &mut self.there;
        let (_, width, pitch) = self.shape;
        Tensor { param, grad, m, v, copy: &mut self.copy, width, pitch, copy_scale: self.scale }
    }

    fn step_here(&mut self, settings: &AdamW) {
        let [param, grad, m, v] = &mut self.here;
        crate::adamw::step(param, grad, m, v, settings);
    }

    fn check(&self, gpu: &Gpu) {
        for (here, there) in self.here.iter().zip(&self.there) {
            assert_eq!(here, &gpu.downloaded(there).unwrap(), "{:?}", self.shape);
        }
        let (_, width, pitch) = self.shape;
        let copy = gpu.downloaded(&self.copy).unwrap();
        for (copy, param) in copy.chunks(pitch).zip(self.here[0].chunks(width)) {
            let scaled: Vec<f32> = param.iter().map(|p| self.scale * p).collect();
            assert_eq!(copy[..width], round(&scaled));
            assert!(copy[width..].iter().all(|x| x.to_f32() == KEPT), "what lies between rows");
        }
    }
}

fn check_steps(gpu: &Gpu) {
    let mut twins = Twins::all(gpu);
    let mut table = Table::new();
    for round in 1..=3 {
        let settings = AdamW { step: round, ..SETTINGS };
        let mut tensors: Vec<_> = twins.iter_mut().map(Twins::tensor).collect();
        step(gpu, &mut table, &mut tensors, &settings).unwrap_or_else(|error| panic!("{error}"));
        for twin in &mut twins {
            twin.step_here(&settings);
            twin.check(gpu);
            twin.here[1] = random(twin.here[1].len(), 100 + round);
            gpu.upload(&twin.here[1], &mut twin.there[1]).unwrap();
        }
    }
}

fn check_norm(gpu: &Gpu) -> f64 {
    let mut twins = Twins::all(gpu);
    let exact: f64 = twins.iter().flat_map(|t| &t.here[1]).map(|x| f64::from(*x).powi(2)).sum();
    let tensors: Vec<_> = twins.iter_mut().map(Twins::tensor).collect();
    let found = norm_squared(gpu, &mut Table::new(), &tensors);
    let found = found.unwrap_or_else(|error| panic!("{error}"));
    assert!((found - exact).abs() <= 1e-12 * exact, "{found} {exact}");
    found
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

/// More pieces than the last sum has threads.
#[test]
fn a_norm_over_many_pieces_agrees_with_f64() {
    let gpu = gpu(1);
    let mut twins = Twins::new(&gpu, (300, PIECE, PIECE), 1);
    let squares = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    let exact: f64 = twins.here[1].chunks(PIECE).map(squares).sum();
    let found = norm_squared(&gpu, &mut Table::new(), &[twins.tensor()]).unwrap();
    assert!((found - exact).abs() <= 1e-12 * exact, "{found} {exact}");
}

#[test]
fn other_tensors_make_another_table() {
    let gpu = gpu(0);
    let mut table = Table::new();
    let mut first = Twins::new(&gpu, SHAPES[1], 1);
    let mut second = Twins::new(&gpu, SHAPES[2], 2);
    for twin in [&mut first, &mut second] {
        step(&gpu, &mut table, &mut [twin.tensor()], &SETTINGS).unwrap();
        twin.step_here(&SETTINGS);
    }
    first.check(&gpu);
    second.check(&gpu);
}

#[test]
fn nothing_to_update_is_fine() {
    let gpu = gpu(0);
    step(&gpu, &mut Table::new(), &mut [], &SETTINGS).unwrap();
    assert_eq!(norm_squared(&gpu, &mut Table::new(), &[]).unwrap(), 0.0);
}

#[test]
#[should_panic(expected = "adamw: the copy must be [100, 16] or more")]
fn a_copy_that_is_too_small_is_refused() {
    let gpu = gpu(0);
    let mut twin = Twins::new(&gpu, SHAPES[1], 1);
    twin.copy = gpu.alloc(100 * 16 - 1).unwrap();
    let _ = step(&gpu, &mut Table::new(), &mut [twin.tensor()], &SETTINGS);
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
        ("adamw.cu", "it.v[i] = v;", ""),
        (
            "adamw.cu",
            "x += __shfl_xor_sync(ALL_LANES, x, distance);\n    if",
            "x = __shfl_xor_sync(ALL_LANES, x, distance);\n    if",
        ),
        ("adamw.cu", "    __syncthreads();\n    double sum", "    double sum"),
        ("adamw.cu", "i < n; i += THREADS", "i + 1 < n; i += THREADS"),
    ];
    assert_faults_are_caught(
        |gpu| {
            check_steps(gpu);
            check_norm(gpu);
        },
        &faults,
    );
}

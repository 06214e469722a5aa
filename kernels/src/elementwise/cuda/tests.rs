use super::*;
use crate::testing::{SEEDS, assert_faults_are_caught, gpu, random, random_bf16};

/// Both ops round once, so they give the nearest bf16 exactly.
fn check_add(gpu: &Gpu, n: usize) {
    let (x, y) = (random_bf16(n, 1), random_bf16(n, 2));
    let mut sum = gpu.uploaded(&x).unwrap();
    add(gpu, &mut sum, &gpu.uploaded(&y).unwrap()).unwrap_or_else(|error| panic!("{error}"));
    let pairs = x.iter().zip(&y);
    let expected: Vec<bf16> = pairs.map(|(x, y)| bf16::from_f32(x.to_f32() + y.to_f32())).collect();
    assert_eq!(gpu.downloaded(&sum).unwrap(), expected);
}

fn check_scale_rows(gpu: &Gpu, rows: usize, width: usize) {
    let (x, factors) = (random_bf16(rows * width, 1), random(rows, 2));
    let mut y = gpu.alloc(rows * width).unwrap();
    let (on_x, on_factors) = (gpu.uploaded(&x).unwrap(), gpu.uploaded(&factors).unwrap());
    scale_rows(gpu, &on_x, &on_factors, &mut y).unwrap_or_else(|error| panic!("{error}"));
    let expected: Vec<bf16> =
        (0..x.len()).map(|i| bf16::from_f32(factors[i / width] * x[i].to_f32())).collect();
    assert_eq!(gpu.downloaded(&y).unwrap(), expected);
}

fn check_all(gpu: &Gpu) {
    [0, 1, 33, 64, 2 * 2048 + 5].into_iter().for_each(|n| check_add(gpu, n));
    for (rows, width) in [(0, 0), (1, 5), (3, 7), (40, 64), (2, 4104)] {
        check_scale_rows(gpu, rows, width);
    }
}

#[test]
fn each_element_is_met_once_whatever_the_order() {
    SEEDS.into_iter().for_each(|seed| check_all(&gpu(seed)));
}

#[test]
fn planted_faults_are_caught() {
    let faults = [
        ("elementwise.cu", "a[j] += b[j];", "a[j] = b[j];"),
        ("elementwise.cu", "for (; i < n; i++) x[i]", "for (; i <= n; i++) x[i]"),
        ("elementwise.cu", "i < width; i += 256 * 8", "i + 8 < width; i += 256 * 8"),
        ("elementwise.cu", "y += size_t(blockIdx.x) * width;", ""),
    ];
    assert_faults_are_caught(check_all, &faults);
}

use super::super::tests::{frequencies, reference};
use super::*;
use crate::testing::{
    SEEDS, assert_accurate_bf16, assert_faults_are_caught, gpu, random_bf16, random_ids, round,
    widen,
};

/// Widths with halves that are and are not multiples of 8.
const SHAPES: [(usize, usize, usize); 7] =
    [(2, 1, 1), (8, 4, 9), (12, 4, 5), (16, 3, 5), (64, 2, 40), (80, 2, 17), (128, 5, 3)];
const POSITIONS: usize = 500;

fn check(gpu: &Gpu, (head_dim, heads, rows): (usize, usize, usize)) {
    let rope = Rope::new(frequencies(head_dim), 1.25);
    let table = Table::new(gpu, &rope, POSITIONS).unwrap();
    let (x, positions) = (random_bf16(rows * heads * head_dim, 1), random_ids(rows, POSITIONS, 7));
    let on_positions = gpu.uploaded(&positions).unwrap();
    let wide = widen(&x);
    for direction in [1.0, -1.0] {
        let mut y = gpu.uploaded(&x).unwrap();
        let mut plain = wide.clone();
        if direction > 0.0 {
            forward(gpu, &table, &mut y, heads, &on_positions)
                .unwrap_or_else(|error| panic!("{error}"));
            rope.forward(&mut plain, heads, &positions);
        } else {
            backward(gpu, &table, &mut y, heads, &on_positions)
                .unwrap_or_else(|error| panic!("{error}"));
            rope.backward(&mut plain, heads, &positions);
        }
        let y = gpu.downloaded(&y).unwrap();
        let exact = reference(&wide, heads, &positions, &rope, direction);
        assert_accurate_bf16("rotated", &y, &round(&plain), &exact);
        // The same numbers, multiplied and added in the same way but for fused roundings.
        let close = y.iter().zip(&round(&plain)).filter(|(a, b)| a == b).count();
        assert!(close * 100 >= y.len() * 95, "{close} of {} as on the processor", y.len());
    }
}

fn check_all(gpu: &Gpu) {
    SHAPES.into_iter().for_each(|shape| check(gpu, shape));
}

#[test]
fn both_directions_agree_with_f64_whatever_the_order() {
    SEEDS.into_iter().for_each(|seed| check_all(&gpu(seed)));
}

#[test]
fn long_texts_keep_their_angles() {
    let (gpu, rope, last) = (gpu(0), Rope::new(frequencies(16), 1.0), 32_767);
    let table = Table::new(&gpu, &rope, last as usize + 1).unwrap();
    let x = random_bf16(16, 1);
    let mut y = gpu.uploaded(&x).unwrap();
    forward(&gpu, &table, &mut y, 1, &gpu.uploaded(&[last]).unwrap()).unwrap();
    let exact = reference(&widen(&x), 1, &[last], &rope, 1.0);
    let plain: Vec<f32> = exact.iter().map(|x| *x as f32).collect();
    assert_accurate_bf16("rotated", &gpu.downloaded(&y).unwrap(), &round(&plain), &exact);
}

#[test]
fn no_rows_is_fine() {
    let gpu = gpu(0);
    let table = Table::new(&gpu, &Rope::new(frequencies(16), 1.0), 1).unwrap();
    forward(&gpu, &table, &mut gpu.alloc(0).unwrap(), 3, &gpu.alloc(0).unwrap()).unwrap();
}

#[test]
fn a_position_beyond_the_table_gives_nan() {
    check_unknown_position(&gpu(0));
}

fn check_unknown_position(gpu: &Gpu) {
    for head_dim in [4, 16] {
        let table = Table::new(gpu, &Rope::new(frequencies(head_dim), 1.0), 3).unwrap();
        let mut x = gpu.uploaded(&random_bf16(2 * head_dim, 1)).unwrap();
        forward(gpu, &table, &mut x, 1, &gpu.uploaded(&[2, 3]).unwrap()).unwrap();
        let x = gpu.downloaded(&x).unwrap();
        assert!(x[..head_dim].iter().all(|x| x.is_finite()));
        assert!(x[head_dim..].iter().all(|x| x.is_nan()));
    }
}

#[test]
fn planted_faults_are_caught() {
    let faults = [
        ("rope.cu", "if (item >= items) return;", "if (item > items) return;"),
        ("rope.cu", "bool known = position < table_rows;", "bool known = position <= table_rows;"),
        ("rope.cu", "turn(a[i + 1], b[i + 1], two.z", "turn(a[i + 1], b[i + 1], two.x"),
        ("rope.cu", "positions[head / heads]", "positions[head % heads]"),
        ("rope.cu", "store16(at + HALF, pack8(b));", ""),
        (
            "rope.cuh",
            "second = fmaf(second, cosine, __fmul_rn(first, sine));",
            "second += fmaf(second, cosine, __fmul_rn(first, sine));",
        ),
    ];
    assert_faults_are_caught(
        |gpu| {
            check_all(gpu);
            check_unknown_position(gpu);
        },
        &faults,
    );
}

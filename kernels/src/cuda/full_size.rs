//! What works row by row or number by number, over more numbers than a test in the emulation has: numbers that are drawn
//! against f64, all of them written. Each check runs in the emulation, too, at a size that it gets through.

use crate::testing::{
    Endless, Real, assert_accurate_bf16, assert_written, gpu, places, random, random_ids, round,
    widen,
};
use crate::{adamw, elementwise, embedding, rmsnorm, rope, swiglu};
use half::bf16;

const EPS: f32 = 1e-5;

fn wide<R: Real>(x: bf16) -> R {
    R::of(x.to_f64())
}

/// `found` at the places, beside a formula in f32 and in f64.
fn check(what: &str, found: &[bf16], at: &[usize], plain: &[f32], exact: &[f64]) {
    assert_written(what, found);
    let found: Vec<bf16> = at.iter().map(|&i| found[i]).collect();
    assert_accurate_bf16(what, &found, &round(plain), exact);
}

/// out, dgate and dup of element `i`.
fn gated<R: Real>([gate, up, dout]: [&Endless; 3], i: usize) -> [R; 3] {
    let [gate, up, dout] = [gate, up, dout].map(|x| wide::<R>(x.at(i)));
    let one = R::of(1.0);
    let sigma = one / (one + (-gate).exp());
    [gate * sigma * up, dout * up * sigma * (one + gate * (one - sigma)), dout * gate * sigma]
}

fn check_swiglu(n: usize) {
    let gpu = gpu(1);
    let [gate, up, dout] = [1, 2, 3].map(Endless::new);
    let [mut dgate, mut dup, on_dout] = [&gate, &up, &dout].map(|x| x.uploaded(&gpu, n).unwrap());
    let [mut out, mut again] = [0; 2].map(|_| gpu.alloc(n).unwrap());
    swiglu::cuda::forward(&gpu, &dgate, &dup, &mut out).unwrap();
    swiglu::cuda::backward(&gpu, &on_dout, &mut dgate, &mut dup, Some(&mut again)).unwrap();
    assert!(gpu.downloaded(&again).unwrap() == gpu.downloaded(&out).unwrap(), "out once more");
    let at = places(n, 3000, 4);
    let inputs = [&gate, &up, &dout];
    for (which, (name, found)) in
        [("out", out), ("dgate", dgate), ("dup", dup)].into_iter().enumerate()
    {
        let found = gpu.downloaded(&found).unwrap();
        let plain: Vec<f32> = at.iter().map(|&i| gated(inputs, i)[which]).collect();
        let exact: Vec<f64> = at.iter().map(|&i| gated(inputs, i)[which]).collect();
        check(&format!("swiglu {name}, {n}"), &found, &at, &plain, &exact);
    }
}

/// y of row `t`, and dx added to `before`.
fn normed<R: Real>([x, w, dy, before]: [&Endless; 4], t: usize, width: usize) -> [Vec<R>; 2] {
    let at = |from: &Endless, i: usize| wide::<R>(from.at(t * width + i));
    let n = R::of(width as f64);
    let mean = |f: &dyn Fn(usize) -> R| (0..width).fold(R::of(0.0), |sum, i| sum + f(i)) / n;
    let s = R::of(1.0) / (mean(&|i| at(x, i) * at(x, i)) + R::of(EPS.into())).sqrt();
    let gain = |i: usize| wide::<R>(w.at(i));
    let pull = mean(&|i| gain(i) * at(dy, i) * at(x, i));
    let dx = |i| at(before, i) + (s * gain(i) * at(dy, i) - at(x, i) * s * s * s * pull);
    [(0..width).map(|i| gain(i) * (at(x, i) * s)).collect(), (0..width).map(dx).collect()]
}

fn check_rmsnorm(rows: usize, width: usize) {
    let gpu = gpu(2);
    let [x, w, dy, before] = [1, 2, 3, 4].map(Endless::new);
    let n = rows * width;
    let [on_x, on_dy, mut dx] = [&x, &dy, &before].map(|x| x.uploaded(&gpu, n).unwrap());
    let on_w = w.uploaded(&gpu, width).unwrap();
    let (mut y, mut inv_rms) = (gpu.alloc(n).unwrap(), gpu.alloc(rows).unwrap());
    rmsnorm::cuda::forward(&gpu, &on_x, &on_w, EPS, &mut y, &mut inv_rms).unwrap();
    rmsnorm::cuda::backward(&gpu, &on_dy, &on_x, &on_w, &inv_rms, &mut dx).unwrap();
    let some = places(rows, 12, 5);
    let at: Vec<usize> = some.iter().flat_map(|t| t * width..(t + 1) * width).collect();
    for (which, (name, found)) in [("y", y), ("dx", dx)].into_iter().enumerate() {
        let found = gpu.downloaded(&found).unwrap();
        let inputs = [&x, &w, &dy, &before];
        let plain: Vec<f32> =
            some.iter().flat_map(|&t| normed(inputs, t, width)[which].clone()).collect();
        let exact: Vec<f64> =
            some.iter().flat_map(|&t| normed(inputs, t, width)[which].clone()).collect();
        check(&format!("rmsnorm {name}, {rows} x {width}"), &found, &at, &plain, &exact);
    }
}

/// The turned numbers, and those turned back: the processor's table of angles, so only the arithmetic differs.
fn check_rope(rows: usize, heads: usize, head_dim: usize) {
    let gpu = gpu(3);
    let (x, width) = (Endless::new(1), heads * head_dim);
    let half = head_dim / 2;
    let inv_freq: Vec<f64> = (0..half).map(|i| 1e4f64.powf(-(i as f64) / half as f64)).collect();
    let turning = rope::Rope::new(inv_freq, 1.0);
    let table = rope::cuda::Table::new(&gpu, &turning, rows).unwrap();
    let positions: Vec<u32> = (0..rows as u32).collect();
    let on_positions = gpu.uploaded(&positions).unwrap();
    let mut turned = x.uploaded(&gpu, rows * width).unwrap();
    rope::cuda::forward(&gpu, &table, &mut turned, heads, &on_positions).unwrap();
    let found = gpu.downloaded(&turned).unwrap();
    let (mut plain, mut exact, mut at) = (vec![], vec![], vec![]);
    for t in places(rows, 40, 2) {
        let row: Vec<bf16> = (0..width).map(|i| x.at(t * width + i)).collect();
        let mut by_processor = widen(&row);
        turning.forward(&mut by_processor, heads, &positions[t..=t]);
        plain.extend(&by_processor);
        exact.extend(by_processor.into_iter().map(f64::from));
        at.extend(t * width..(t + 1) * width);
    }
    check(&format!("rope, {rows} x {heads} x {head_dim}"), &found, &at, &plain, &exact);
}

/// Rows of a table by number, and a sum of two arrays.
fn check_rows(vocab: usize, width: usize, rows: usize) {
    let gpu = gpu(4);
    let (table, y) = (Endless::new(1), Endless::new(2));
    let ids = random_ids(rows, vocab, 3);
    let on_table = table.uploaded(&gpu, vocab * width).unwrap();
    let on_y = y.uploaded(&gpu, rows * width).unwrap();
    let mut out = gpu.alloc(rows * width).unwrap();
    embedding::cuda::gather(&gpu, &on_table, &gpu.uploaded(&ids).unwrap(), &mut out).unwrap();
    let from = |i: usize| table.at(ids[i / width] as usize * width + i % width);
    let gathered = gpu.downloaded(&out).unwrap();
    assert!(gathered.iter().enumerate().all(|(i, x)| *x == from(i)), "gather, {vocab} x {width}");
    elementwise::cuda::add(&gpu, &mut out, &on_y).unwrap();
    let sum = |i: usize| bf16::from_f32(from(i).to_f32() + y.at(i).to_f32());
    let added = gpu.downloaded(&out).unwrap();
    assert!(added.iter().enumerate().all(|(i, x)| *x == sum(i)), "add, {rows} x {width}");
}

/// Three steps of so many numbers, with the processor's bits.
fn check_adamw(rows: usize, width: usize) {
    use adamw::cuda::{Norm, Table, Tensor, step};
    let gpu = gpu(5);
    let n = 3 * rows * width;
    let tensor = |i: usize| {
        let start = i * rows * width;
        Tensor { start, rows, width, copy_start: start, pitch: width, copy_scale: 2.0 }
    };
    let table = Table::new(&gpu, &[tensor(0), tensor(1), tensor(2)]).unwrap();
    let numbers = random(1009, 1);
    let drawn = |by: usize| -> Vec<f32> { (0..n).map(|i| numbers[i * by % 1009]).collect() };
    let (mut params, grads) = (drawn(1), drawn(5));
    let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
    let mut on = [&params, &m, &v].map(|x| gpu.uploaded(x).unwrap());
    let on_grads = gpu.uploaded(&grads).unwrap();
    let mut copies = gpu.alloc(n).unwrap();
    for number in 1..=3 {
        let settings = adamw::AdamW {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            step: number,
            grad_scale: 0.5,
        };
        let [params_on, m_on, v_on] = &mut on;
        step(&gpu, &table, params_on, &on_grads, m_on, v_on, &mut copies, &settings).unwrap();
        adamw::step(&mut params, &grads, &mut m, &mut v, &settings);
    }
    for (name, (on, expected)) in
        ["params", "m", "v"].into_iter().zip(on.iter().zip([&params, &m, &v]))
    {
        assert!(gpu.downloaded(on).unwrap() == *expected, "adamw: other bits of {name}");
    }
    let expected: Vec<bf16> = params.iter().map(|x| bf16::from_f32(2.0 * x)).collect();
    assert!(gpu.downloaded(&copies).unwrap() == expected, "adamw: copies");
    let mut norm = Norm::new(&gpu, &table).unwrap();
    norm.take(&gpu, &table, &on_grads, 1).unwrap();
    let (found, exact) =
        (norm.read(&gpu).unwrap().0, grads.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>());
    let rounding = n as f64 * f64::EPSILON * exact;
    assert!((found - exact).abs() <= rounding, "norm: {found}, exact {exact}");
}

#[test]
fn drawn_numbers_agree_with_f64() {
    check_swiglu(10_003);
    check_rmsnorm(20, 520);
    check_rope(70, 3, 64);
    check_rows(300, 72, 40);
    check_adamw(40, 72);
}

#[test]
#[ignore = "needs a GPU"]
fn numbers_of_mistral_7b_agree_with_f64() {
    check_swiglu(16_384 * 14_336);
    check_rmsnorm(32_768, 4096);
    check_rmsnorm(524_288, 128);
    check_rope(32_768, 32, 128);
    check_adamw(28_672, 488);
}

/// A table of more than 2³¹ bytes, from which 2²⁷ numbers are read.
#[test]
#[ignore = "needs a GPU"]
fn large_tables_are_read_in_the_right_place() {
    check_rows(152_064, 8192, 16_384);
}

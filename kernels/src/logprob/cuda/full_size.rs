//! The head at the largest vocabularies: tokens that are drawn against f64, all of them written, and two runs with the same
//! bits. The check runs in the emulation, too, at a size that it gets through.

use super::*;
use crate::testing::{
    Endless, Real, assert_accurate, assert_accurate_bf16, assert_written, gpu, places, random_ids,
    round,
};
use rayon::prelude::*;

/// What one token comes to: its log-prob, and its gradient at some columns.
fn token<R: Real + Send + Sync>(
    (hidden, weight): (&Endless, &Endless),
    (t, target): (usize, usize),
    (vocab, width): (usize, usize),
    columns: &[usize],
    round: fn(R) -> R,
) -> (R, Vec<R>) {
    let wide = |x: bf16| R::of(x.to_f64());
    let logit = |v: usize| {
        (0..width).fold(R::of(0.0), |sum, i| {
            sum + wide(hidden.at(t * width + i)) * wide(weight.at(v * width + i))
        })
    };
    let logits: Vec<R> = (0..vocab).into_par_iter().map(logit).collect();
    let top = logits.iter().copied().fold(logits[0], |a, b| if b > a { b } else { a });
    let sum = logits.iter().fold(R::of(0.0), |sum, x| sum + (*x - top).exp());
    let lse = top + sum.ln();
    let slope = |v: usize| round(R::of(f64::from(u8::from(v == target))) - (logits[v] - lse).exp());
    let slopes: Vec<R> = (0..vocab).map(slope).collect();
    let pulled = |&i: &usize| {
        let terms = slopes.iter().enumerate();
        terms.fold(R::of(0.0), |sum, (v, s)| sum + *s * wide(weight.at(v * width + i)))
    };
    (logits[target] - lse, columns.iter().map(pulled).collect())
}

fn check(n: usize, vocab: usize, width: usize, tokens: usize) {
    let gpu = gpu(1);
    // Logits of a few units.
    let (hidden, weight) = (Endless::new(1), Endless::scaled(2, 2.0 / (width as f32).sqrt()));
    let targets = random_ids(n, vocab, 3);
    let on_hidden = hidden.uploaded(&gpu, n * width).unwrap();
    let on_weight = weight.uploaded(&gpu, padded(vocab) * width).unwrap();
    let on_targets = gpu.uploaded(&targets).unwrap();
    let head = Head { weight: &on_weight, vocab, hidden: width, adapter: None, tokens };
    let arena = Arena::new(&gpu, 2 * tokens * padded(vocab)).unwrap();
    let run = || {
        let (mut logp, mut unit) = (gpu.alloc(n).unwrap(), gpu.alloc(n * width).unwrap());
        let (hidden, targets) = (&on_hidden, &on_targets);
        forward_with_gradient(&gpu, &arena, hidden, targets, &head, &mut logp, &mut unit).unwrap();
        let with_gradient = gpu.downloaded(&logp).unwrap();
        forward(&gpu, &arena, hidden, targets, &head, &mut logp).unwrap();
        assert!(gpu.downloaded(&logp).unwrap() == with_gradient, "without the gradient");
        (with_gradient, gpu.downloaded(&unit).unwrap())
    };
    let (logp, unit) = run();
    assert!(run() == (logp.clone(), unit.clone()), "another run has other bits");
    assert_written("unit_grad", &unit);
    assert!(logp.iter().all(|x| x.is_finite()), "logp is not written");

    let (rows, columns) = (places(n, 6, 4), places(width, 48, 5));
    let all = (vocab, width);
    let to_bf16: fn(f32) -> f32 = |x| bf16::from_f32(x).to_f32();
    let of = |t: usize| (t, targets[t] as usize);
    let numbers = (&hidden, &weight);
    let plain: Vec<_> =
        rows.iter().map(|&t| token::<f32>(numbers, of(t), all, &columns, to_bf16)).collect();
    let exact: Vec<_> =
        rows.iter().map(|&t| token::<f64>(numbers, of(t), all, &columns, |x| x)).collect();
    let what = format!("{n} tokens of {vocab}");
    let found: Vec<f32> = rows.iter().map(|&t| logp[t]).collect();
    let [plain_logp, exact_logp] = [
        plain.iter().map(|(logp, _)| f64::from(*logp)).collect::<Vec<f64>>(),
        exact.iter().map(|(logp, _)| *logp).collect(),
    ];
    let plain_logp: Vec<f32> = plain_logp.iter().map(|x| *x as f32).collect();
    assert_accurate(&format!("logp, {what}"), &found, &plain_logp, &exact_logp);
    let pick = |&t: &usize| columns.iter().map(move |i| t * width + i);
    let found: Vec<bf16> = rows.iter().flat_map(pick).map(|at| unit[at]).collect();
    let plain: Vec<f32> = plain.into_iter().flat_map(|(_, unit)| unit).collect();
    let exact: Vec<f64> = exact.into_iter().flat_map(|(_, unit)| unit).collect();
    assert_accurate_bf16(&format!("unit_grad, {what}"), &found, &round(&plain), &exact);
}

#[test]
fn drawn_tokens_agree_with_f64() {
    check(70, 1003, 72, 32);
}

#[test]
#[ignore = "needs a GPU"]
fn vocabularies_of_32k_and_152k_agree_with_f64() {
    check(16_384, 32_000, 4096, 1024);
    check(2048, 152_064, 4096, 1024);
    check(1024, 151_643, 3584, 1024);
}

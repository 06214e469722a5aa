use super::*;
use crate::testing::{Real, assert_accurate, assert_is_slope, cast, poison, random, random_ids};

pub(super) struct Case {
    pub hidden: Vec<f32>,
    pub targets: Vec<u32>,
    pub weight: Vec<f32>,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub dlogp: Vec<f32>,
    pub vocab: usize,
    pub width: usize,
    pub rank: usize,
    chunk: Chunk,
}

pub(super) const SCALE: f32 = 0.5;

impl Case {
    /// `rank` 0 means no adapter.
    pub fn new(n: usize, vocab: usize, width: usize, rank: usize) -> Self {
        let small = |n, seed| -> Vec<f32> { random(n, seed).iter().map(|x| 0.3 * x).collect() };
        Self {
            hidden: random(n * width, 1),
            targets: random_ids(n, vocab, 2),
            weight: small(vocab * width, 3),
            a: small(rank * width, 4),
            b: small(vocab * rank, 5),
            dlogp: random(n, 6),
            vocab,
            width,
            rank,
            chunk: Chunk::FUSED,
        }
    }

    fn head(&self) -> Head<'_> {
        Head {
            weight: (&self.weight).into(),
            vocab: self.vocab,
            hidden: self.width,
            adapter: (self.rank > 0).then_some(LowRank {
                a: &self.a,
                b: &self.b,
                rank: self.rank,
                scale: SCALE,
            }),
            chunk: self.chunk,
        }
    }

    /// Room for the logits of `n` rows.
    fn room(&self, n: usize) -> Vec<f32> {
        poison(self.head().chunk_len(n))
    }

    pub fn reference<R: Real>(&self) -> Reference<R> {
        self.reference_at(&cast(&self.hidden), &cast(&self.a), &cast(&self.b))
    }

    /// Everything from whole logits, one row at a time.
    fn reference_at<R: Real>(&self, hidden: &[R], a: &[R], b: &[R]) -> Reference<R> {
        let (width, rank, vocab) = (self.width, self.rank, self.vocab);
        let weight: Vec<R> = cast(&self.weight);
        let scale = R::of(f64::from(SCALE));
        let zero = R::of(0.0);
        let inner = |x: &[R], y: &[R]| {
            let mut sum = zero;
            x.iter().zip(y).for_each(|(x, y)| sum += *x * *y);
            sum
        };
        let mut result = Reference {
            logits: Vec::new(),
            logp: Vec::new(),
            unit_grad: Vec::new(),
            da: vec![zero; a.len()],
            db: vec![zero; b.len()],
        };
        for (t, h) in hidden.chunks(width).enumerate() {
            let low: Vec<R> = (0..rank).map(|i| inner(&a[i * width..(i + 1) * width], h)).collect();
            let logits: Vec<R> = (0..vocab)
                .map(|v| {
                    let added = scale * inner(&b[v * rank..(v + 1) * rank], &low);
                    inner(&weight[v * width..(v + 1) * width], h) + added
                })
                .collect();
            let top = logits.iter().fold(logits[0], |a, b| if *b > a { *b } else { a });
            let mut sum = zero;
            logits.iter().for_each(|x| sum += (*x - top).exp());
            let target = self.targets[t] as usize;
            result.logp.push(logits[target] - top - sum.ln());
            let mut unit = vec![zero; width];
            for v in 0..vocab {
                let chosen = R::of(if v == target { 1.0 } else { 0.0 });
                let slope = chosen - (logits[v] - top).exp() / sum;
                let dlogit = R::of(f64::from(self.dlogp[t])) * slope;
                for i in 0..width {
                    unit[i] += slope * weight[v * width + i];
                }
                for l in 0..rank {
                    result.db[v * rank + l] += dlogit * scale * low[l];
                    for i in 0..width {
                        unit[i] += slope * scale * b[v * rank + l] * a[l * width + i];
                        result.da[l * width + i] += dlogit * scale * b[v * rank + l] * h[i];
                    }
                }
            }
            result.unit_grad.extend(unit);
            result.logits.extend(logits);
        }
        result
    }
}

pub(super) struct Reference<R> {
    pub logits: Vec<R>,
    pub logp: Vec<R>,
    pub unit_grad: Vec<R>,
    pub da: Vec<R>,
    pub db: Vec<R>,
}

fn check(case: &Case) {
    let (n, head) = (case.targets.len(), case.head());
    let chunk = &mut case.room(n);
    let (plain, exact) = (case.reference::<f32>(), case.reference::<f64>());

    let mut logp = poison(n);
    forward(&case.hidden, &case.targets, &head, chunk, &mut logp);
    assert_accurate("logp", &logp, &plain.logp, &exact.logp);

    let (mut again, mut unit_grad) = (poison(n), poison(n * case.width));
    forward_with_gradient(&case.hidden, &case.targets, &head, chunk, &mut again, &mut unit_grad);
    assert_eq!(again, logp, "with and without the gradient, the same bits");
    assert_accurate("unit_grad", &unit_grad, &plain.unit_grad, &exact.unit_grad);

    let mut logits = poison(n * case.vocab);
    forward_logits(&case.hidden, &head, &mut logits);
    assert_accurate("logits", &logits, &plain.logits, &exact.logits);

    if case.rank > 0 {
        let (mut da, mut db) = (vec![0.0; case.a.len()], vec![0.0; case.b.len()]);
        let Case { hidden, targets, dlogp, .. } = case;
        adapter_backward(hidden, targets, &head, chunk, &logp, dlogp, &mut da, &mut db);
        assert_accurate("da", &da, &plain.da, &exact.da);
        assert_accurate("db", &db, &plain.db, &exact.db);
        let (first_da, first_db) = (da.clone(), db.clone());
        adapter_backward(hidden, targets, &head, chunk, &logp, dlogp, &mut da, &mut db);
        let doubled =
            |x: &[f32], y: &[f32]| x.iter().zip(y).all(|(x, y)| (x - 2.0 * y).abs() < 1e-4);
        assert!(doubled(&da, &first_da) && doubled(&db, &first_db), "gradients accumulate");
    }
}

#[test]
fn agrees_with_f64() {
    for (n, vocab, width) in [(1, 1, 1), (4, 300, 7), (5, 33, 64), (40, 1000, 20)] {
        for rank in [0, 1, 8] {
            check(&Case::new(n, vocab, width, rank));
        }
    }
}

#[test]
fn agrees_with_f64_over_many_chunks() {
    // Two ranges of rows; in the first, three of the vocabulary.
    let Chunk { rows, columns } = Chunk::FUSED;
    check(&Case::new(rows + 3, 2 * columns + 100, 3, 2));
    check(&Case { chunk: Chunk { rows: 7, columns: 16 }, ..Case::new(20, 50, 5, 2) });
}

#[test]
fn agrees_with_f64_in_one_piece() {
    let case = Case { chunk: Chunk::WHOLE, ..Case::new(600, 9000, 3, 2) };
    assert_eq!(case.room(600).len(), 600 * 9000);
    check(&case);
}

/// The sum over the vocabulary is cut at the same entries however many rows there are.
#[test]
fn company_changes_no_bit_of_a_row() {
    let Chunk { rows, columns } = Chunk::FUSED;
    let case = Case::new(rows, columns + 100, 70, 0);
    let run = |n: usize| {
        let (mut logp, mut unit_grad) = (poison(n), poison(n * case.width));
        let hidden = &case.hidden[..n * case.width];
        let (targets, head, chunk) = (&case.targets[..n], case.head(), &mut case.room(n));
        forward_with_gradient(hidden, targets, &head, chunk, &mut logp, &mut unit_grad);
        (logp, unit_grad)
    };
    let (logp, unit_grad) = run(rows);
    let few = run(16);
    assert_eq!((few.0.as_slice(), few.1.as_slice()), (&logp[..16], &unit_grad[..16 * 70]));
}

#[test]
fn the_reference_gradient_is_the_slope() {
    let case = Case::new(3, 7, 4, 2);
    let [hidden, a, b] = [&case.hidden, &case.a, &case.b].map(|x| cast::<f64>(x));
    let loss = |hidden: &[f64], a: &[f64], b: &[f64]| -> f64 {
        let logp = case.reference_at(hidden, a, b).logp;
        logp.iter().zip(&case.dlogp).map(|(logp, d)| logp * f64::from(*d)).sum()
    };
    let found = case.reference_at(&hidden, &a, &b);
    let dhidden: Vec<f64> = (0..hidden.len())
        .map(|i| found.unit_grad[i] * f64::from(case.dlogp[i / case.width]))
        .collect();
    assert_is_slope(|hidden| loss(hidden, &a, &b), &hidden, &dhidden);
    assert_is_slope(|a| loss(&hidden, a, &b), &a, &found.da);
    assert_is_slope(|b| loss(&hidden, &a, b), &b, &found.db);
}

#[test]
fn a_certain_token_has_no_gradient() {
    let weight = [60.0, 0.0, -60.0];
    let weight = weight.as_slice().into();
    let head = Head { weight, vocab: 3, hidden: 1, adapter: None, chunk: Chunk::FUSED };
    let (mut logp, mut unit_grad) = (poison(2), poison(2));
    let chunk = &mut poison(6);
    forward_with_gradient(&[1.0, 1.0], &[0, 2], &head, chunk, &mut logp, &mut unit_grad);
    assert_eq!((logp[0], unit_grad[0]), (0.0, 0.0));
    assert_eq!((logp[1], unit_grad[1]), (-120.0, -120.0));
}

#[test]
fn the_same_call_twice_gives_the_same_bits() {
    let case = Case::new(70, 900, 33, 4);
    let run = || {
        let (mut logp, mut unit_grad) = (poison(70), poison(70 * 33));
        let (Case { hidden, targets, .. }, chunk) = (&case, &mut case.room(70));
        forward_with_gradient(hidden, targets, &case.head(), chunk, &mut logp, &mut unit_grad);
        (logp, unit_grad)
    };
    let first = run();
    assert!((0..5).all(|_| run() == first));
}

#[test]
fn no_rows_is_fine() {
    let case = Case::new(0, 5, 3, 0);
    forward_with_gradient(&[], &[], &case.head(), &mut case.room(0), &mut [], &mut []);
}

#[test]
#[should_panic(expected = "logprob: target 5 in a vocabulary of 5")]
fn a_target_outside_the_vocabulary_is_named() {
    let case = Case::new(1, 5, 3, 0);
    forward(&case.hidden, &[5], &case.head(), &mut case.room(1), &mut [0.0]);
}

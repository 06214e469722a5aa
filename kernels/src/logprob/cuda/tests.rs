use super::super::tests::{Case, SCALE};
use super::*;
use crate::testing::{
    SEEDS, assert_accurate, assert_accurate_bf16, assert_faults_are_caught,
    assert_faults_are_caught_on_hopper, gpu, hopper_gpu, round, widen,
};

/// A case with its numbers rounded to bf16, on the device.
struct OnDevice {
    case: Case,
    hidden: DeviceBuffer<bf16>,
    targets: DeviceBuffer<u32>,
    weight: DeviceBuffer<bf16>,
    a: DeviceBuffer<bf16>,
    b: DeviceBuffer<bf16>,
    dlogp: DeviceBuffer<f32>,
    arena: Arena,
    tokens: usize,
}

/// What a head on the device comes to.
#[derive(Clone, Debug, PartialEq)]
struct Results {
    logp: Vec<f32>,
    unit_grad: Vec<bf16>,
    /// Of an adapter.
    da: Vec<f32>,
    db: Vec<f32>,
}

struct Plain {
    logits: Vec<f32>,
    logp: Vec<f32>,
    unit_grad: Vec<f32>,
    da: Vec<f32>,
    db: Vec<f32>,
}

impl OnDevice {
    /// `rank` 0 means no adapter; `tokens`: most at a time.
    fn new(gpu: &Gpu, n: usize, vocab: usize, width: usize, rank: usize, tokens: usize) -> Self {
        let mut case = Case::new(n, vocab, width, rank);
        for numbers in [&mut case.hidden, &mut case.weight, &mut case.a, &mut case.b] {
            *numbers = widen(&round(numbers));
        }
        Self::of(gpu, case, tokens)
    }

    fn of(gpu: &Gpu, case: Case, tokens: usize) -> Self {
        let (width, rank, entries) = (case.width, case.rank, padded(case.vocab));
        let pitch = adapter::padded(rank);
        let mut weight = round(&case.weight);
        weight.resize(entries * width, bf16::ZERO);
        let mut a = round(&case.a);
        a.resize(pitch * width, bf16::ZERO);
        let mut b = vec![bf16::ZERO; entries * pitch];
        for (row, values) in case.b.chunks(rank.max(1)).enumerate() {
            for (to, value) in b[row * pitch..].iter_mut().zip(values) {
                *to = bf16::from_f32(SCALE * value);
            }
        }
        Self {
            hidden: gpu.uploaded(&round(&case.hidden)).unwrap(),
            targets: gpu.uploaded(&case.targets).unwrap(),
            weight: gpu.uploaded(&weight).unwrap(),
            a: gpu.uploaded(&a).unwrap(),
            b: gpu.uploaded(&b).unwrap(),
            dlogp: gpu.uploaded(&case.dlogp).unwrap(),
            arena: Arena::new(gpu, 64 << 20).unwrap(),
            case,
            tokens,
        }
    }

    fn head(&self) -> Head<'_> {
        let Case { vocab, width, rank, .. } = self.case;
        let adapter = LowRank { a: &self.a, b: &self.b, rank, scale: SCALE };
        let adapter = (rank > 0).then_some(adapter);
        Head { weight: &self.weight, vocab, hidden: width, adapter, tokens: self.tokens }
    }

    fn log_probs(&self, gpu: &Gpu) -> Result<Vec<f32>> {
        let mut logp = gpu.alloc(self.case.targets.len())?;
        forward(gpu, &self.arena, &self.hidden, &self.targets, &self.head(), &mut logp)?;
        gpu.downloaded(&logp)
    }

    fn run(&self, gpu: &Gpu) -> Result<Results> {
        let (case, head) = (&self.case, self.head());
        let (arena, hidden, targets) = (&self.arena, &self.hidden, &self.targets);
        let mut logp = gpu.alloc(case.targets.len())?;
        let mut unit_grad = gpu.alloc(hidden.len())?;
        forward_with_gradient(gpu, arena, hidden, targets, &head, &mut logp, &mut unit_grad)?;
        // Gradients are added to: 1 is there before.
        let mut da = gpu.uploaded(&vec![1.0; case.a.len()])?;
        let mut db = gpu.uploaded(&vec![1.0; padded(case.vocab) * case.rank])?;
        if case.rank > 0 {
            let dlogp = &self.dlogp;
            adapter_backward(gpu, arena, hidden, targets, &head, dlogp, &mut da, &mut db)?;
        }
        let (da, mut db) = (gpu.downloaded(&da)?, gpu.downloaded(&db)?);
        let rest = db.split_off(case.b.len());
        assert!(rest.iter().all(|x| *x == 1.0), "no gradient beyond the vocabulary");
        Ok(Results { logp: gpu.downloaded(&logp)?, unit_grad: gpu.downloaded(&unit_grad)?, da, db })
    }

    /// The formula in f32, with what is kept in bf16 rounded: A h, the slopes of the logits, these times B.
    fn plain(&self) -> Plain {
        let Case { hidden, targets, weight, a, b, dlogp, vocab, width, rank, .. } = &self.case;
        let (vocab, width, rank) = (*vocab, *width, *rank);
        let rounded = |x: f32| bf16::from_f32(x).to_f32();
        let inner = |x: &[f32], y: &[f32]| -> f32 { x.iter().zip(y).map(|(x, y)| x * y).sum() };
        // Σ slopes[v] matrix[v, i]
        let pull = |slopes: &[f32], matrix: &[f32], i: usize, width: usize| -> f32 {
            (0..vocab).map(|v| slopes[v] * matrix[v * width + i]).sum()
        };
        let mut plain = Plain {
            logits: vec![],
            logp: vec![],
            unit_grad: vec![],
            da: vec![0.0; a.len()],
            db: vec![0.0; b.len()],
        };
        for (t, h) in hidden.chunks(width).enumerate() {
            let low: Vec<f32> =
                (0..rank).map(|l| rounded(inner(&a[l * width..(l + 1) * width], h))).collect();
            let logits: Vec<f32> = (0..vocab)
                .map(|v| {
                    let added = SCALE * inner(&b[v * rank..(v + 1) * rank], &low);
                    inner(&weight[v * width..(v + 1) * width], h) + added
                })
                .collect();
            let top = logits.iter().copied().fold(f32::MIN, f32::max);
            let log_sum = logits.iter().map(|x| (x - top).exp()).sum::<f32>().ln();
            let target = targets[t] as usize;
            plain.logp.push((logits[target] - top) - log_sum);
            let slopes = |factor: f32| -> Vec<f32> {
                let slope =
                    |v: usize| f32::from(u8::from(v == target)) - (logits[v] - top - log_sum).exp();
                (0..vocab).map(|v| rounded(factor * slope(v))).collect()
            };
            let pulled = |slopes: &[f32]| -> Vec<f32> {
                (0..rank).map(|l| rounded(SCALE * pull(slopes, b, l, rank))).collect()
            };
            let unit = slopes(1.0);
            let of_unit = pulled(&unit);
            plain.unit_grad.extend((0..width).map(|i| {
                let adapted = (0..rank).map(|l| of_unit[l] * a[l * width + i]);
                pull(&unit, weight, i, width) + adapted.sum::<f32>()
            }));
            plain.logits.extend(&logits);
            let of_loss = slopes(dlogp[t]);
            for (l, pulled) in pulled(&of_loss).into_iter().enumerate() {
                (0..width).for_each(|i| plain.da[l * width + i] += pulled * h[i]);
                (0..vocab).for_each(|v| plain.db[v * rank + l] += SCALE * of_loss[v] * low[l]);
            }
        }
        plain
    }

    fn check(&self, gpu: &Gpu) -> Results {
        let found = self.run(gpu).unwrap_or_else(|error| panic!("{error}"));
        let log_probs = self.log_probs(gpu).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(log_probs, found.logp, "with and without the gradient, the same bits");
        let plain = self.plain();
        let exact = self.case.reference::<f64>();
        assert_accurate("logp", &found.logp, &plain.logp, &exact.logp);
        let rounded = round(&plain.unit_grad);
        assert_accurate_bf16("unit_grad", &found.unit_grad, &rounded, &exact.unit_grad);
        let less_one = |x: &[f32]| -> Vec<f32> { x.iter().map(|x| x - 1.0).collect() };
        assert_accurate("da", &less_one(&found.da), &plain.da, &exact.da);
        assert_accurate("db", &less_one(&found.db), &plain.db, &exact.db);
        found
    }
}

/// Tokens, entries, width, rank, tokens at a time: within one tile and past the edges of several,
/// vocabularies that are no multiples of 8, widths within a slice and past the ring.
const SHAPES: [(usize, usize, usize, usize, usize); 10] = [
    (1, 1, 8, 0, 128),
    (3, 40, 16, 1, 128),
    (5, 33, 64, 8, 128),
    (130, 131, 24, 16, 256),
    (70, 300, 40, 0, 32),
    (37, 150, 72, 40, 20),
    (20, 520, 8, 4, 7),
    (20, 70, 264, 4, 32),
    (33, 70, 264, 0, 20),
    (3, 333, 1032, 0, 2),
];

#[test]
fn agrees_with_f64_with_the_same_bits_whatever_the_order() {
    agrees_in_every_order(gpu);
}

#[test]
fn on_hopper_agrees_with_f64_with_the_same_bits_whatever_the_order() {
    agrees_in_every_order(hopper_gpu);
}

fn agrees_in_every_order(device: fn(u64) -> Gpu) {
    for (n, vocab, width, rank, tokens) in SHAPES {
        let run = |seed| {
            let gpu = device(seed);
            OnDevice::new(&gpu, n, vocab, width, rank, tokens).check(&gpu)
        };
        let first = run(0);
        assert!(SEEDS.into_iter().all(|seed| run(seed) == first), "{n} {vocab} {width} {rank}");
    }
}

#[test]
fn whole_logits_agree_with_f64() {
    let gpu = gpu(3);
    for (n, vocab, width, rank) in [(1, 33, 40, 0), (5, 70, 264, 4), (20, 131, 24, 16)] {
        let on_device = OnDevice::new(&gpu, n, vocab, width, rank, 128);
        let entries = padded(vocab);
        let mut logits = gpu.alloc(n * entries).unwrap();
        let OnDevice { arena, hidden, .. } = &on_device;
        forward_logits(&gpu, arena, hidden, &on_device.head(), &mut logits).unwrap();
        let logits = gpu.downloaded(&logits).unwrap();
        assert!(logits.chunks(entries).all(|row| row[vocab..].iter().all(|x| x.to_f32() == 0.0)));
        let found: Vec<bf16> =
            logits.chunks(entries).flat_map(|row| &row[..vocab]).copied().collect();
        let exact = on_device.case.reference::<f64>().logits;
        assert_accurate_bf16("logits", &found, &round(&on_device.plain().logits), &exact);
    }
}

/// What packing, and the file of reference log-probs, rest on.
#[test]
fn company_and_division_change_no_bit_of_a_row() {
    for gpu in [gpu(1), hopper_gpu(1)] {
        check_company(&gpu);
    }
}

fn check_company(gpu: &Gpu) {
    let all = OnDevice::new(gpu, 140, 200, 40, 8, 256).run(gpu).unwrap();
    for (n, tokens) in [(1, 128), (17, 128), (17, 5), (129, 128), (140, 100)] {
        let some = OnDevice::new(gpu, n, 200, 40, 8, tokens);
        let mut few = OnDevice::new(gpu, 140, 200, 40, 8, tokens).case;
        few.hidden.truncate(n * 40);
        few.targets.truncate(n);
        few.dlogp.truncate(n);
        let found = OnDevice::of(gpu, few, some.tokens).run(gpu).unwrap();
        assert_eq!(found.logp, all.logp[..n]);
        assert_eq!(found.unit_grad, all.unit_grad[..n * 40]);
    }
}

/// At step 0 the policy is its own reference.
#[test]
fn a_fresh_adapter_and_none_give_the_same_bits() {
    let gpu = gpu(2);
    let mut case = OnDevice::new(&gpu, 30, 140, 48, 16, 128).case;
    case.b.fill(0.0);
    let fresh = OnDevice::of(&gpu, case, 128).run(&gpu).unwrap();
    let none = OnDevice::new(&gpu, 30, 140, 48, 0, 128).run(&gpu).unwrap();
    assert_eq!(fresh.logp, none.logp);
    assert_eq!(fresh.unit_grad, none.unit_grad);
}

/// A hidden width of 8 of which one number counts, so that the logits are `first`, `second` and `third`.
fn three_logits(gpu: &Gpu, logits: [f32; 3], targets: &[u32]) -> Results {
    let mut case = Case::new(targets.len(), 3, 8, 0);
    case.targets = targets.to_vec();
    case.hidden.fill(0.0);
    case.weight.fill(0.0);
    case.hidden.iter_mut().step_by(8).for_each(|x| *x = 1.0);
    for (entry, logit) in logits.into_iter().enumerate() {
        case.weight[entry * 8] = logit;
    }
    OnDevice::of(gpu, case, 128).run(gpu).unwrap()
}

#[test]
fn a_certain_token_has_no_gradient() {
    let found = three_logits(&gpu(0), [60.0, 0.0, -60.0], &[0, 2]);
    assert_eq!((found.logp[0], found.unit_grad[0].to_f32()), (0.0, 0.0));
    assert_eq!((found.logp[1], found.unit_grad[8].to_f32()), (-120.0, -120.0));
}

/// Strips of one token with logits beyond what weights are made for, above and below, beside moderate ones.
fn check_far_apart(gpu: &Gpu, spread: f32) {
    let mut case = OnDevice::new(gpu, 9, 200, 72, 0, 128).case;
    // Every strip has a height of its own, which every token meets with a sign and a size of its own.
    for (v, row) in case.weight.chunks_mut(72).enumerate() {
        row[0] = [1.0, 0.875, -1.0, 0.25][v / 64];
    }
    for (t, row) in case.hidden.chunks_mut(72).enumerate() {
        row[0] = spread * (t as f32 - 4.0) / 4.0;
    }
    case.hidden = widen(&round(&case.hidden));
    OnDevice::of(gpu, case, 128).check(gpu);
}

#[test]
fn logits_far_apart_agree_with_f64() {
    for gpu in [gpu(1), hopper_gpu(1)] {
        for spread in [6.0, 40.0, 90.0] {
            check_far_apart(&gpu, spread);
        }
    }
}

/// 1 - p of a token with p = 0.9999 comes from f32, not from a p in bf16, which would be 1.
#[test]
fn a_nearly_certain_token_keeps_its_small_gradient() {
    let found = three_logits(&gpu(0), [1.0, -8.25, -100.0], &[0]);
    let p_other = (-9.25f64).exp() / (1.0 + (-9.25f64).exp());
    let expected = p_other * 1.0 - p_other * -8.25;
    assert!((f64::from(found.unit_grad[0].to_f32()) / expected - 1.0).abs() < 0.01);
    assert!((f64::from(found.logp[0]) + p_other).abs() < 1e-6);
}

#[test]
fn no_rows_is_fine() {
    let gpu = gpu(0);
    let found = OnDevice::new(&gpu, 0, 5, 8, 2, 128).run(&gpu).unwrap();
    assert!(found.logp.is_empty() && found.da.iter().all(|x| *x == 1.0));
}

#[test]
fn a_target_outside_the_vocabulary_gives_nan() {
    let gpu = gpu(0);
    let mut case = OnDevice::new(&gpu, 3, 5, 8, 0, 128).case;
    case.targets[1] = 5;
    let logp = OnDevice::of(&gpu, case, 128).log_probs(&gpu).unwrap();
    assert!(logp[0].is_finite() && logp[1].is_nan() && logp[2].is_finite());
}

#[test]
#[should_panic(expected = "logprob: a hidden width of 12, it must be a multiple of 8")]
fn an_odd_width_is_refused() {
    let gpu = gpu(0);
    let _ = OnDevice::new(&gpu, 1, 5, 12, 0, 128).run(&gpu);
}

#[test]
#[should_panic(expected = "logprob: W must be [40, 8]")]
fn a_weight_that_is_not_filled_up_is_refused() {
    let gpu = gpu(0);
    let mut on_device = OnDevice::new(&gpu, 1, 33, 8, 0, 128);
    on_device.weight = gpu.alloc(33 * 8).unwrap();
    let _ = on_device.run(&gpu);
}

#[test]
fn planted_faults_are_caught() {
    let faults = [
        (
            "product.cuh",
            "        __syncthreads();\n        load(slice + STAGES - 1);",
            "        load(slice + STAGES - 1);",
        ),
        ("product.cuh", "copy_async_wait<STAGES - 2>();", "copy_async_wait<STAGES - 1>();"),
        ("logprob.cu", "if (column >= vocab) logit", "if (column > vocab) logit"),
        ("logprob.cu", "sum += low + high;", "sum = low + high;"),
        ("logprob.cu", "sum = quad_sum(sum);", ""),
        (
            "logprob.cu",
            "strip < strip_count; strip += WARP",
            "strip + 1 < strip_count; strip += WARP",
        ),
        ("logprob.cu", "column < pitch)\n", "column < vocab)\n"),
        ("logprob.cu", "to_bf16(-factor * expm1f", "to_bf16(factor * expm1f"),
        ("logprob.cu", "row < tokens ? int(targets[row]) : -1", "int(targets[row])"),
        ("logprob.cu", "column + 1 == target ? 0.0f", "column == target ? 0.0f"),
        ("logprob.cu", "threadIdx.x == target / 8 % 256)", "threadIdx.x == target / 16)"),
        ("logprob.cu", "weight_shift(of_row[column / STRIP].x) - shift", "0.0f"),
        ("logprob.cuh", "<= MODERATE ? 0.0f", "<= 200.0f ? 0.0f"),
    ];
    let check = |gpu: &Gpu| {
        check_far_apart(gpu, 90.0);
        OnDevice::new(gpu, 130, 131, 24, 16, 256).check(gpu);
        OnDevice::new(gpu, 20, 70, 264, 4, 32).check(gpu);
    };
    assert_faults_are_caught(check, &faults);
}

#[test]
fn faults_in_hoppers_strips_are_caught() {
    let faults = [
        ("return at < vocab ?", "return at <= vocab ?"),
        ("sum[half] += low + high;", "sum[half] = low + high;"),
        ("largest[half] = quad_max(largest[half]);", ""),
        ("== target[half])", "== target[0])"),
        ("if (keeps) {\n                await_place(part, piece == 0);", "if (keeps) {"),
        ("if (quad == 0 && first_row + 8 * half < tokens)", "if (quad == 0)"),
        ("first / STRIP;", "piece;"),
        ("of_target == 1 ? 0.0f", "of_target == 0 ? 0.0f"),
        // The way back.
        ("doubt[half] * target.y", "doubt[half] * target.x"),
        ("scale[half] = scales[at];", "scale[half] = scales[0];"),
        ("-expm1f(logp[at])", "logp[at]"),
        (", tokens - 1);", ", tokens);"),
        ("if (at < hidden) target", "target"),
    ];
    let check = |gpu: &Gpu| {
        OnDevice::new(gpu, 130, 331, 24, 16, 256).check(gpu);
        // A target in the last row of W, behind which nothing is.
        let mut case = OnDevice::new(gpu, 20, 80, 264, 0, 32);
        case.case.targets[3] = 79;
        case.targets = gpu.uploaded(&case.case.targets).unwrap();
        case.check(gpu);
    };
    let faults = faults.map(|(from, to)| ("hopper_logprob.cu", from, to));
    assert_faults_are_caught_on_hopper(check, &faults);
}

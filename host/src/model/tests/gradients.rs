//! The way back against differences of the way forward, and its short cuts against the whole way.

use super::*;

/// A batch with shared prompts, rows that nothing reads, and two segments in one branch.
pub(super) fn batch(name: &str) -> Packed {
    let responses = expected(name, "responses.json");
    let rows = responses["pairs"].as_array().unwrap();
    let mut groups: Vec<Group> = rows[..3].iter().map(shared_group).collect();
    let branch = &mut groups[1].branches[0];
    let end = branch.tokens.len() - 1;
    let segment = |trained| Segment { feedback: Feedback::Demonstration, trained };
    branch.segments =
        vec![segment(vec![0..2, 3..4]), segment(std::iter::once(end - 2..end).collect())];
    pack(&groups)
}

/// A fresh adapter with a B that isn't zero.
pub(super) fn adapter(model: &Decoder, targets: &str) -> Lora {
    let config = LoraConfig {
        rank: 3,
        alpha: 4.0,
        targets: targets::Targets::from_text(targets),
        ..LoraConfig::default()
    };
    let mut lora = Lora::init(&config, &model.config, 3).unwrap();
    let other = Lora::init(&config, &model.config, 4).unwrap();
    for (adapter, other) in lora.adapters.iter_mut().zip(&other.adapters) {
        for (i, b) in adapter.b.iter_mut().enumerate() {
            *b = 0.5 * other.a[i % other.a.len()];
        }
    }
    lora
}

#[test]
fn every_gradient_is_the_slope() {
    for name in MODELS {
        let model = Decoder::load(&model_dir(name)).unwrap();
        let packed = batch(name);
        let mut lora = adapter(&model, ".*proj|lm_head");
        let dlogp = uneven(packed.targets.rows.len());
        let grads = gradient(&model, &packed, &lora, &dlogp);
        let loss = |lora: &Lora| -> f64 {
            let logps = model.logps(&packed, Some(lora)).unwrap();
            logps.iter().zip(&dlogp).map(|(l, d)| f64::from(*l) * f64::from(*d)).sum()
        };
        // Along each matrix's own gradient, where the slope is its length.
        for at in 0..lora.adapters.len() {
            for (is_a, grad) in [(true, &grads.adapters[at].a), (false, &grads.adapters[at].b)] {
                let length = grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
                let step = 1e-2 / length.max(1e-3);
                let kept = lora.adapters[at].clone();
                let mut side = |sign: f64| {
                    let adapter = &mut lora.adapters[at];
                    adapter.clone_from(&kept);
                    let values = if is_a { &mut adapter.a } else { &mut adapter.b };
                    for (value, g) in values.iter_mut().zip(grad) {
                        *value += (sign * step * f64::from(*g)) as f32;
                    }
                    loss(&lora)
                };
                let slope = (side(1.0) - side(-1.0)) / (2.0 * step);
                lora.adapters[at].clone_from(&kept);
                let expected = length * length;
                let what = format!("{name} {} {}", kept.name, if is_a { "A" } else { "B" });
                let error = (slope - expected).abs() / expected;
                assert!(error < 2e-3, "{what}: slope {slope}, gradient {expected}");
            }
        }
    }
}

/// Where only some layers have adapters the way back stops early, and where it does depends on which.
#[test]
fn fewer_adapters_have_the_same_gradients() {
    for name in ["llama", "llama-bias", "qwen3"] {
        let model = Decoder::load(&model_dir(name)).unwrap();
        let packed = batch(name);
        let dlogp = uneven(packed.targets.rows.len());
        for targets in [
            "lm_head",
            r".*1\.mlp\.down_proj",
            r".*1\.mlp\.up_proj",
            r".*1\.self_attn\.o_proj",
            r".*1\.self_attn\.v_proj",
            r".*0\.self_attn\.q_proj",
            r".*0\.mlp\.gate_proj|.*1\.self_attn\.k_proj",
            r".*0\.self_attn\.o_proj|lm_head",
        ] {
            let few = adapter(&model, targets);
            let mut all = adapter(&model, ".*proj|lm_head");
            for adapter in &mut all.adapters {
                match few.get(adapter.site) {
                    Some(same) => adapter.clone_from(same),
                    None => adapter.b.fill(0.0),
                }
            }
            let of_few = gradient(&model, &packed, &few, &dlogp);
            let of_all = gradient(&model, &packed, &all, &dlogp);
            for (adapter, grad) in few.adapters.iter().zip(&of_few.adapters) {
                let same = &of_all.adapters[all.index(adapter.site).unwrap()];
                assert!(grad.a.iter().any(|g| *g != 0.0), "{name} {}", adapter.name);
                assert!(
                    relative(&grad.a, &same.a) < 1e-6,
                    "{name} {targets}: A of {}",
                    adapter.name
                );
                assert!(
                    relative(&grad.b, &same.b) < 1e-6,
                    "{name} {targets}: B of {}",
                    adapter.name
                );
            }
        }
    }
}

#[test]
fn gradients_accumulate() {
    let model = Decoder::load(&model_dir("llama")).unwrap();
    let packed = batch("llama");
    let lora = adapter(&model, "all-linear");
    let dlogp = uneven(packed.targets.rows.len());
    let mut once = gradient(&model, &packed, &lora, &dlogp);
    let mut twice = once.clone();
    model
        .backward(model.forward(packed.clone(), &lora).unwrap(), &dlogp, &lora, &mut twice)
        .unwrap();
    for (once, twice) in lora.grad_tensors(&once).zip(lora.grad_tensors(&twice)) {
        let doubled: Vec<f32> = once.data.iter().map(|g| 2.0 * g).collect();
        assert!(relative(twice.data, &doubled) < 1e-6, "{}", once.name);
    }
    once.clear();
    assert_eq!(once, LoraGrads::zeros(&lora));
}

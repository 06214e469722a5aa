//! What can be switched off changes no number but in its last bits.

use super::gradients::{adapter, batch};
use super::*;

/// Log-probs and gradients under one choice of options.
fn results(model: &Decoder, packed: &Packed, lora: &Lora) -> (Vec<f32>, Vec<f32>, LoraGrads) {
    let dlogp = uneven(packed.targets.rows.len());
    let logps = |lora| model.logps(packed, lora).unwrap();
    let (with, without) = (logps(Some(lora)), logps(None));
    assert_eq!(
        with,
        model.forward(packed.clone(), lora).unwrap().logps(),
        "with and without a tape"
    );
    (with, without, gradient(model, packed, lora, &dlogp))
}

fn assert_same(
    what: &str,
    lora: &Lora,
    a: &(Vec<f32>, Vec<f32>, LoraGrads),
    b: &(Vec<f32>, Vec<f32>, LoraGrads),
) {
    for (a, b) in [(&a.0, &b.0), (&a.1, &b.1)] {
        let exact: Vec<f64> = b.iter().map(|x| f64::from(*x)).collect();
        assert_close(what, a, &exact, 1e-5);
    }
    for (a, b) in lora.grad_tensors(&a.2).zip(lora.grad_tensors(&b.2)) {
        assert!(b.data.iter().any(|g| *g != 0.0), "{what}: {}", b.name);
        assert!(relative(a.data, b.data) < 1e-5, "{what}: {}", a.name);
    }
}

#[test]
fn every_gain_switched_off_gives_the_same_gradients() {
    for name in ["llama", "llama-bias", "qwen3"] {
        let mut model = Decoder::load(&model_dir(name)).unwrap();
        let packed = batch(name);
        for targets in [".*proj|lm_head", r".*1\.mlp\.up_proj", "lm_head"] {
            let lora = adapter(&model, targets);
            model.options = Options::default();
            let expected = results(&model, &packed, &lora);
            for (fused_log_probs, skipped_gradients) in
                [(false, true), (true, false), (false, false)]
            {
                model.options =
                    Options { fused_log_probs, skipped_gradients, ..Options::default() };
                let what = format!("{name} {targets} {:?}", model.options);
                assert_same(&what, &lora, &results(&model, &packed, &lora), &expected);
            }
        }
    }
}

#[test]
fn a_prompt_for_every_branch_gives_the_same_gradients() {
    for name in ["llama", "qwen3"] {
        let model = Decoder::load(&model_dir(name)).unwrap();
        let lora = adapter(&model, ".*proj|lm_head");
        let responses = expected(name, "responses.json");
        let rows = responses["pairs"].as_array().unwrap();
        let groups: Vec<Group> = rows.iter().map(shared_group).collect();
        let groups: Vec<&Group> = groups.iter().collect();
        let (shared, copies) = (Packed::new(&groups), Packed::with_prompt_copies(&groups));
        assert!(copies.rows() > shared.rows());
        assert_eq!(copies.targets.tokens, shared.targets.tokens);
        let [shared, copies] = [shared, copies].map(|packed| results(&model, &packed, &lora));
        assert_same(name, &lora, &copies, &shared);
    }
}

#[test]
fn recomputed_layers_give_the_same_bits() {
    for name in MODELS {
        let mut model = Decoder::load(&model_dir(name)).unwrap();
        let packed = batch(name);
        for targets in [".*proj|lm_head", r".*1\.self_attn\.q_proj", r".*0\.mlp\.down_proj"] {
            let lora = adapter(&model, targets);
            model.options.recomputed_layers = 0;
            let expected = results(&model, &packed, &lora);
            for recomputed_layers in [1, 2, usize::MAX] {
                model.options.recomputed_layers = recomputed_layers;
                let again = results(&model, &packed, &lora);
                assert_eq!(again, expected, "{name} {targets} {recomputed_layers}");
            }
        }
    }
}

//! The memory that a pass is said to take against what it takes.

use super::gradients::{adapter, batch};
use super::identities::with_others;
use super::*;
use crate::model::buffers::Pool;
use crate::model::memory::{Shadow, Size};

/// Most activations of a pass, in bytes.
fn measured(model: &mut Decoder, pass: impl FnOnce(&Decoder)) -> usize {
    model.pool = Pool::default();
    pass(model);
    model.pool.high_water()
}

#[test]
fn every_pass_takes_what_its_shadow_says() {
    for name in MODELS {
        let mut model = Decoder::load(&model_dir(name)).unwrap();
        let packed = batch(name);
        let size = Size::of(&packed, &model.config.heads);
        let dlogp = uneven(size.targets);
        for targets in [
            ".*proj|lm_head",
            "lm_head",
            r".*1\.mlp\.down_proj",
            r".*0\.self_attn\.[qo]_proj|.*1\.mlp\.up_proj",
        ] {
            let lora = adapter(&model, targets);
            for (fused_log_probs, skipped_gradients) in [(true, true), (false, true), (true, false)]
            {
                for recomputed_layers in [0, 1, 2] {
                    let options = Options {
                        fused_log_probs,
                        skipped_gradients,
                        recomputed_layers,
                        ..Options::default()
                    };
                    model.options = options;
                    let what = format!("{name} {targets} {options:?}");
                    for lora in [None, Some(&lora)] {
                        let shadow = Shadow::new(&model.config, options, true);
                        shadow.logps(size, lora);
                        let planned = shadow.peak();
                        let took =
                            measured(&mut model, |model| drop(model.logps(&packed, lora).unwrap()));
                        assert_eq!(planned, took, "log-probs of {what}");
                    }
                    let shadow = Shadow::new(&model.config, options, true);
                    shadow.step(size, &lora);
                    let planned = shadow.peak();
                    let took =
                        measured(&mut model, |model| drop(gradient(model, &packed, &lora, &dlogp)));
                    assert_eq!(planned, took, "a step of {what}");

                    let others = with_others(name);
                    let heads = &model.config.heads;
                    let (own, all) = (Size::of(&others.own, heads), Size::of(&others.all, heads));
                    let shadow = Shadow::new(&model.config, options, true);
                    shadow.step_with_others(own, all, &lora);
                    let planned = shadow.peak();
                    let dlogp = uneven(own.targets);
                    let took = measured(&mut model, |model| {
                        let (tape, _) =
                            model.forward_with_others(with_others(name), &lora).unwrap();
                        model.backward(tape, &dlogp, &lora, &mut LoraGrads::zeros(&lora)).unwrap();
                    });
                    assert_eq!(planned, took, "a step with others of {what}");
                }
            }
        }
    }
}

#[test]
fn sizes_of_groups_add_up() {
    let rows = expected("llama", "responses.json")["pairs"].as_array().unwrap().clone();
    let groups: Vec<Group> = rows.iter().map(shared_group).collect();
    let heads = ModelConfig::load(&model_dir("llama")).unwrap().heads;
    let each = groups.iter().map(|group| Size::of(&pack(std::slice::from_ref(group)), &heads));
    assert_eq!(each.fold(Size::default(), |a, b| a + b), Size::of(&pack(&groups), &heads));
}

#[test]
fn recomputation_takes_less() {
    let model = Decoder::load(&model_dir("llama")).unwrap();
    let (packed, lora) = (batch("llama"), adapter(&model, "all-linear"));
    let peak = |recomputed_layers| {
        let options = Options { recomputed_layers, ..Options::default() };
        let shadow = Shadow::new(&model.config, options, true);
        shadow.step(Size::of(&packed, &model.config.heads), &lora);
        shadow.peak()
    };
    assert!(peak(1) < peak(0));
}

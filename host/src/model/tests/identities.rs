//! What must hold whatever the weights are: how a batch is packed does not matter, and neither does
//! an adapter that adds nothing.

use super::*;
use crate::model::packed::WithOthers;

fn rows(name: &str, file: &str) -> Vec<Value> {
    expected(name, "responses.json")[file].as_array().unwrap().clone()
}

#[test]
fn a_shared_prompt_is_as_good_as_a_copy_for_each_response() {
    for name in MODELS {
        let model = Decoder::load(&model_dir(name)).unwrap();
        let lora = peft::load(&model_dir(name).join("adapter"), &model.config).unwrap();
        let rows = rows(name, "pairs");
        let shared: Vec<Group> = rows.iter().map(shared_group).collect();
        let alone: Vec<Group> =
            rows.iter().flat_map(|r| r.as_array().unwrap()).map(group).collect();
        let (shared, alone) = (pack(&shared), pack(&alone));
        assert!(shared.rows() < alone.rows());
        let (a, b) =
            (model.logps(&shared, Some(&lora)).unwrap(), model.logps(&alone, Some(&lora)).unwrap());
        assert!(a == b, "{name}: a response's log-probs depend on the prompt's other responses");

        let dlogp = uneven(a.len());
        let (a, b) =
            (&gradient(&model, &shared, &lora, &dlogp), gradient(&model, &alone, &lora, &dlogp));
        for (a, b) in lora.grad_tensors(a).zip(lora.grad_tensors(&b)) {
            assert!(relative(a.data, b.data) < 1e-5, "{name}: {}", a.name);
        }
    }
}

/// A group's log-probs are the same bits in any company, so that they can be computed once and kept.
#[test]
fn packed_together_is_the_same_as_alone() {
    for name in MODELS {
        let model = Decoder::load(&model_dir(name)).unwrap();
        let lora = peft::load(&model_dir(name).join("adapter"), &model.config).unwrap();
        let mut groups: Vec<Group> = rows(name, "pairs").iter().map(shared_group).collect();
        // As little company as there can be: a single row, a few rows.
        for tokens in [1, 3] {
            let mut short = groups[0].clone();
            short.prompt.truncate(1);
            short.branches.truncate(1);
            short.branches[0].tokens.truncate(tokens);
            short.branches[0].segments[0].trained = vec![0..tokens];
            groups.push(short);
        }
        for lora in [None, Some(&lora)] {
            let together = model.logps(&pack(&groups), lora).unwrap();
            let alone: Vec<f32> = groups
                .iter()
                .flat_map(|group| model.logps(&pack(std::slice::from_ref(group)), lora).unwrap())
                .collect();
            assert!(together == alone, "{name}");
        }
    }
}

/// Step 0: every implicit reward is the difference of these and must be exactly 0.
#[test]
fn an_adapter_that_adds_nothing_changes_no_bit() {
    for name in MODELS {
        let model = Decoder::load(&model_dir(name)).unwrap();
        let mut config = LoraConfig { rank: 4, ..LoraConfig::default() };
        for targets in ["all-linear", ".*proj|lm_head"] {
            config.targets = targets::Targets::from_text(targets);
            let lora = Lora::init(&config, &model.config, 1).unwrap();
            for file in FILES {
                let packed = pack(&rows(name, file).iter().map(shared_group).collect::<Vec<_>>());
                let base = model.logps(&packed, None).unwrap();
                assert_eq!(base, model.logps(&packed, Some(&lora)).unwrap(), "{name} {file}");
                assert_eq!(
                    base,
                    model.forward(packed.clone(), &lora).unwrap().logps(),
                    "{name} {file}"
                );
            }
        }
    }
}

#[test]
fn with_and_without_a_tape_are_the_same_bits() {
    for (name, adapter) in
        [("llama", "adapter-patterns"), ("qwen2", "adapter-head"), ("mistral", "adapter")]
    {
        let model = Decoder::load(&model_dir(name)).unwrap();
        let lora = peft::load(&model_dir(name).join(adapter), &model.config).unwrap();
        let packed = pack(&rows(name, "pairs").iter().map(shared_group).collect::<Vec<_>>());
        let logps = model.logps(&packed, Some(&lora)).unwrap();
        assert_eq!(logps, model.forward(packed.clone(), &lora).unwrap().logps(), "{name}");
        assert_eq!(logps, model.logps(&packed, Some(&lora)).unwrap(), "{name}, a second time");
        let dlogp = uneven(logps.len());
        let first = gradient(&model, &packed, &lora, &dlogp);
        assert_eq!(first, gradient(&model, &packed, &lora, &dlogp), "{name}");
    }
}

/// Two groups, of which every one but the last response is an other that goes beside them, and a third
/// without others.
pub(super) fn with_others(name: &str) -> WithOthers {
    let groups: Vec<Group> = rows(name, "pairs")[..3].iter().map(shared_group).collect();
    let alone: Vec<Vec<Group>> = groups.iter().map(|group| group.alone().collect()).collect();
    let own: Vec<&Group> = [&alone[0][0], &alone[1][1], &alone[2][0]].into();
    Packed::with_others(&own, &[(0, &alone[0][1]), (1, &alone[1][0])])
}

/// Others beside a batch change no bit of its log-probs and its gradient, nor it any of theirs.
#[test]
fn others_beside_a_batch_change_no_bit() {
    for name in MODELS {
        let mut model = Decoder::load(&model_dir(name)).unwrap();
        let lora = peft::load(&model_dir(name).join("adapter"), &model.config).unwrap();
        for (recomputed_layers, skipped_gradients) in [(0, true), (1, true), (0, false)] {
            model.options = Options { recomputed_layers, skipped_gradients, ..Options::default() };
            let batch = with_others(name);
            let (own, of_others) = (batch.own.clone(), batch.of_others.clone());
            let all = model.logps(&batch.all, Some(&lora)).unwrap();
            let (tape, others) = model.forward_with_others(batch, &lora).unwrap();
            assert_eq!(tape.logps(), model.logps(&own, Some(&lora)).unwrap(), "{name}");
            let expected: Vec<f32> =
                of_others.into_iter().flat_map(|range| all[range].to_vec()).collect();
            assert_eq!(others, expected, "{name}");
            let dlogp = uneven(own.targets.rows.len());
            let mut grads = LoraGrads::zeros(&lora);
            model.backward(tape, &dlogp, &lora, &mut grads).unwrap();
            assert_eq!(grads, gradient(&model, &own, &lora, &dlogp), "{name}");
        }
    }
}

#[test]
fn a_batch_with_nothing_to_predict_has_no_log_probs() {
    let model = Decoder::load(&model_dir("llama")).unwrap();
    assert!(model.logps(&Packed::prompt(&[1, 2, 3]), None).unwrap().is_empty());
    assert!(model.logps(&Packed::new(&[]), None).unwrap().is_empty());
}

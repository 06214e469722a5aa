//! The decoder against transformers and PEFT: see tests/golden/README.md.

use super::*;

#[test]
fn log_probs_are_those_of_transformers_and_peft() {
    for name in MODELS {
        let model = Decoder::load(&model_dir(name)).unwrap();
        let all = expected(name, "responses.json");
        let adapters = all["demos"][0][0]["logps"].as_object().unwrap().clone();
        for which in adapters.keys() {
            let lora = (which != "base")
                .then(|| peft::load(&model_dir(name).join(which), &model.config).unwrap());
            for file in FILES {
                let responses = responses(&all, file);
                let groups: Vec<Group> = responses.iter().map(group).collect();
                let packed = pack(&groups);
                let expected: Vec<f64> =
                    responses.iter().flat_map(|r| floats(&r["logps"][which])).collect();
                let got = model.logps(&packed, lora.as_ref()).unwrap();
                assert_close(&format!("{name} {which} {file}"), &got, &expected, 1e-4);
            }
        }
    }
}

/// The gradient of `sft`: minus the mean log-prob over all response tokens of a file.
#[test]
fn gradients_are_those_of_transformers_and_peft() {
    for name in MODELS {
        let model = Decoder::load(&model_dir(name)).unwrap();
        let lora = peft::load(&model_dir(name).join("adapter"), &model.config).unwrap();
        let all = expected(name, "responses.json");
        let bytes =
            std::fs::read(golden().join("expected").join(name).join("grads.safetensors")).unwrap();
        let grads = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (objective, file) in [("sft", "demos"), ("sft-turns", "turns")] {
            let groups: Vec<Group> = responses(&all, file).iter().map(group).collect();
            let packed = pack(&groups);
            let tape = model.forward(packed.clone(), &lora).unwrap();
            let count = tape.logps().len();
            let mut got = LoraGrads::zeros(&lora);
            model.backward(tape, &vec![-1.0 / count as f32; count], &lora, &mut got).unwrap();
            let mut worst = 0f64;
            for tensor in lora.grad_tensors(&got) {
                let expected = grads.tensor(&format!("{objective}/{}", tensor.name)).unwrap();
                let expected = expected.data().as_chunks::<4>().0.iter();
                let expected: Vec<f32> = expected.map(|b| f32::from_le_bytes(*b)).collect();
                worst = worst.max(relative(tensor.data, &expected));
            }
            println!("{name} {objective}: {worst:.2e}");
            assert!(worst < 1e-4, "{name} {objective}: off by {worst:e}");
        }
    }
}

//! The memory that commands without training are said to take on a GPU against what they take.

use super::*;
use crate::ErrorKind;
use crate::model::inference::{Plan, Setting};
use crate::model::memory::Size;
use uft_kernels::cuda::{Gpu, Properties};

/// A device of its own, since what it has made is counted.
fn gpu() -> Gpu {
    Gpu::emulated_late(1).unwrap_or_else(|error| panic!("{error}"))
}

/// One with so much memory, which only counts.
fn counting(memory: usize) -> Device {
    Device::Gpu(Gpu::counting(Properties {
        name: "none".into(),
        compute_capability: (8, 0),
        memory: memory as u64,
        multiprocessors: 1,
        shared_bytes: 163 << 10,
    }))
}

/// Plans, loads and works, and the plan has to be what was taken.
fn expect_planned(
    name: &str,
    with_adapter: bool,
    passes: &[Forward],
    work: impl FnOnce(&Model, Option<&Adapters>),
) {
    let (dir, device) = (model_dir(name), Device::Gpu(gpu()));
    let Device::Gpu(gpu) = &device else { unreachable!() };
    let config = &ModelConfig::load(&dir).unwrap();
    let lora = with_adapter.then(|| peft::load(&dir.join("adapter"), config).unwrap());
    let inference = Inference { dir: &dir, config, lora, device: &device };
    let Plan { activations, .. } = inference.plan(gpu, passes).unwrap();
    let loaded = inference.load(passes, &[]).unwrap();
    let before = loaded.model.made();
    work(&loaded.model, loaded.lora.as_ref());
    assert_eq!(loaded.model.activations(), activations, "{name}: {passes:?}");
    assert_eq!(loaded.model.made(), before, "{name}: allocations and modules");
}

#[test]
fn scoring_takes_what_was_planned() {
    for (name, with_adapter) in [("llama", false), ("mistral", true), ("qwen3", true)] {
        let rows = expected(name, "responses.json")["pairs"].clone();
        let groups: Vec<Group> = rows.as_array().unwrap()[..3].iter().map(shared_group).collect();
        let heads = ModelConfig::load(&model_dir(name)).unwrap().heads;
        let batches = [pack(&groups[..2]), pack(&groups[2..])];
        let passes = batches.each_ref().map(|batch| Forward::LogProbs {
            size: Size::of(batch, &heads),
            positions: groups.iter().map(Group::longest).max().unwrap(),
        });
        expect_planned(name, with_adapter, &passes, |model, lora| {
            for batch in &batches {
                model.logps(batch, None).unwrap();
                if lora.is_some() {
                    model.logps(batch, lora).unwrap();
                }
            }
        });
    }
}

#[test]
fn generation_takes_what_was_planned() {
    for (name, with_adapter) in [("llama", true), ("mistral", false), ("qwen3", false)] {
        let response = &expected(name, "responses.json")["demos"][0][0];
        let prompt = ids(&response["prompt_ids"]);
        let options = SampleOptions { max_tokens: 5, ..SampleOptions::greedy() };
        let passes = [Forward::Continuation { prompt: prompt.len(), tokens: options.max_tokens }];
        expect_planned(name, with_adapter, &passes, |model, lora| {
            assert_eq!(model.generate(&prompt, &options, lora).unwrap().len(), 5);
        });
    }
}

#[test]
fn what_does_not_fit_is_refused_with_what_would() {
    let dir = model_dir("llama");
    let config = &ModelConfig::load(&dir).unwrap();
    let passes = |prompt, tokens| vec![Forward::Continuation { prompt, tokens }];
    let total = |prompt, tokens| {
        let device = counting(0);
        let Device::Gpu(gpu) = &device else { unreachable!() };
        let inference = Inference { dir: &dir, config, lora: None, device: &device };
        inference.plan(gpu, &passes(prompt, tokens)).unwrap().total()
    };
    let refused = |memory: usize| {
        let tokens = Setting {
            value: 300,
            passes: &|tokens| passes(40, tokens),
            advice: &|tokens| format!("{tokens} tokens"),
        };
        let prompt = Setting {
            value: 40,
            passes: &|prompt| passes(prompt, 1),
            advice: &|prompt| format!("a prompt of {prompt}"),
        };
        let device = counting(memory);
        let inference = Inference { dir: &dir, config, lora: None, device: &device };
        let refused = inference.load(&passes(40, 300), &[tokens, prompt]).err().unwrap();
        assert_eq!(refused.kind, ErrorKind::OutOfMemory);
        refused.message
    };
    let message = refused(total(40, 200));
    assert!(message.ends_with(" are available: 200 tokens would fit"), "{message}");
    assert!(total(40, 201) > total(40, 200));
    let message = refused(total(20, 1));
    assert!(message.ends_with(": a prompt of 20 would fit"), "{message}");
    assert!(total(21, 1) > total(20, 1));
    let message = refused(total(1, 1) - 1);
    assert!(message.contains("the weights alone are too large"), "{message}");
}

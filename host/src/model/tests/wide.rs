//! A model wide enough for the kernels that only Hopper has, on the emulated device: the golden ones are too narrow for
//! most of them.

use super::device::{Yardstick, hopper, place_on, results};
use super::gradients::adapter;
use super::*;
use crate::model::memory::Size;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::BTreeMap;
use uft_kernels::adamw::AdamW;
use uft_kernels::cuda::Gpu;

/// Qwen2's, with biases; heads of 64, a feed-forward width from which gate and up go into one product.
fn write_model(name: &str) -> Scratch {
    let scratch = Scratch::new(name);
    let config = serde_json::json!({
        "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 200,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "hidden_act": "silu", "rope_theta": 10000.0,
        "max_position_embeddings": 512, "torch_dtype": "float32",
    });
    std::fs::write(scratch.0.join("config.json"), config.to_string()).unwrap();
    let config = ModelConfig::load(&scratch.0).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(9);
    let mut uniform =
        |bound: f32| bound * ((random.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0);
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let mut add = |name: String, shape: Vec<usize>, middle: f32, bound: f32| {
        let numbers = (0..shape.iter().product::<usize>()).map(|_| middle + uniform(bound));
        tensors.insert(name, (shape, numbers.flat_map(f32::to_le_bytes).collect()));
    };
    for linear in config.linears() {
        let bound = 1.7 / (linear.inputs as f32).sqrt();
        add(format!("{}.weight", linear.name), vec![linear.outputs, linear.inputs], 0.0, bound);
        if ["q_proj", "k_proj", "v_proj"].iter().any(|name| linear.name.ends_with(name)) {
            add(format!("{}.bias", linear.name), vec![linear.outputs], 0.0, 0.3);
        }
    }
    let norms = (0..config.layers).flat_map(|layer| {
        ["input_layernorm", "post_attention_layernorm"]
            .map(|norm| format!("model.layers.{layer}.{norm}.weight"))
    });
    for norm in norms.chain(["model.norm.weight".to_owned()]) {
        add(norm, vec![config.hidden], 1.0, 0.2);
    }
    add("model.embed_tokens.weight".into(), vec![config.vocab, config.hidden], 0.0, 1.0);
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let file = scratch.0.join("model.safetensors");
    safetensors::serialize_to_file(views, None, &file).unwrap();
    scratch
}

/// More rows than a tile has, of prompts with two responses each.
fn rows(vocab: usize) -> Packed {
    let mut random = ChaCha8Rng::seed_from_u64(4);
    let mut tokens = |count: usize| -> Vec<u32> {
        (0..count).map(|_| random.next_u32() % vocab as u32).collect()
    };
    let groups: Vec<Group> = [(30, [25, 18]), (1, [40, 7]), (12, [9, 11])]
        .map(|(prompt, responses)| Group {
            prompt: tokens(prompt),
            branches: responses.map(|count| branch(tokens(count))).into(),
        })
        .into();
    pack(&groups)
}

fn branch(tokens: Vec<u32>) -> Branch {
    let trained = std::iter::once(0..tokens.len()).collect();
    let segments = vec![Segment { feedback: Feedback::Demonstration, trained }];
    Branch { tokens, segments }
}

#[test]
fn hoppers_kernels_are_as_good_as_a_plain_run_through_the_engine() {
    let scratch = write_model("wide");
    let exact = Decoder::load(&scratch.0).unwrap();
    let model = cuda::Decoder::load(&scratch.0, hopper()).unwrap();
    // A head with an adapter has a way back of its own.
    let loras = [".*proj|lm_head", ".*proj"].map(|targets| adapter(&exact, targets));
    let packed = rows(exact.config.vocab);
    let dlogp = uneven(packed.targets.rows.len());
    expect_hoppers_kernels(&exact.config, &loras, &packed);
    for lora in &loras {
        let (logps, grads) = results(&model, &packed, &place_on(hopper(), lora), &dlogp);
        let yardstick = Yardstick::new(&exact, lora, &packed, &dlogp);
        yardstick.expect("wide", &logps);
        yardstick.expect_gradients("wide", &grads);
    }
}

/// That the engine launches them, and this file shows something.
fn expect_hoppers_kernels(config: &ModelConfig, loras: &[Lora], packed: &Packed) {
    let properties = hopper().properties();
    let launched = loras.iter().flat_map(|lora| {
        let counted = cuda::Counted::new(config, Options::default(), properties, 128).unwrap();
        let counted = counted.with_adapters(lora).unwrap().with_training(false).unwrap();
        counted.step(Size::of(packed, &config.heads)).unwrap();
        counted.kernels()
    });
    let launched: Vec<&str> = launched.map(|kernel| kernel.name).collect();
    // There to be measured beside what makes the same.
    let beside = ["hopper_attention_backward_keys", "hopper_attention_backward_queries"];
    let kernels = uft_kernels::cuda::HOPPER_KERNELS.iter().copied().flatten();
    for kernel in kernels.filter(|kernel| !beside.contains(&kernel.name)) {
        assert!(launched.contains(&kernel.name), "{} is not in {launched:?}", kernel.name);
    }
}

/// A step, and one after it: of the same adapters and moments, or of what was read of them and written elsewhere.
#[test]
fn a_step_goes_on_bit_for_bit_with_hoppers_kernels() {
    let scratch = write_model("wide-steps");
    let device = Device::Gpu(Gpu::clone(hopper()));
    let model = Model::load(&scratch.0, &device).unwrap();
    let packed = rows(model.config().vocab);
    let dlogp = uneven(packed.targets.rows.len());
    let config = LoraConfig { rank: 3, ..LoraConfig::default() };
    let lora = Lora::init(&config, model.config(), 3).unwrap();
    let step = |adapters: &mut Adapters, moments: &mut Moments, step: u64| {
        let mut grads = Gradients::zeros(adapters).unwrap();
        let tape = model.forward(packed.clone(), adapters).unwrap();
        model.backward(tape, &dlogp, adapters, &mut grads).unwrap();
        let settings = AdamW { step, lr: 0.01, ..AdamW::default() };
        moments.update(adapters, &grads, &settings).unwrap();
    };
    let mut adapters = model.place(lora).unwrap();
    let mut moments = Moments::zeros(&adapters).unwrap();
    step(&mut adapters, &mut moments, 1);
    let first = adapters.read().unwrap().into_owned();
    let kept = moments.read().unwrap().into_owned();
    step(&mut adapters, &mut moments, 2);
    let second = adapters.read().unwrap().into_owned();

    let mut adapters = model.place(first.clone()).unwrap();
    let mut moments = Moments::zeros(&adapters).unwrap();
    moments.write(kept).unwrap();
    step(&mut adapters, &mut moments, 2);
    let matrices = |lora: &Lora| -> Vec<Vec<f32>> {
        lora.tensors().map(|tensor| tensor.data.to_vec()).collect()
    };
    assert_ne!(matrices(&first), matrices(&second), "a step changes adapters");
    assert_eq!(matrices(&adapters.read().unwrap()), matrices(&second));
}

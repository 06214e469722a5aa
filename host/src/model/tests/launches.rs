//! How many launches a step and a generated token take, at the shape of a large model on Hopper: what docs/decisions.md says
//! of graphs rests on it.

use super::*;
use crate::model::memory::Size;
use uft_kernels::cuda::Properties;

const LAYERS: usize = 32;

/// Mistral-7B with an adapter on every projection, which only counts.
fn counted(name: &str) -> cuda::Counted {
    let scratch = Scratch::copy_of(&model_dir("mistral"), name);
    scratch.edit("config.json", |config| {
        for (key, value) in [
            ("hidden_size", 4096),
            ("intermediate_size", 14336),
            ("num_hidden_layers", LAYERS),
            ("num_attention_heads", 32),
            ("num_key_value_heads", 8),
            ("head_dim", 128),
            ("vocab_size", 32000),
            ("sliding_window", 4096),
        ] {
            config[key] = value.into();
        }
    });
    let config = ModelConfig::load(&scratch.0).unwrap();
    let hopper = Properties {
        name: "Hopper".into(),
        compute_capability: (9, 0),
        memory: 80 << 30,
        multiprocessors: 132,
        shared_bytes: 227 << 10,
    };
    let lora = Lora::init(&LoraConfig { rank: 1, ..LoraConfig::default() }, &config, 1).unwrap();
    let counted = cuda::Counted::new(&config, Options::default(), &hopper, 4096).unwrap();
    counted.with_adapters(&lora).unwrap().with_training(false).unwrap()
}

#[test]
fn launches_of_a_step_and_of_a_token() {
    const ROWS: usize = 16_384;
    let mut step = counted("launches-step");
    let before = step.launches();
    let size = Size { rows: ROWS, needed: ROWS, targets: ROWS, longest: 4096, tables: 1 << 20 };
    step.step(size).unwrap();
    step.update().unwrap();
    let of_step = step.launches() - before;
    let token = |tokens| {
        let text = counted("launches-token");
        let before = text.launches();
        text.generate(100, tokens).unwrap();
        text.launches() - before
    };
    let of_token = token(2) - token(1);
    println!("{of_step} launches of a step, {of_token} of a token");
    assert!((20 * LAYERS..60 * LAYERS).contains(&of_step), "{of_step}");
    assert!((10 * LAYERS..40 * LAYERS).contains(&of_token), "{of_token}");
}

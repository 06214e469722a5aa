//! The weights of a model: headers, index and the configuration that says what has to be there.

use super::directory::Directory;
use super::{NUMBERS, Target, scratch};
use ::safetensors::tensor::{Dtype, TensorView, serialize};
use std::sync::LazyLock;
use uft::model::{Decoder, ModelConfig};

pub const TARGET: Target = Target { name: "safetensors", run, seeds, tokens: &TOKENS };

const TOKENS: [&str; 24] = [
    NUMBERS[0],
    NUMBERS[1],
    NUMBERS[3],
    NUMBERS[4],
    NUMBERS[5],
    NUMBERS[6],
    NUMBERS[7],
    "null",
    "\"F32\"",
    "\"BF16\"",
    "\"F16\"",
    "\"I64\"",
    "\"F4\"",
    "\"shape\":[",
    "\"data_offsets\":[",
    "\"__metadata__\":{",
    "\"weight_map\":{",
    "\"../model.safetensors\"",
    "\"num_hidden_layers\":",
    "\"head_dim\":",
    "\"rope_scaling\":",
    "\"layer_types\":",
    "\"eos_token_id\":",
    "\"vocab_size\":",
];

/// The smallest model of the family with most keys.
pub const CONFIG: &str = r#"{"model_type":"llama","hidden_size":4,"intermediate_size":4,"num_hidden_layers":1,
"num_attention_heads":2,"num_key_value_heads":1,"vocab_size":4,"rms_norm_eps":1e-05,"tie_word_embeddings":true,
"rope_theta":10000.0,"rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,
"original_max_position_embeddings":256},"hidden_act":"silu","max_position_embeddings":64,"eos_token_id":[1,2]}"#;

/// A safetensors file of zeros in f32.
pub fn zeros(tensors: &[(&str, &[usize])]) -> Vec<u8> {
    let data = [0; 1024];
    let view = |shape: &[usize]| {
        let bytes = 4 * shape.iter().product::<usize>();
        TensorView::new(Dtype::F32, shape.to_vec(), &data[..bytes]).expect("bytes for the shape")
    };
    serialize(tensors.iter().map(|(name, shape)| (*name, view(shape))), None).expect("tensors")
}

static DIRECTORY: LazyLock<Directory> = LazyLock::new(|| {
    let first: [(&str, &[usize]); 6] = [
        ("model.embed_tokens.weight", &[4, 4]),
        ("model.norm.weight", &[4]),
        ("model.layers.0.input_layernorm.weight", &[4]),
        ("model.layers.0.self_attn.q_proj.weight", &[4, 4]),
        ("model.layers.0.self_attn.k_proj.weight", &[2, 4]),
        ("model.layers.0.self_attn.v_proj.weight", &[2, 4]),
    ];
    let second: [(&str, &[usize]); 5] = [
        ("model.layers.0.self_attn.o_proj.weight", &[4, 4]),
        ("model.layers.0.post_attention_layernorm.weight", &[4]),
        ("model.layers.0.mlp.gate_proj.weight", &[4, 4]),
        ("model.layers.0.mlp.up_proj.weight", &[4, 4]),
        ("model.layers.0.mlp.down_proj.weight", &[4, 4]),
    ];
    let files = ["1.safetensors", "2.safetensors"];
    let entries = [first.as_slice(), &second].into_iter().zip(files);
    let entry = |(tensors, file): (&[(&'static str, _)], &'static str)| -> Vec<String> {
        tensors.iter().map(|(name, _)| format!("\"{name}\":\"{file}\"")).collect()
    };
    let map: Vec<String> = entries.flat_map(entry).collect();
    let index = format!("{{\"metadata\":{{}},\"weight_map\":{{{}}}}}", map.join(","));
    Directory(vec![
        (files[0], zeros(&first)),
        (files[1], zeros(&second)),
        ("model.safetensors.index.json", index.into_bytes()),
        ("config.json", CONFIG.as_bytes().to_vec()),
    ])
});

fn run(input: &[u8]) {
    let dir = scratch();
    DIRECTORY.write(dir.path(), input);
    // A model that loads has been read to its last number.
    let _ = Decoder::load(dir.path());
}

/// The model's shape, for other inputs that belong to it.
pub fn shape() -> ModelConfig {
    let dir = scratch();
    std::fs::write(dir.path().join("config.json"), CONFIG).expect("a file in a temporary folder");
    ModelConfig::load(dir.path()).expect("a valid configuration")
}

fn seeds() -> Vec<Vec<u8>> {
    let dir = scratch();
    let seeds = DIRECTORY.seeds();
    DIRECTORY.write(dir.path(), &seeds[0]);
    assert!(Decoder::load(dir.path()).is_ok(), "the seeds are a whole model");
    let many = CONFIG.replace("\"num_hidden_layers\":1", "\"num_hidden_layers\":1073741824");
    let mut seeds = seeds;
    seeds.push(DIRECTORY.seed("config.json", &many));
    seeds
}

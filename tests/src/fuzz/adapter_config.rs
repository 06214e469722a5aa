//! A PEFT adapter directory for a model.

use super::directory::Directory;
use super::{NUMBERS, Target, safetensors, scratch};
use std::sync::LazyLock;
use uft::model::{ModelConfig, peft};

pub const TARGET: Target = Target { name: "adapter_config", run, seeds, tokens: &TOKENS };

const TOKENS: [&str; 24] = [
    NUMBERS[0],
    NUMBERS[1],
    NUMBERS[2],
    NUMBERS[3],
    NUMBERS[5],
    NUMBERS[7],
    "null",
    "true",
    "\"r\":",
    "\"lora_alpha\":",
    "\"target_modules\":",
    "\"all-linear\"",
    "\".*_proj\"",
    "\"lm_head\"",
    "\"rank_pattern\":{",
    "\"alpha_pattern\":{",
    "\"use_rslora\":",
    "\"modules_to_save\":",
    "(\\\\w{100}){100}",
    "(a*)*",
    "|",
    "\\\\p{L}",
    "\"F32\"",
    "\"shape\":[",
];

const CONFIG: &str = r#"{"peft_type":"LORA","task_type":"CAUSAL_LM","bias":"none","r":2,"lora_alpha":4,
"target_modules":["q_proj","v_proj"],"rank_pattern":{"layers.0.self_attn.v_proj":1},"alpha_pattern":{"v_proj":3.5},
"use_rslora":false,"lora_dropout":0.0,"init_lora_weights":true,"modules_to_save":null}"#;

static SHAPE: LazyLock<ModelConfig> = LazyLock::new(safetensors::shape);

static DIRECTORY: LazyLock<Directory> = LazyLock::new(|| {
    let tensors: [(&str, &[usize]); 4] = [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", &[2, 4]),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", &[4, 2]),
        ("base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight", &[1, 4]),
        ("base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight", &[2, 1]),
    ];
    Directory(vec![
        ("adapter_config.json", CONFIG.as_bytes().to_vec()),
        ("adapter_model.safetensors", safetensors::zeros(&tensors)),
    ])
});

fn run(input: &[u8]) {
    let dir = scratch();
    DIRECTORY.write(dir.path(), input);
    let Ok(lora) = peft::load(dir.path(), &SHAPE) else { return };
    assert!(lora.adapters.iter().all(|adapter| adapter.scale.is_finite()));
}

fn seeds() -> Vec<Vec<u8>> {
    let dir = scratch();
    let mut seeds = DIRECTORY.seeds();
    DIRECTORY.write(dir.path(), &seeds[0]);
    assert!(peft::load(dir.path(), &SHAPE).is_ok(), "the seeds are a whole adapter");
    for changed in [
        CONFIG.replace("\"r\":2", "\"r\":1073741824"),
        CONFIG.replace("\"r\":2", "\"r\":65536"),
        CONFIG.replace("[\"q_proj\",\"v_proj\"]", r#"".*\\.(q|v)_proj""#),
        CONFIG.replace("[\"q_proj\",\"v_proj\"]", r#""all-linear""#),
        CONFIG.replace("layers.0.self_attn.v_proj", r"(\\w{100}){1000}"),
    ] {
        seeds.push(DIRECTORY.seed("adapter_config.json", &changed));
    }
    seeds
}

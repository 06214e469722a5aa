//! Adapters: where they go, how they start, and PEFT's files.

use super::*;
use crate::model::targets::{Patterns, Targets};
use serde_json::json;
use std::collections::BTreeSet;

fn config(name: &str) -> ModelConfig {
    ModelConfig::load(&model_dir(name)).unwrap()
}

fn names(lora: &Lora) -> Vec<&str> {
    lora.adapters.iter().map(|adapter| adapter.name.as_str()).collect()
}

fn with_targets(targets: Targets) -> LoraConfig {
    LoraConfig { targets, ..LoraConfig::default() }
}

fn list(entries: &[&str]) -> Targets {
    Targets::List(entries.iter().map(|entry| entry.to_string()).collect())
}

#[test]
fn targets_are_matched_as_peft_does() {
    let llama = config("llama");
    let chosen = |targets| Lora::init(&with_targets(targets), &llama, 0).unwrap();
    assert_eq!(chosen(Targets::AllLinear).adapters.len(), 3 * 7);
    assert_eq!(chosen(Targets::from_text("All-Linear")), chosen(Targets::AllLinear));
    let q = chosen(list(&["q_proj"]));
    assert_eq!(names(&q)[2], "model.layers.2.self_attn.q_proj");
    assert_eq!(
        names(&chosen(list(&["1.mlp.up_proj", "lm_head"]))),
        ["model.layers.1.mlp.up_proj", "lm_head"]
    );
    let regex = Targets::from_text(r".*layers\.[12]\.self_attn\.(k|v)_proj");
    assert_eq!(chosen(regex).adapters.len(), 4);
    let first = &chosen(Targets::AllLinear).adapters[1];
    assert_eq!((first.inputs, first.outputs, first.rank), (32, 16, 16));
    assert_eq!((first.a.len(), first.b.len(), first.scale), (16 * 32, 16 * 16, 2.0));
}

#[test]
fn targets_that_mean_nothing_are_refused() {
    let llama = config("llama");
    let refused = |targets| Lora::init(&with_targets(targets), &llama, 0).unwrap_err().message;
    let message = refused(list(&["q_proj", "c_attn"]));
    assert!(message.contains("\"c_attn\" matches no linear layer; there are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"), "{message}");
    assert!(
        refused(list(&["proj"])).contains("\"proj\" matches no linear layer"),
        "no part of a name"
    );
    assert!(refused(Targets::from_text("q_proj")).contains("matches no linear"), "the whole path");
    assert!(refused(list(&["embed_tokens"])).contains("model.embed_tokens, the embedding"));
    assert!(refused(list(&["norm"])).contains("model.norm, which is not a linear layer"));
    assert!(refused(Targets::from_text(".*")).contains("not a linear layer"));
    assert!(refused(Targets::from_text("(")).contains("is not a regular expression"));
    assert!(refused(Targets::from_text("(?=a).*")).contains("is not a regular expression"));
    assert!(refused(list(&[])).contains("matches no linear layer"));
}

#[test]
fn patterns_set_rank_and_alpha_of_single_layers() {
    let patterns = LoraConfig {
        rank: 4,
        alpha: 8.0,
        rank_pattern: Patterns(vec![
            (r"layers\.2\.mlp\.down_proj".into(), 2),
            ("q_proj".into(), 6),
            (r".*1\..*".into(), 5),
        ]),
        alpha_pattern: Patterns(vec![("v_proj".into(), 3.0)]),
        ..LoraConfig::default()
    };
    let lora = Lora::init(&patterns, &config("llama"), 0).unwrap();
    let of = |name: &str| lora.adapters.iter().find(|a| a.name.ends_with(name)).unwrap();
    assert_eq!(of("2.mlp.down_proj").rank, 2);
    assert_eq!(of("0.self_attn.q_proj").rank, 6);
    assert_eq!(of("1.self_attn.q_proj").rank, 6, "the first that matches counts");
    assert_eq!(of("1.self_attn.k_proj").rank, 5);
    assert_eq!(of("0.self_attn.k_proj").rank, 4);
    assert_eq!((of("0.self_attn.v_proj").scale, of("0.self_attn.q_proj").scale), (0.75, 8.0 / 6.0));
    let lora = Lora::init(&LoraConfig { rslora: true, ..patterns }, &config("llama"), 0).unwrap();
    let of = |name: &str| lora.adapters.iter().find(|a| a.name.ends_with(name)).unwrap();
    assert_eq!(of("0.self_attn.v_proj").scale, 1.5);
    for (rank, alpha) in [(0, 1.0), (4, 0.0), (4, f64::NAN)] {
        let broken = LoraConfig { rank, alpha, ..LoraConfig::default() };
        assert!(Lora::init(&broken, &config("llama"), 0).is_err());
    }
}

#[test]
fn a_start_depends_on_seed_and_name_alone() {
    let llama = config("llama");
    let all = Lora::init(&LoraConfig::default(), &llama, 7).unwrap();
    let few = Lora::init(&with_targets(list(&["down_proj"])), &llama, 7).unwrap();
    assert_eq!(few.adapters[1], all.adapters[13]);
    assert_ne!(all.adapters[13].a, all.adapters[6].a);
    let other = Lora::init(&LoraConfig::default(), &llama, 8).unwrap();
    assert_ne!(all.adapters[0].a, other.adapters[0].a);
    assert!(all.adapters.iter().all(|adapter| adapter.b.iter().all(|b| *b == 0.0)));
    let a = &all.adapters[6].a;
    let bound = 1.0 / 64f32.sqrt();
    assert!(a.iter().all(|a| a.abs() <= bound));
    let mean = a.iter().sum::<f32>() / a.len() as f32;
    let variance = a.iter().map(|a| a * a).sum::<f32>() / a.len() as f32;
    assert!(mean.abs() < 0.05 * bound && (variance / (bound * bound / 3.0) - 1.0).abs() < 0.1);
}

#[test]
fn parameters_come_with_their_gradients_in_one_order() {
    let mut lora = Lora::init(&LoraConfig::default(), &config("qwen2"), 1).unwrap();
    let grads = LoraGrads::zeros(&lora);
    let names: Vec<String> = lora.tensors().map(|tensor| tensor.name).collect();
    assert_eq!(names[0], "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
    assert_eq!(names[1], "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight");
    let sizes: usize = lora.tensors().map(|tensor| tensor.data.len()).sum();
    assert_eq!(sizes, lora.parameters());
    let same: Vec<String> = lora.grad_tensors(&grads).map(|tensor| tensor.name).collect();
    assert_eq!(names, same);
    for (parameter, name) in lora.parameters_mut(&grads).zip(names) {
        assert_eq!(parameter.name, name);
        assert_eq!(parameter.value.len(), parameter.grad.len());
    }
}

#[test]
fn adapters_survive_a_round_trip() {
    for (name, adapter) in
        [("llama", "adapter"), ("llama", "adapter-patterns"), ("qwen2", "adapter-head")]
    {
        let model = config(name);
        let lora = peft::load(&model_dir(name).join(adapter), &model).unwrap();
        let scratch = Scratch::new(&format!("roundtrip-{name}-{adapter}"));
        peft::save(&scratch.0, &lora, name).unwrap();
        assert_eq!(peft::load(&scratch.0, &model).unwrap(), lora);
        assert!(scratch.0.join("README.md").exists());
        let files = std::fs::read_dir(&scratch.0).unwrap().count();
        assert_eq!(files, 3, "nothing partial is left");
    }
}

#[test]
fn the_written_configuration_is_pefts() {
    let model = config("llama");
    let directory = model_dir("llama").join("adapter-patterns");
    let lora = peft::load(&directory, &model).unwrap();
    let scratch = Scratch::new("config");
    peft::save(&scratch.0, &lora, "llama").unwrap();
    let text = std::fs::read_to_string(scratch.0.join("adapter_config.json")).unwrap();
    let ours: Value = serde_json::from_str(&text).unwrap();
    let theirs = std::fs::read_to_string(directory.join("adapter_config.json")).unwrap();
    let theirs: Value = serde_json::from_str(&theirs).unwrap();
    let newer =
        ["kasa_config", "lora_ga_config", "monteclora_config", "use_bdlora", "velora_config"];
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    let mut expected = keys(&theirs);
    expected.retain(|key| !newer.contains(&key.as_str()));
    assert_eq!(keys(&ours), expected);
    let order: Vec<String> = ours.as_object().unwrap().keys().cloned().collect();
    assert!(order.is_sorted(), "{order:?}");
    for key in expected.iter().filter(|key| *key != "peft_version") {
        assert_eq!(ours[key], theirs[key], "{key}");
    }

    let all = Lora::init(&LoraConfig::default(), &model, 0).unwrap();
    peft::save(&scratch.0, &all, "llama").unwrap();
    let text = std::fs::read_to_string(scratch.0.join("adapter_config.json")).unwrap();
    let ours: Value = serde_json::from_str(&text).unwrap();
    let seven = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"];
    assert_eq!(ours["target_modules"], json!(seven));
}

#[test]
fn patterns_whose_order_matters_cannot_be_written() {
    let mut lora = Lora::init(&LoraConfig::default(), &config("llama"), 0).unwrap();
    lora.config.rank_pattern = Patterns(vec![("q_proj".into(), 6), (".*1\\..*".into(), 5)]);
    let scratch = Scratch::new("order");
    let message = peft::save(&scratch.0, &lora, "llama").unwrap_err().message;
    assert!(
        message.starts_with("rank_pattern: write the patterns in alphabetical order"),
        "{message}"
    );
}

#[test]
fn adapters_that_are_not_plain_lora_are_refused_by_key() {
    let model = config("llama");
    let scratch = Scratch::copy_of(&model_dir("llama").join("adapter"), "refusals");
    let file = "adapter_config.json";
    let original = std::fs::read(scratch.0.join(file)).unwrap();
    for (key, value) in [
        ("peft_type", json!("LOHA")),
        ("bias", json!("all")),
        ("task_type", json!("SEQ_CLS")),
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("layers_to_transform", json!([0])),
        ("layer_replication", json!([[0, 1]])),
        ("fan_in_fan_out", json!(true)),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("exclude_modules", json!(["k_proj"])),
        ("megatron_config", json!({"a": 1})),
        ("something_new", json!(3)),
        ("target_modules", json!(7)),
        ("target_modules", json!(["c_attn"])),
        ("r", json!(0)),
        ("r", json!(5)),
        ("rank_pattern", json!({"q_proj": "many"})),
        ("target_modules", json!(["q_proj"])),
    ] {
        std::fs::write(scratch.0.join(file), &original).unwrap();
        scratch.edit(file, |config| config[key] = value.clone());
        let message = peft::load(&scratch.0, &model).unwrap_err().message;
        let expected = match (key, &value) {
            ("r", Value::Number(n)) if *n == 5.into() => {
                "q_proj.lora_A.weight: shape [4, 32], expected [5, 32]".to_string()
            }
            ("target_modules", Value::Array(list)) if list[0] == "q_proj" => {
                "belongs to no linear layer".to_string()
            }
            ("target_modules", Value::Array(_)) => "c_attn".to_string(),
            ("rank_pattern", _) => "q_proj = \"many\"".to_string(),
            _ => format!("{key} = {value}"),
        };
        assert!(message.contains(&expected), "{key}: {message}");
    }
    std::fs::write(scratch.0.join(file), &original).unwrap();
    scratch.edit(file, |config| {
        config["target_modules"].as_array_mut().unwrap().push("lm_head".into())
    });
    let message = peft::load(&scratch.0, &model).unwrap_err().message;
    assert!(message.contains("base_model.model.lm_head.lora_A.weight is missing"), "{message}");
    std::fs::remove_file(scratch.0.join("adapter_model.safetensors")).unwrap();
    std::fs::write(scratch.0.join("adapter_model.bin"), []).unwrap();
    let message = peft::load(&scratch.0, &model).unwrap_err().message;
    assert!(message.contains("adapter_model.bin is a pickle"), "{message}");
}

use super::super::rope::RopeScaling;
use super::*;
use serde_json::json;

/// A small valid file of the family with `changes` on top; a `null` change removes the key.
fn keys(family: &str, changes: Value) -> Keys {
    let mut base = json!({
        "model_type": family,
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "eos_token_id": 7,
    });
    let map = base.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        map.insert(key.clone(), value.clone());
    }
    Keys::new(Path::new("dir/config.json"), map.clone())
}

fn parse(family: &str, changes: Value) -> ModelConfig {
    ModelConfig::parse(&keys(family, changes)).unwrap()
}

fn refusal(family: &str, changes: Value) -> String {
    ModelConfig::parse(&keys(family, changes)).unwrap_err().message
}

#[test]
fn families_differ_where_transformers_says_so() {
    let llama = parse("llama", json!({}));
    assert_eq!((llama.qkv_bias, llama.o_bias, llama.mlp_bias), (false, false, false));
    assert_eq!(llama.heads, Heads { heads: 4, kv_heads: 2, head_dim: 8 });
    assert_eq!((llama.query_width(), llama.key_width()), (32, 16));
    let llama = parse("llama", json!({"attention_bias": true, "mlp_bias": true}));
    assert_eq!((llama.qkv_bias, llama.o_bias, llama.mlp_bias), (true, true, true));
    let qwen2 = parse("qwen2", json!({}));
    assert_eq!((qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm), (true, false, false));
    let qwen3 = parse("qwen3", json!({"head_dim": 16}));
    assert_eq!((qwen3.qkv_bias, qwen3.qk_norm, qwen3.heads.head_dim), (false, true, 16));
    assert_eq!(qwen3.query_width(), 64);
}

#[test]
fn keys_left_out_have_the_defaults_of_transformers() {
    let without = |family: &str, key: &str| {
        let mut map = keys(family, json!({})).iter().map(|(k, v)| (k.into(), v.clone())).collect();
        serde_json::Map::remove(&mut map, key);
        ModelConfig::parse(&Keys::new(Path::new("config.json"), map))
    };
    assert_eq!(without("llama", "num_key_value_heads").unwrap().heads.kv_heads, 4);
    assert_eq!(without("llama", "rms_norm_eps").unwrap().norm_eps, 1e-6);
    assert_eq!(without("llama", "rope_theta").unwrap().rope.theta, 10_000.0);
    assert_eq!(without("qwen3", "x").unwrap().heads.head_dim, 128);
    assert_eq!(without("mistral", "x").unwrap().windows, [Some(4096); 3]);
    let message = without("llama", "hidden_size").unwrap_err().message;
    assert_eq!(message, "config.json: hidden_size is missing");
    let message = without("mistral", "num_key_value_heads").unwrap_err().message;
    assert!(message.contains("8 does not divide num_attention_heads = 4"), "{message}");
    assert_eq!(parse("mistral", json!({"num_key_value_heads": null})).heads.kv_heads, 4);
}

#[test]
fn windows_of_every_spelling() {
    assert_eq!(parse("mistral", json!({"sliding_window": 16})).windows, [Some(16); 3]);
    assert_eq!(parse("mistral", json!({"sliding_window": null})).windows, [None; 3]);
    let qwen = json!({"sliding_window": 16, "max_window_layers": 1});
    assert_eq!(parse("qwen2", qwen).windows, [None; 3], "switched off by default");
    let qwen = json!({"sliding_window": 16, "max_window_layers": 1, "use_sliding_window": true});
    assert_eq!(parse("qwen2", qwen).windows, [None, Some(16), Some(16)]);
    let kinds = ["sliding_attention", "full_attention", "sliding_attention"];
    let qwen = json!({"sliding_window": 16, "use_sliding_window": true, "layer_types": kinds});
    assert_eq!(parse("qwen3", qwen).windows, [Some(16), None, Some(16)]);
}

#[test]
fn rope_of_both_generations() {
    let rope =
        parse("llama", json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}))
            .rope;
    assert_eq!(rope, RopeConfig { theta: 5e5, scaling: RopeScaling::Default });
    let rope = parse("llama", json!({"rope_scaling": {"type": "linear", "factor": 2.5}})).rope;
    assert_eq!(rope, RopeConfig { theta: 1e4, scaling: RopeScaling::Linear { factor: 2.5 } });
    assert_eq!(rope.inv_freq(4), [0.4, 0.004]);
    let nested =
        json!({"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 7.0}});
    assert_eq!(parse("qwen3", json!({"rope_parameters": nested})).rope.theta, 7.0);
    let llama3 = json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 256}});
    let fast_to_slow = parse("llama", llama3).rope.inv_freq(8);
    assert_eq!(fast_to_slow[0], 1.0, "a fast pair stays");
    assert!((fast_to_slow[3] - 1e-3 / 8.0).abs() < 1e-12, "a slow pair is stretched");
    assert!(fast_to_slow[1] < 0.1 + 1e-12 && fast_to_slow[1] > 0.1 / 8.0, "one between is blended");
}

#[test]
fn eos_may_be_one_many_or_none() {
    assert_eq!(parse("llama", json!({"eos_token_id": 3})).eos, [3]);
    assert_eq!(parse("llama", json!({"eos_token_id": [3, 5]})).eos, [3, 5]);
    assert!(parse("llama", json!({"eos_token_id": null})).eos.is_empty());
}

#[test]
fn what_is_not_computed_is_refused_by_key_and_value() {
    let cases = [
        (
            "gemma2",
            json!({}),
            "model_type = \"gemma2\": supported are llama, mistral, qwen2, qwen3",
        ),
        ("llama", json!({"hidden_act": "gelu"}), "hidden_act = \"gelu\": supported is silu"),
        ("llama", json!({"pretraining_tp": 2}), "pretraining_tp = 2: supported is 1"),
        (
            "llama",
            json!({"quantization_config": {"bits": 4}}),
            "quantization_config = {\"bits\":4}",
        ),
        ("llama", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor = 0.5"),
        ("llama", json!({"sliding_window": 8}), "sliding_window = 8: llama has no window"),
        (
            "llama",
            json!({"rope_scaling": {"type": "yarn", "factor": 2.0}}),
            "type = \"yarn\": supported are default, linear and llama3 (in rope_scaling)",
        ),
        ("llama", json!({"rope_parameters": {"rope_type": "dynamic"}}), "rope_type = \"dynamic\""),
        (
            "llama",
            json!({"rope_scaling": {"type": "linear"}}),
            "factor is missing (in rope_scaling)",
        ),
        ("llama", json!({"rope_theta": -1.0}), "rope_theta: -1 must be positive"),
        (
            "qwen3",
            json!({"rope_parameters": {"a": {"rope_theta": 1.0}, "b": {"rope_theta": 2.0}}}),
            "one setting for all layers",
        ),
        (
            "qwen2",
            json!({"layer_types": ["full_attention"]}),
            "layer_types: 1 entries for num_hidden_layers = 3",
        ),
        (
            "qwen2",
            json!({"layer_types": ["full_attention", "linear_attention", "full_attention"]}),
            "entry 1 is \"linear_attention\"; supported are",
        ),
        (
            "qwen2",
            json!({"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
            "entry 0 is sliding_attention, but no sliding_window is in use",
        ),
        (
            "mistral",
            json!({"sliding_window": 8, "layer_types": ["full_attention", "full_attention", "full_attention"]}),
            "holds for all layers",
        ),
        (
            "llama",
            json!({"hidden_size": 30}),
            "num_attention_heads: 4 does not divide hidden_size = 30",
        ),
        ("llama", json!({"num_key_value_heads": 3}), "num_key_value_heads: 3 does not divide"),
        ("llama", json!({"head_dim": 7}), "head_dim: 7 is odd"),
        ("llama", json!({"hidden_size": 0}), "hidden_size = 0: it must be at least 1"),
        ("llama", json!({"hidden_size": "32"}), "hidden_size = \"32\": it must be a whole number"),
        ("llama", json!({"rms_norm_eps": 0.0}), "rms_norm_eps = 0.0: it must lie between 0 and 1"),
        (
            "llama",
            json!({"eos_token_id": 100}),
            "eos_token_id = 100: ids are whole numbers below vocab_size = 100",
        ),
        ("llama", json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings = \"yes\""),
    ];
    for (family, changes, expected) in cases {
        let message = refusal(family, changes);
        assert!(message.starts_with("dir/config.json: "), "{message}");
        assert!(message.contains(expected), "{message} should say {expected}");
    }
}

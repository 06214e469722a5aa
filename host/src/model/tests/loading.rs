//! Weights that are not what they should be, each with its own error.

use super::*;
use crate::model::files::write_tensors;
use crate::model::frozen::Frozen;
use crate::model::lora::LoraTensor;
use crate::model::shards::Shards;

fn refusal(dir: &Path) -> String {
    Decoder::load(dir).unwrap_err().message
}

#[test]
fn shards_and_dtypes_are_read() {
    for name in MODELS {
        let model = Decoder::load(&model_dir(name)).unwrap();
        assert_eq!(model.layers.len(), model.config.layers, "{name}");
        let mut row = vec![f32::NAN; model.config.hidden];
        uft_kernels::embedding::gather(&model.embedding, &[1], &mut row);
        assert!(row.iter().all(|x| x.is_finite()), "{name}");
    }
}

/// Weights that are not aligned in their file are copied and compute the same.
#[test]
fn the_place_in_the_file_does_not_matter() {
    for name in ["llama", "qwen2", "mistral"] {
        let scratch = Scratch::copy_of(&model_dir(name), &format!("aligned-{name}"));
        let mut held = Vec::new();
        for file in Shards::open(&scratch.0).unwrap().files {
            // The header grows by a space, and everything behind it moves by a byte.
            let mut bytes = file.bytes().to_vec();
            let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            bytes[..8].copy_from_slice(&(header + 1).to_le_bytes());
            bytes.insert(8 + header as usize, b' ');
            std::fs::write(file.path(), bytes).unwrap();
        }
        let packed = pack(&[group(&responses(&expected(name, "responses.json"), "demos")[0])]);
        for dir in [model_dir(name), scratch.0.clone()] {
            let model = Decoder::load(&dir).unwrap();
            held.push((
                matches!(model.embedding, Frozen::Mapped { .. }),
                model.logps(&packed, None).unwrap(),
            ));
        }
        let [(mapped, logps), (still, moved)] = <[_; 2]>::try_from(held).unwrap();
        assert!(mapped && !still, "{name}");
        // A 16-bit weight is multiplied in panels, a copy of it as a whole: the last bits may differ.
        let logps: Vec<f64> = logps.into_iter().map(f64::from).collect();
        assert_close(name, &moved, &logps, 1e-6);
    }
}

#[test]
fn a_configuration_that_asks_for_other_shapes_is_named() {
    let scratch = Scratch::copy_of(&model_dir("llama"), "shapes");
    scratch.edit("config.json", |config| config["intermediate_size"] = 96.into());
    let message = refusal(&scratch.0);
    let expected =
        "model.safetensors: model.layers.0.mlp.gate_proj.weight: shape [64, 32], expected [96, 32]";
    assert!(message.ends_with(expected), "{message}");
}

#[test]
fn tensors_that_are_missing_or_too_many_are_named() {
    let scratch = Scratch::copy_of(&model_dir("llama"), "tensors");
    scratch.edit("config.json", |config| config["num_hidden_layers"] = 4.into());
    let message = refusal(&scratch.0);
    assert!(
        message.contains("the tensor model.layers.3.self_attn.q_proj.weight [32, 32] is missing"),
        "{message}"
    );
    scratch.edit("config.json", |config| config["num_hidden_layers"] = 2.into());
    let message = refusal(&scratch.0);
    assert!(
        message.contains("model.layers.2.input_layernorm.weight: not a tensor of a llama model"),
        "{message}"
    );
    let scratch = Scratch::copy_of(&model_dir("llama-bias"), "biases");
    scratch.edit("config.json", |config| config["attention_bias"] = false.into());
    let message = refusal(&scratch.0);
    assert!(message.contains("model.layers.0.self_attn.k_proj.bias: not a tensor"), "{message}");
    let scratch = Scratch::copy_of(&model_dir("mistral"), "tied");
    scratch.edit("config.json", |config| config["tie_word_embeddings"] = true.into());
    let message = refusal(&scratch.0);
    assert!(
        message.contains("lm_head.weight: differs from model.embed_tokens.weight"),
        "{message}"
    );
}

#[test]
fn an_index_that_does_not_fit_its_files_is_named() {
    const TENSOR: &str = "model.layers.1.mlp.up_proj.weight";
    let index = "model.safetensors.index.json";
    let scratch = Scratch::copy_of(&model_dir("mistral"), "index");
    let original = std::fs::read(scratch.0.join(index)).unwrap();
    let refused = |change: &dyn Fn(&mut Value)| {
        std::fs::write(scratch.0.join(index), &original).unwrap();
        scratch.edit(index, |value| change(&mut value["weight_map"]));
        refusal(&scratch.0)
    };
    let message = refused(&|map| map[TENSOR] = "model-00003-of-00002.safetensors".into());
    assert!(
        message.contains(
            "model-00003-of-00002.safetensors, which holds model.layers.1.mlp.up_proj.weight"
        ),
        "{message}"
    );
    let message = refused(&|map| map["model.extra"] = "model-00001-of-00002.safetensors".into());
    assert!(
        message.contains("model.extra is not in") && message.contains("model-00001"),
        "{message}"
    );
    let message = refused(&|map| drop(map.as_object_mut().unwrap().remove(TENSOR)));
    assert!(message.contains(TENSOR) && message.ends_with("is not listed"), "{message}");
    let message = refused(&|map| map[TENSOR] = "../model.safetensors".into());
    assert!(message.contains("is not a file name"), "{message}");
    let message = refused(&|map| *map = Value::Null);
    assert!(message.ends_with("weight_map is missing"), "{message}");

    std::fs::write(scratch.0.join(index), &original).unwrap();
    let duplicate = LoraTensor { name: TENSOR.into(), shape: [1, 1], data: &[0.0] };
    write_tensors(&scratch.0.join("extra.safetensors"), [duplicate]).unwrap();
    scratch.edit(index, |value| value["weight_map"][TENSOR] = "extra.safetensors".into());
    let message = refusal(&scratch.0);
    assert!(message.contains(&format!("{TENSOR} is also in")), "{message}");
}

#[test]
fn weights_that_are_not_finite_are_refused() {
    // f32, f16 and bf16; the last tensor's last element.
    for (name, infinity, file) in [
        ("llama", &f32::INFINITY.to_le_bytes()[..], "model.safetensors"),
        ("llama-bias", &[0x00, 0x7c], "model.safetensors"),
        ("mistral", &[0xc0, 0x7f], "model-00002-of-00002.safetensors"),
    ] {
        let scratch = Scratch::copy_of(&model_dir(name), &format!("not-finite-{name}"));
        let path = scratch.0.join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        let end = bytes.len() - infinity.len();
        bytes[end..].copy_from_slice(infinity);
        std::fs::write(&path, bytes).unwrap();
        let message = refusal(&scratch.0);
        assert!(message.contains(file) && message.contains("holds NaN or infinity"), "{message}");
    }
}

#[test]
fn files_that_are_no_safetensors_are_named() {
    let scratch = Scratch::copy_of(&model_dir("llama"), "cut");
    let path = scratch.0.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
    assert!(refusal(&scratch.0).contains("model.safetensors: not a whole safetensors file"));
    std::fs::write(&path, []).unwrap();
    assert!(refusal(&scratch.0).contains("model.safetensors: "));
    std::fs::remove_file(&path).unwrap();
    assert!(
        refusal(&scratch.0).contains("neither model.safetensors nor model.safetensors.index.json")
    );
    std::fs::remove_file(scratch.0.join("config.json")).unwrap();
    assert!(refusal(&scratch.0).contains("config.json: "));
}

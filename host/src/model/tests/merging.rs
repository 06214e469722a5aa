//! Merged models against base and adapter.

use super::*;
use crate::model::shards::Shards;

fn merge_and_compare(name: &str, adapter: &str, tolerance: f64) -> Scratch {
    let (from, out) = (model_dir(name), Scratch::new(&format!("merge-{name}-{adapter}")));
    merge::save(&from, &from.join(adapter), &out.0).unwrap();
    let (base, merged) = (Decoder::load(&from).unwrap(), Decoder::load(&out.0).unwrap());
    let lora = peft::load(&from.join(adapter), &base.config).unwrap();
    let responses = expected(name, "responses.json");
    let groups: Vec<Group> =
        responses["demos"].as_array().unwrap().iter().map(shared_group).collect();
    let packed = pack(&groups);
    let expected: Vec<f64> =
        base.logps(&packed, Some(&lora)).unwrap().into_iter().map(f64::from).collect();
    assert_close(
        &format!("{name} {adapter}"),
        &merged.logps(&packed, None).unwrap(),
        &expected,
        tolerance,
    );
    out
}

#[test]
fn merged_weights_compute_what_base_and_adapter_do() {
    merge_and_compare("llama", "adapter", 3e-5);
    merge_and_compare("llama", "adapter-patterns", 3e-5);
    // Rounded back to 16 bits.
    merge_and_compare("llama-bias", "adapter", 2e-2);
    let out = merge_and_compare("mistral", "adapter", 1e-1);
    let (before, after) =
        (Shards::open(&model_dir("mistral")).unwrap(), Shards::open(&out.0).unwrap());
    assert_eq!(before.files.len(), 2);
    for (before, after) in before.files.iter().zip(&after.files) {
        assert_eq!(before.header(), after.header(), "names, dtypes and places are kept");
    }
    for file in ["tokenizer.json", "config.json", "generation_config.json", shards::INDEX] {
        let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
        assert_eq!(read(&model_dir("mistral")), read(&out.0), "{file}");
    }
    assert!(!out.0.join("adapter").exists());
}

#[test]
fn an_adapted_head_is_untied() {
    let out = merge_and_compare("qwen2", "adapter-head", 3e-5);
    assert!(!ModelConfig::load(&out.0).unwrap().tied);
    assert!(out.0.join("chat_template.jinja").exists());
    let file = &Shards::open(&out.0).unwrap().files[0];
    assert_eq!(file.header().len() % 8, 0);
}

#[test]
fn a_directory_in_use_is_left_alone() {
    let from = model_dir("llama");
    let out = Scratch::copy_of(&from, "merge-in-use");
    let message = merge::save(&from, &from.join("adapter"), &out.0).unwrap_err().message;
    assert!(message.ends_with("the directory is not empty; name a new one"), "{message}");
}

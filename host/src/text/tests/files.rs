//! What a model directory and a row's fields bring along.

use super::rules::{SPECIAL, chat, only, text_sample};
use super::*;

#[test]
fn extra_fields_and_arguments_reach_the_template() {
    let text = chat(
        "{{ tools is none }}{{ documents is none }}{{ eos_token }}{{ bos_token is defined }}|{% for m in messages %}\
         {{ m.name }}{{ m.content is defined }}{{ m.thinking }}{{ m.reasoning_content }}{{ m.x is defined }}{% endfor %}|{{ enable_thinking }}{{ extra }}",
    );
    let mut message = Message::new("user", "");
    message.extra = r#"{"name": "N", "content": null, "x": null, "reasoning": "R"}"#.into();
    let args = r#"{"chat_template_kwargs": {"enable_thinking": false}, "extra": [1]}"#;
    let rendered = text.render(&[message.clone()], args, false).unwrap();
    assert_eq!(rendered, "TrueTrue<|im_end|>False|NFalseRRFalse|False[1]");

    let error = |args: &str| text.render(&[], args, false).unwrap_err().message;
    assert!(error(r#"{"messages": []}"#).contains("messages cannot be an argument"));
    assert!(error(r#"{"chat_template_kwargs": 1}"#).contains("not a JSON object"));
    assert!(error("[]").contains("not a JSON object"));
    message.extra = "{".into();
    assert!(text.render(&[message], "", false).is_err());
    // The marks of generation blocks cannot be forged.
    let forged = Message::new("user", "a\u{FDD1}\u{FDD0}b");
    assert!(text.render(&[forged], "", false).unwrap_err().message.contains("U+FDD0"));
    assert!(error(r#"{"extra": "\ufdd0"}"#).contains("U+FDD0"));
    let tools =
        chat("{{ tools[0].name }}").render(&[], r#"{"tools": "[{\"name\": \"f\"}]"}"#, false);
    assert_eq!(tools.unwrap(), "f");
}

#[test]
fn templates_are_found_where_transformers_looks() {
    let json = tokenizer(&[], &SPECIAL);
    let named = json!({"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]});
    let named_text = text(&json, named.clone(), None);
    assert!(named_text.has_template());
    assert_eq!(named_text.render(&[], "", false).unwrap(), "D");
    assert_eq!(named_text.render(&[], r#"{"tools": []}"#, false).unwrap(), "T");

    let dir = tempdir(&[("tokenizer.json", &json), ("tokenizer_config.json", &named)]);
    std::fs::write(dir.join("chat_template.jinja"), "J\n").unwrap();
    assert_eq!(Text::load(&dir).unwrap().render(&[], r#"{"tools": []}"#, false).unwrap(), "J");
    std::fs::create_dir(dir.join("additional_chat_templates")).unwrap();
    std::fs::write(dir.join("additional_chat_templates/tool_use.jinja"), "A").unwrap();
    assert_eq!(Text::load(&dir).unwrap().render(&[], r#"{"tools": []}"#, false).unwrap(), "A");
    assert_eq!(Text::load_with(&dir, Some("O")).unwrap().render(&[], "", false).unwrap(), "O");
    std::fs::write(dir.join("chat_template.jinja"), "\n{% bad %}").unwrap();
    let error = Text::load(&dir).err().unwrap().message;
    assert!(error.contains("chat_template.jinja, line 2"), "{error}");
    std::fs::remove_dir_all(dir).unwrap();

    let only_rag = json!({"chat_template": [{"name": "rag", "template": "R"}]});
    let error = text(&json, only_rag, None).render(&[], "", false).unwrap_err().message;
    assert!(error.contains("only [\"rag\"]"), "{error}");
    assert!(!text(&json, json!({}), None).has_template());
    assert!(text(&json, json!({"chat_template": "{{ strftime_now('%Y') }}"}), None).uses_clock());
}

#[test]
fn a_directory_that_lacks_something_says_what() {
    let dir = tempdir(&[]);
    let error = |dir: &Path| Text::load(dir).err().unwrap().message;
    assert!(error(&dir).contains("there is no tokenizer.json"));
    std::fs::write(dir.join("tokenizer.model"), "").unwrap();
    assert!(error(&dir).contains("save_pretrained"));
    std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    assert!(error(&dir).contains("tokenizer.json"));
    std::fs::write(dir.join("tokenizer.json"), tokenizer(&[], &SPECIAL).to_string()).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), r#"{"eos_token": "<end>"}"#).unwrap();
    assert!(error(&dir).contains("eos_token \"<end>\""));
    std::fs::write(dir.join("tokenizer_config.json"), "[").unwrap();
    assert!(error(&dir).contains("tokenizer_config.json"));
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn ids_that_end_a_response_are_collected() {
    let files = [
        ("tokenizer.json", tokenizer(&[], &SPECIAL)),
        ("special_tokens_map.json", json!({"eos_token": {"content": "</s>"}})),
        ("generation_config.json", json!({"eos_token_id": [259, 257]})),
        ("config.json", json!({"eos_token_id": 260, "vocab_size": 261})),
    ];
    let files: Vec<_> = files.iter().map(|(name, json)| (*name, json)).collect();
    let dir = tempdir(&files);
    let text = Text::load(&dir).unwrap();
    std::fs::remove_dir_all(dir).unwrap();
    assert_eq!(text.eos_ids(), [257, 259, 260]);
    assert_eq!(text.vocab_size(), 261);
    assert_eq!(text.decode(&[97, 257], true).unwrap(), "a");
    assert_eq!(text.token_text(259), "<|im_end|>");
}

#[test]
fn tokens_that_only_the_config_has_are_added() {
    let config = |id: &str| {
        json!({"added_tokens_decoder": {id: {"content": "<think>", "lstrip": false, "normalized": false,
               "rstrip": false, "single_word": false, "special": false}, "257": {"content": "</s>",
               "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true}}})
    };
    let json = tokenizer(&[], &SPECIAL);
    let text = text(&json, config("261"), None);
    assert_eq!(text.encode("<think></s>", false).unwrap(), [261, 257]);
    assert_eq!(
        (text.vocab_size(), text.decode(&[261, 257], true).unwrap()),
        (262, "<think>".into())
    );
    let dir = tempdir(&[("tokenizer.json", &json), ("tokenizer_config.json", &config("300"))]);
    let error = Text::load(&dir).err().unwrap().message;
    std::fs::remove_dir_all(dir).unwrap();
    assert!(error.contains("\"<think>\" as token 300"), "{error}");
}

/// A named token that tokenizer.json holds as an ordinary word is special all the same.
#[test]
fn named_tokens_are_special() {
    let words = tokenizer(&["<e>"], &[]);
    let text = text(&words, json!({"eos_token": "<e>"}), None);
    let group = only(text.encode_sample(&text_sample("q", "a"), &LIMITS).unwrap());
    assert_eq!(group.branches[0].tokens.last().copied(), text.tokenizer().id("<e>"));
    assert_eq!(text.decode(&group.branches[0].tokens, true).unwrap(), "a");
}

//! Tests of text: against transformers and TRL (`golden`, `templates`), and
//! rule by rule (`rules`, `files`).

mod files;
mod golden;
mod rules;
mod templates;

use super::*;
use crate::config::{EndOfTurn, LongRows};
use serde_json::{Value as Json, json};
use std::path::PathBuf;

/// A folder of the workspace's tests.
fn folder(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests").join(path)
}

fn read_json(path: PathBuf) -> Json {
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

fn read_lines(path: PathBuf) -> Vec<Json> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn ids(json: &Json) -> Vec<u32> {
    json.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// A record's message, as adapters make it: what is neither role nor text is in `extra`.
fn message(json: &Json) -> Message {
    let mut extra = json.as_object().unwrap().clone();
    let role = extra.shift_remove("role").unwrap();
    let content = extra.get("content").and_then(Json::as_str).map(str::to_owned);
    if content.is_some() {
        extra.shift_remove("content");
    }
    let mut message = Message::new(role.as_str().unwrap(), content.unwrap_or_default());
    if !extra.is_empty() {
        message.extra = serde_json::to_string(&extra).unwrap().into();
    }
    message
}

fn messages(json: &Json) -> Vec<Message> {
    json.as_array().unwrap().iter().map(message).collect()
}

const LIMITS: Limits =
    Limits { max_length: 4096, long_rows: LongRows::Skip, end_of_turn: EndOfTurn::Require };

/// A byte-level tokenizer of the 256 bytes (ids 0 to 255), some merged words and special tokens.
fn tokenizer(words: &[&str], special: &[&str]) -> Json {
    let mut alphabet: Vec<char> = (0..=255u8).map(byte_char).collect();
    alphabet.dedup();
    let mut vocab = serde_json::Map::new();
    for c in alphabet {
        vocab.insert(c.to_string(), vocab.len().into());
    }
    let mut merges = Vec::new();
    for word in words {
        // A word is merged from the left, character by character.
        let chars: Vec<String> = word.chars().map(String::from).collect();
        let mut known = chars[0].clone();
        for c in &chars[1..] {
            merges.push(json!(format!("{known} {c}")));
            known += c;
            if !vocab.contains_key(&known) {
                vocab.insert(known.clone(), vocab.len().into());
            }
        }
    }
    let first = vocab.len();
    let added: Vec<Json> = (first..)
        .zip(special)
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "!"},
        "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "ignore_merges": false, "vocab": vocab, "merges": merges},
    })
}

/// GPT-2's character for a byte.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(0x100 + before).unwrap()
}

/// A tokenizer that puts tokens around texts.
fn around(mut tokenizer: Json, before: &[&str], after: &[&str]) -> Json {
    let special = |content: &&str| json!({"SpecialToken": {"id": content, "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let single: Vec<Json> =
        before.iter().map(special).chain([text]).chain(after.iter().map(special)).collect();
    let ids: serde_json::Map<String, Json> = before
        .iter()
        .chain(after)
        .map(|content| {
            let added = tokenizer["added_tokens"].as_array().unwrap();
            let id = &added.iter().find(|t| t["content"] == **content).unwrap()["id"];
            ((*content).to_owned(), json!({"id": content, "ids": [id], "tokens": [content]}))
        })
        .collect();
    tokenizer["post_processor"] = json!({"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": ids});
    tokenizer
}

/// A text of a tokenizer.json, a tokenizer_config.json and a chat template.
fn text(tokenizer: &Json, config: Json, template: Option<&str>) -> Text {
    let dir = tempdir(&[("tokenizer.json", tokenizer), ("tokenizer_config.json", &config)]);
    let text = Text::load_with(&dir, template).unwrap();
    std::fs::remove_dir_all(dir).unwrap();
    text
}

/// A new directory with JSON files.
fn tempdir(files: &[(&str, &Json)]) -> PathBuf {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let name = format!("uft-text-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let dir = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&dir).unwrap();
    for (name, json) in files {
        std::fs::write(dir.join(name), json.to_string()).unwrap();
    }
    dir
}

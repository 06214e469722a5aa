//! The special tokens that a model directory names, beside its tokenizer.json.

use crate::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::path::Path;
use tokenizers::AddedToken;

/// The names under which transformers hands special tokens to chat templates.
pub const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What tokenizer_config.json, special_tokens_map.json, config.json and generation_config.json say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Specials {
    /// Texts of the named tokens, in the order of [`NAMES`].
    named: Vec<(&'static str, String)>,
    /// End-of-sequence ids of generation_config.json and config.json, in that order, once each.
    pub eos_ids: Vec<u32>,
    /// `added_tokens_decoder` of tokenizer_config.json, by rising id.
    pub added: Vec<(u32, AddedToken)>,
    /// tokenizer_config.json's own word on BOS in front of texts; unset: tokenizer.json decides.
    pub add_bos: Option<bool>,
    /// The same for EOS behind texts.
    pub add_eos: Option<bool>,
}

impl Specials {
    /// Reads the four files of a model directory, all of which may be missing.
    ///
    /// # Errors
    /// A file that is not a JSON object.
    pub fn load(dir: &Path, tokenizer_config: &Map<String, Value>) -> Result<Self> {
        let map = read_object(&dir.join("special_tokens_map.json"))?;
        let named = NAMES.iter().filter_map(|name| {
            let entry = tokenizer_config.get(*name).filter(|v| !v.is_null()).or(map.get(*name))?;
            Some((*name, token_text(entry)?))
        });
        let mut eos_ids = Vec::new();
        for file in ["generation_config.json", "config.json"] {
            for id in eos_of(&read_object(&dir.join(file))?) {
                if !eos_ids.contains(&id) {
                    eos_ids.push(id);
                }
            }
        }
        let flag = |key: &str| tokenizer_config.get(key).and_then(Value::as_bool);
        Ok(Self {
            named: named.collect(),
            eos_ids,
            added: added_tokens(tokenizer_config)
                .map_err(|e| e.at(dir.join("tokenizer_config.json").display()))?,
            add_bos: flag("add_bos_token"),
            add_eos: flag("add_eos_token"),
        })
    }

    /// The text of a named token: `get("eos_token")`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(n, _)| *n == name).map(|(_, text)| text)
    }

    /// Names and texts of the tokens that there are.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.named.iter().map(|(name, text)| (*name, text.as_str()))
    }
}

/// A JSON object from a file; an empty one if the file does not exist.
///
/// # Errors
/// A file that cannot be read, or holds anything but an object.
pub fn read_object(path: &Path) -> Result<Map<String, Value>> {
    if !path.exists() {
        return Ok(Map::new());
    }
    let fail = |e: &dyn std::fmt::Display| Error::data(e.to_string()).at(path.display());
    let text = std::fs::read_to_string(path).map_err(|e| fail(&e))?;
    match serde_json::from_str(&text).map_err(|e| fail(&e))? {
        Value::Object(object) => Ok(object),
        _ => Err(fail(&"not a JSON object")),
    }
}

/// An added token is written as its text or as an object with the text in `content`.
fn token_text(entry: &Value) -> Option<String> {
    let text = entry.as_str().or_else(|| entry.get("content")?.as_str())?;
    Some(text.to_owned()).filter(|t| !t.is_empty())
}

/// The entries of `added_tokens_decoder`: `{"151643": {"content": "<|endoftext|>", …}}`.
fn added_tokens(config: &Map<String, Value>) -> Result<Vec<(u32, AddedToken)>> {
    let Some(Value::Object(entries)) = config.get("added_tokens_decoder") else {
        return Ok(Vec::new());
    };
    let mut added = Vec::with_capacity(entries.len());
    for (id, entry) in entries {
        let token = id.parse().ok().zip(AddedToken::deserialize(entry).ok());
        added.push(token.ok_or_else(|| {
            Error::data(format!("added_tokens_decoder: {id} is not the id of an added token"))
        })?);
    }
    added.sort_by_key(|(id, _)| *id);
    Ok(added)
}

/// `eos_token_id`: a number, a list of numbers, or null. Multimodal configs keep it in `text_config`.
fn eos_of(config: &Map<String, Value>) -> Vec<u32> {
    let entry = config
        .get("eos_token_id")
        .or_else(|| config.get("text_config")?.get("eos_token_id"))
        .unwrap_or(&Value::Null);
    let ids = entry.as_array().map_or(std::slice::from_ref(entry), Vec::as_slice);
    ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tokens_are_texts_or_objects() {
        assert_eq!(token_text(&json!("</s>")).as_deref(), Some("</s>"));
        assert_eq!(token_text(&json!({"content": "<s>", "lstrip": false})).as_deref(), Some("<s>"));
        assert_eq!(token_text(&json!(null)), None);
        assert_eq!(token_text(&json!("")), None);
    }

    #[test]
    fn eos_ids_are_numbers_or_lists() {
        let of = |v: Value| eos_of(v.as_object().unwrap());
        assert_eq!(of(json!({"eos_token_id": 2})), [2]);
        assert_eq!(of(json!({"eos_token_id": [7, 9]})), [7, 9]);
        assert_eq!(of(json!({"eos_token_id": null})), [] as [u32; 0]);
        assert_eq!(of(json!({"text_config": {"eos_token_id": 1}})), [1]);
    }
}

//! JSON and messages as chat templates see them.

use super::template::{END, START};
use crate::{Error, Result};
pub use minijinja::Value;
use serde_json::{Map, Value as Json};
use uft_core::Message;

/// Where models that think keep their thoughts, the first of them being the usual place.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Arguments of the template that the renderer sets itself.
const RESERVED: [&str; 6] = [
    "messages",
    "conversation",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
];

/// JSON as a template value.
pub fn from_json(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => Value::from(n),
            (_, Some(n)) => Value::from(n),
            _ => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(s) => Value::from(s.as_str()),
        Json::Array(items) => items.iter().map(from_json).collect::<Vec<_>>().into(),
        Json::Object(object) => {
            Value::from_pairs(object.iter().map(|(k, v)| (k.as_str(), from_json(v))))
        }
    }
}

/// A message as a template value, prepared as transformers does: fields that are null are left out,
/// and thoughts can be read under all of their usual names.
///
/// `extra` is laid over `role` and `content`, so a record can say `"content": null` or give parts.
///
/// # Errors
/// `extra` that is not a JSON object; noncharacters that generation blocks are marked with.
pub fn message(message: &Message) -> Result<Value> {
    let mut fields = Map::new();
    fields.insert("role".into(), message.role.as_str().into());
    fields.insert("content".into(), message.content.as_str().into());
    fields.extend(object(&message.extra, "a message's extra fields")?);
    fields.retain(|_, value| !value.is_null());
    refuse_marks(&fields)?;
    if let Some(thoughts) = REASONING.iter().find_map(|name| fields.get(*name)).cloned() {
        fields.entry("thinking").or_insert(thoughts.clone());
        fields.insert(REASONING[0].into(), thoughts);
    }
    Ok(from_json(&Json::Object(fields)))
}

/// The variables that `template_args` add: `tools`, `documents` (null if not given), the contents
/// of `chat_template_kwargs`, and all other keys as they are.
///
/// # Errors
/// Anything but a JSON object; a variable that the renderer sets itself.
pub fn arguments(template_args: &str) -> Result<Vec<(String, Value)>> {
    let mut args = object(template_args, "the template's arguments")?;
    let kwargs = match args.remove("chat_template_kwargs") {
        None | Some(Json::Null) => Map::new(),
        Some(Json::Object(kwargs)) => kwargs,
        Some(_) => return Err(Error::data("chat_template_kwargs is not a JSON object")),
    };
    // TRL's datasets keep the tools as a JSON text.
    if let Some(Json::String(text)) = args.get("tools") {
        let tools = serde_json::from_str(text)
            .map_err(|e| Error::data(format!("tools is a text, but not of JSON: {e}")))?;
        args.insert("tools".into(), tools);
    }
    let mut all = Map::new();
    all.insert("tools".into(), Json::Null);
    all.insert("documents".into(), Json::Null);
    all.extend(args);
    all.extend(kwargs);
    refuse_marks(&all)?;
    if let Some(name) = RESERVED.iter().find(|name| all.contains_key(**name)) {
        return Err(Error::data(format!("{name} cannot be an argument of the chat template")));
    }
    Ok(all.iter().map(|(name, value)| (name.clone(), from_json(value))).collect())
}

/// Refuses the characters that blocks of a template are marked with; to Unicode they are none.
fn refuse_marks(fields: &Map<String, Json>) -> Result<()> {
    fn marked(json: &Json) -> bool {
        match json {
            Json::String(text) => text.contains([START, END]),
            Json::Array(items) => items.iter().any(marked),
            Json::Object(fields) => fields.values().any(marked),
            _ => false,
        }
    }
    if fields.values().any(marked) {
        return Err(Error::data("the text contains U+FDD0 or U+FDD1, which are no characters"));
    }
    Ok(())
}

/// A JSON object; an empty text is an empty one.
fn object(text: &str, what: &str) -> Result<Map<String, Json>> {
    if text.is_empty() {
        return Ok(Map::new());
    }
    match serde_json::from_str(text) {
        Ok(Json::Object(object)) => Ok(object),
        Ok(_) => Err(Error::data(format!("{what} are not a JSON object: {text}"))),
        Err(e) => Err(Error::data(format!("{what} are not JSON: {e}"))),
    }
}

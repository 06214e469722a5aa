//! A data record as an adapter reads it.

use crate::fault::Fault;
use crate::sample::{Content, Message};
use serde_json::Map;
/// What [`Record::get`] gives.
pub use serde_json::Value;

/// One JSON object of a data file, its fields renamed by the adapter's `columns`.
#[derive(Debug)]
pub struct Record {
    fields: Map<String, Value>,
    /// Field → the name it has in the file.
    columns: Vec<(String, String)>,
}

impl Record {
    /// # Errors
    /// If the text is not a JSON object, or a mapped column is missing from it.
    pub fn parse(json: &str, columns: &[(String, String)]) -> Result<Self, Fault> {
        let fields = match serde_json::from_str(json) {
            Ok(Value::Object(fields)) => fields,
            Ok(_) => return Err(Fault::record("the record is not a JSON object")),
            Err(error) => {
                return Err(Fault::record(format!("the record is not valid JSON: {error}")));
            }
        };
        let mut record = Self { fields, columns: columns.to_vec() };
        let taken: Vec<_> = columns
            .iter()
            .map(|(field, column)| (field, column, record.fields.shift_remove(column)))
            .collect();
        for (field, column, value) in taken {
            let Some(value) = value else {
                return Err(Fault::record(format!("no column `{column}` (mapped to `{field}`)")));
            };
            record.fields.insert(field.clone(), value);
        }
        Ok(record)
    }

    /// The field's value; a JSON `null` counts as missing.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|v| !v.is_null())
    }

    /// Whether the field is there and not `null`.
    pub fn has(&self, field: &str) -> bool {
        self.get(field).is_some()
    }

    /// The first of some alternative fields that is there.
    ///
    /// # Errors
    /// If none is, naming them and the fields that are.
    pub fn first_of<'f>(&self, fields: &[&'f str]) -> Result<&'f str, Fault> {
        fields
            .iter()
            .copied()
            .find(|f| self.has(f))
            .ok_or_else(|| self.missing(&fields.join("` or `")))
    }

    /// A text.
    ///
    /// # Errors
    /// If the field is missing or not a text.
    pub fn text(&self, field: &str) -> Result<&str, Fault> {
        self.require(field)?.as_str().ok_or_else(|| self.wrong(field, "a text"))
    }

    /// A number; a text that reads as one is taken too.
    ///
    /// # Errors
    /// If the field is missing or no finite number.
    pub fn number(&self, field: &str) -> Result<f64, Fault> {
        finite(self.require(field)?).ok_or_else(|| self.wrong(field, "a number"))
    }

    /// A boolean; `0`, `1`, `-1` and `"true"`/`"false"` are taken too.
    ///
    /// # Errors
    /// If the field is missing or is none of these.
    pub fn boolean(&self, field: &str) -> Result<bool, Fault> {
        let value = self.require(field)?;
        let known = match value {
            Value::Bool(b) => Some(*b),
            Value::Number(n) if n.as_i64() == Some(1) => Some(true),
            Value::Number(n) if matches!(n.as_i64(), Some(0 | -1)) => Some(false),
            Value::String(s) if s.eq_ignore_ascii_case("true") => Some(true),
            Value::String(s) if s.eq_ignore_ascii_case("false") => Some(false),
            _ => None,
        };
        known.ok_or_else(|| self.wrong(field, "true or false"))
    }

    /// A text or a list of messages `{role, content, …}`.
    ///
    /// # Errors
    /// If the field is missing or neither.
    pub fn content(&self, field: &str) -> Result<Content, Fault> {
        self.read_content(field, self.column(field), self.require(field)?)
    }

    /// A list of texts or of lists of messages: several responses to one prompt.
    ///
    /// # Errors
    /// If the field is missing or something else.
    pub fn contents(&self, field: &str) -> Result<Vec<Content>, Fault> {
        let list = self.list(field)?.iter().enumerate();
        list.map(|(i, value)| {
            self.read_content(field, &format!("{}[{i}]", self.column(field)), value)
        })
        .collect()
    }

    /// A list of numbers.
    ///
    /// # Errors
    /// If the field is missing or something else.
    pub fn numbers(&self, field: &str) -> Result<Vec<f64>, Fault> {
        let numbers: Option<Vec<f64>> = self.list(field)?.iter().map(finite).collect();
        numbers.ok_or_else(|| self.wrong(field, "a list of numbers"))
    }

    /// A list of messages `{role, content, …}`; further fields of a message go to the template.
    ///
    /// # Errors
    /// If the field is missing or a message has no role or no text.
    pub fn messages(&self, field: &str) -> Result<Vec<Message>, Fault> {
        match self.require(field)? {
            Value::Array(list) => read_messages(self.column(field), list),
            _ => Err(self.wrong(field, "a list of messages")),
        }
    }

    /// The JSON object for [`Sample::template_args`](crate::sample::Sample): `tools` and the
    /// fields of `chat_template_kwargs`; empty if there are none.
    ///
    /// # Errors
    /// If `chat_template_kwargs` is not an object.
    pub fn template_args(&self) -> Result<String, Fault> {
        let mut args = match self.get("chat_template_kwargs") {
            None => Map::new(),
            Some(Value::Object(kwargs)) => kwargs.clone(),
            Some(_) => return Err(self.wrong("chat_template_kwargs", "an object")),
        };
        if let Some(tools) = self.get("tools") {
            args.insert("tools".into(), tools.clone());
        }
        Ok(if args.is_empty() { String::new() } else { Value::Object(args).to_string() })
    }

    fn read_content(&self, field: &str, name: &str, value: &Value) -> Result<Content, Fault> {
        match value {
            Value::String(text) => Ok(Content::text(text.as_str())),
            Value::Array(list) => Ok(Content::messages(read_messages(name, list)?)),
            _ => Err(self.wrong(field, "a text or a list of messages")),
        }
    }

    fn list(&self, field: &str) -> Result<&[Value], Fault> {
        let list = self.require(field)?.as_array();
        list.map(Vec::as_slice).ok_or_else(|| self.wrong(field, "a list"))
    }

    fn require(&self, field: &str) -> Result<&Value, Fault> {
        self.get(field).ok_or_else(|| self.missing(field))
    }

    fn missing(&self, field: &str) -> Fault {
        let there: Vec<&str> = self.fields.keys().map(String::as_str).collect();
        Fault::record(format!("no field `{field}`; the record has: {}", there.join(", ")))
    }

    fn wrong(&self, field: &str, wanted: &str) -> Fault {
        let mut shown = self.fields.get(field).map(Value::to_string).unwrap_or_default();
        if shown.chars().count() > 40 {
            shown = shown.chars().take(40).chain("…".chars()).collect();
        }
        Fault::record(format!("`{}` must be {wanted}, not {shown}", self.column(field)))
    }

    /// The name that a field has in the file.
    pub fn column<'a>(&'a self, field: &'a str) -> &'a str {
        self.columns.iter().find(|(f, _)| f == field).map_or(field, |(_, column)| column)
    }
}

/// A number, also as a text.
fn finite(value: &Value) -> Option<f64> {
    let number = value.as_f64().or_else(|| value.as_str()?.trim().parse().ok());
    number.filter(|n| n.is_finite())
}

fn read_messages(name: &str, list: &[Value]) -> Result<Vec<Message>, Fault> {
    let parsed = list.iter().enumerate().map(|(i, value)| {
        message(value).map_err(|why| Fault::record(format!("`{name}` message {i}: {why}")))
    });
    parsed.collect()
}

fn message(value: &Value) -> Result<Message, String> {
    let fields = value.as_object().ok_or("not an object with `role` and `content`")?;
    let role = fields.get("role").and_then(Value::as_str).ok_or("no text `role`")?;
    let content = match fields.get("content") {
        Some(Value::String(text)) => text.clone(),
        // A tool call has no content of its own.
        None | Some(Value::Null) if fields.contains_key("tool_calls") => String::new(),
        Some(Value::Array(parts)) => text_parts(parts)?,
        _ => return Err("no text `content`".into()),
    };
    let mut message = Message::new(role, content);
    let extra: Map<String, Value> = fields
        .iter()
        .filter(|(k, _)| *k != "role" && *k != "content")
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    if !extra.is_empty() {
        message.extra = Value::Object(extra).to_string().into();
    }
    Ok(message)
}

/// `[{"type": "text", "text": …}, …]` as one text.
fn text_parts(parts: &[Value]) -> Result<String, String> {
    let text = |part: &Value| match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text.to_owned()),
        _ => Err("`content` has a part that is not text".to_owned()),
    };
    parts.iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(json: &str) -> Record {
        Record::parse(json, &[]).unwrap()
    }

    #[test]
    fn columns_rename_and_faults_speak_of_the_file() {
        let columns = vec![("prompt".to_owned(), "question".to_owned())];
        let r = Record::parse(r#"{"question": 7, "prompt": "other"}"#, &columns).unwrap();
        assert_eq!(
            r.text("prompt").unwrap_err().message.as_str(),
            "`question` must be a text, not 7"
        );
        let e = Record::parse(r#"{"q": 1}"#, &columns).unwrap_err();
        assert_eq!(e.message.as_str(), "no column `question` (mapped to `prompt`)");
    }

    #[test]
    fn messages_keep_what_templates_may_want() {
        let r = record(
            r#"{"m": [{"role": "assistant", "tool_calls": [1]}, {"role": "user", "content": [{"type": "text", "text": "a"}]}]}"#,
        );
        let messages = r.messages("m").unwrap();
        assert_eq!(messages[0].extra.as_str(), r#"{"tool_calls":[1]}"#);
        assert_eq!(messages[1].content.as_str(), "a");
        let r = record(r#"{"m": [{"role": "user"}]}"#);
        assert_eq!(
            r.messages("m").unwrap_err().message.as_str(),
            "`m` message 0: no text `content`"
        );
    }

    #[test]
    fn a_missing_field_lists_what_is_there() {
        let r = record(r#"{"prompt": "a", "answer": null}"#);
        let e = r.first_of(&["completion", "response"]).unwrap_err();
        assert_eq!(
            e.message.as_str(),
            "no field `completion` or `response`; the record has: prompt, answer"
        );
        assert!(!r.has("answer"));
    }

    #[test]
    fn lists_name_the_entry_that_is_wrong() {
        let r = record(r#"{"t": ["a", [{"role": "user"}]], "n": [1, "2.5"], "x": "a"}"#);
        assert_eq!(
            r.contents("t").unwrap_err().message.as_str(),
            "`t[1]` message 0: no text `content`"
        );
        assert_eq!(r.numbers("n").unwrap(), [1.0, 2.5]);
        assert_eq!(r.numbers("x").unwrap_err().message.as_str(), "`x` must be a list, not \"a\"");
    }

    #[test]
    fn numbers_and_booleans_in_the_forms_that_files_have() {
        let r = record(r#"{"a": "3.5", "b": 1, "c": "False", "d": -1, "e": "NaN"}"#);
        assert_eq!(r.number("a").unwrap(), 3.5);
        assert!(r.boolean("b").unwrap() && !r.boolean("c").unwrap() && !r.boolean("d").unwrap());
        assert!(r.number("e").is_err() && r.boolean("a").is_err());
    }
}

//! Conversations that call tools, as demonstrations.
//!
//! | record | fields |
//! |---|---|
//! | messages | `messages` with `tool_calls` and turns of the role `tool`, `tools` |
//! | xLAM (`Salesforce/xlam-function-calling-60k`) | `query`, `answers`: `{name, arguments}`, `tools` |
//!
//! `tools`, `answers` and the `arguments` of a call may be JSON or a text that holds it, as published files have
//! them; templates get JSON. xLAM's tools, whose parameters are `{name: {type, description, default}}` with
//! Python's types, become the JSON schemas that templates expect: what has neither a default nor
//! `optional` in its type is required, and a type without a name in JSON is left open.

use serde_json::{Map, Value, json};
use uft_core::prelude::*;

/// Python's types, as they begin, and JSON's.
const TYPES: [(&str, &str); 8] = [
    ("str", "string"),
    ("int", "integer"),
    ("float", "number"),
    ("bool", "boolean"),
    ("list", "array"),
    ("tuple", "array"),
    ("set", "array"),
    ("dict", "object"),
];

pub struct ToolCalls;

impl FeedbackAdapter for ToolCalls {
    const NAME: &'static str = "tool-calls";
    const ABOUT: &'static str = "messages with tool_calls, tools | xLAM's query, answers, tools";

    fn new(_: &mut Params) -> Self {
        Self
    }

    fn offers(&self) -> Kinds {
        Kinds::DEMONSTRATION
    }

    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        let (field, mut turns) = match record.first_of(&["messages", "query"])? {
            "query" => {
                ("answers", vec![Message::new("user", record.text("query")?), calls(record)?])
            }
            field => (field, record.messages(field)?),
        };
        let name = record.column(field);
        turns.iter_mut().try_for_each(|turn| parse_arguments(name, turn))?;
        let first = turns.iter().position(|turn| turn.role == "assistant");
        let Some(first @ 1..) = first else {
            let why = if first.is_none() { "has no" } else { "begins with an" };
            return Err(Fault::record(format!("`{name}` {why} assistant message")));
        };
        let response = turns.split_off(first);
        let chat = Chat::from_params(&mut Params::default());
        let mut sample = chat.sample(record, Content::messages(turns))?;
        sample.template_args = template_args(record)?.into();
        let response = chat.response(name, Content::messages(response), &sample.prompt)?;
        Ok(vec![sample.response(response, Feedback::Demonstration)])
    }
}

/// A JSON value, or the one that a text holds.
fn parsed(name: &str, value: &Value) -> Result<Value, Fault> {
    let Value::String(text) = value else { return Ok(value.clone()) };
    serde_json::from_str(text).map_err(|e| Fault::record(format!("`{name}` is not JSON: {e}")))
}

/// A list of objects, or a text that holds one.
fn objects(record: &Record, field: &str) -> Result<Vec<Map<String, Value>>, Fault> {
    let name = record.column(field);
    let list = parsed(name, record.get(field).unwrap_or(&Value::Null))?;
    let objects = list.as_array().and_then(|list| {
        list.iter().map(|object| object.as_object().cloned()).collect::<Option<Vec<_>>>()
    });
    objects.ok_or_else(|| Fault::record(format!("`{name}` must be a list of objects")))
}

/// xLAM's answers as the assistant's message.
fn calls(record: &Record) -> Result<Message, Fault> {
    let answers = objects(record, "answers")?;
    let name = record.column("answers");
    if answers.is_empty() {
        return Err(Fault::record(format!("`{name}` calls nothing")));
    }
    let call = |(i, answer): (usize, &Map<String, Value>)| match (
        answer.get("name").and_then(Value::as_str),
        answer.get("arguments"),
    ) {
        (Some(function), Some(arguments)) => Ok(json!({
            "type": "function",
            "function": { "name": function, "arguments": arguments },
        })),
        _ => Err(Fault::record(format!("`{name}[{i}]` has no `name` and `arguments`"))),
    };
    let calls = answers.iter().enumerate().map(call).collect::<Result<Vec<_>, _>>()?;
    let mut message = Message::new("assistant", "");
    message.extra = json!({ "tool_calls": calls }).to_string().into();
    Ok(message)
}

/// The arguments of a message's calls as JSON, where they are text.
fn parse_arguments(name: &str, message: &mut Message) -> Result<(), Fault> {
    if message.extra.is_empty() {
        return Ok(());
    }
    let mut extra = parsed(name, &Value::String(message.extra.to_string()))?;
    let calls = extra.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        if let Some(arguments) = call.pointer_mut("/function/arguments") {
            *arguments = parsed(&format!("{name}: arguments"), arguments)?;
        }
    }
    message.extra = extra.to_string().into();
    Ok(())
}

/// The template's arguments, with tools in the form that templates expect.
fn template_args(record: &Record) -> Result<String, Fault> {
    let given = record.template_args()?;
    if !record.has("tools") {
        return Ok(given);
    }
    let tools: Vec<Value> = objects(record, "tools")?.into_iter().map(tool).collect();
    let mut args = parsed("chat_template_kwargs", &Value::String(given))?;
    args["tools"] = Value::Array(tools);
    Ok(args.to_string())
}

/// A tool as `{"type": "function", "function": …}`.
fn tool(mut tool: Map<String, Value>) -> Value {
    if tool.contains_key("function") {
        return Value::Object(tool);
    }
    if let Some(Value::Object(parameters)) = tool.get("parameters")
        && !parameters.contains_key("properties")
    {
        let schema = schema(parameters);
        tool.insert("parameters".into(), schema);
    }
    json!({ "type": "function", "function": tool })
}

/// xLAM's parameters as a JSON schema.
fn schema(parameters: &Map<String, Value>) -> Value {
    let (mut properties, mut required) = (Map::new(), Vec::new());
    for (name, about) in parameters {
        let mut property = about.as_object().cloned().unwrap_or_default();
        let python =
            property.get("type").and_then(Value::as_str).unwrap_or_default().to_lowercase();
        let optional = python.contains("optional") || property.contains_key("default");
        match TYPES.iter().find(|(begins, _)| python.starts_with(begins)) {
            Some((_, json)) => property.insert("type".into(), (*json).into()),
            None => property.shift_remove("type"),
        };
        if !optional {
            required.push(Value::from(name.as_str()));
        }
        properties.insert(name.clone(), Value::Object(property));
    }
    json!({ "type": "object", "properties": properties, "required": required })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{adapted, fault, messages};
    use super::*;

    const MESSAGES: &str = include_str!("../fixtures/tool-calls.jsonl");
    const XLAM: &str = include_str!("../fixtures/xlam.jsonl");

    fn value(text: &str) -> Value {
        serde_json::from_str(text).unwrap()
    }

    /// The response's messages.
    fn turns(sample: &Sample) -> Vec<Message> {
        match &sample.responses[0].content {
            Content::Messages(messages) => messages.to_vec(),
            Content::Text(_) => panic!("a chat"),
        }
    }

    #[test]
    fn calls_and_results_are_the_response_and_arguments_are_json() {
        for sample in adapted::<ToolCalls>("{}", MESSAGES).into_iter().flatten() {
            let asked = [("system", "You may use tools."), ("user", "Is it warm in Oslo?")];
            assert_eq!(sample.prompt, messages(&asked));
            let turns = turns(&sample);
            let roles: Vec<&str> = turns.iter().map(|turn| turn.role.as_str()).collect();
            assert_eq!(roles, ["assistant", "tool", "assistant"]);
            let call = &value(&turns[0].extra)["tool_calls"][0]["function"];
            assert_eq!(*call, json!({"name": "weather", "arguments": {"city": "Oslo"}}));
            assert_eq!(value(&turns[1].extra)["name"], "weather");
            let tools = &value(&sample.template_args)["tools"];
            assert_eq!(tools[0]["function"]["parameters"]["required"], json!(["city"]));
        }
    }

    #[test]
    fn xlam_is_a_question_and_its_calls() {
        let samples = adapted::<ToolCalls>("{}", XLAM);
        let sample = &samples[0][0];
        assert_eq!(sample.prompt, messages(&[("user", "What do 3 pounds cost in Bern and Rome?")]));
        let turns = turns(sample);
        let calls = value(&turns[0].extra)["tool_calls"].clone();
        assert_eq!(turns.len(), 1);
        assert_eq!(
            calls[1],
            json!({"type": "function", "function": {"name": "price", "arguments": {"city": "Rome", "pounds": 3}}})
        );
        let tools = &value(&sample.template_args)["tools"];
        let expected = json!([{"type": "function", "function": {
            "name": "price",
            "description": "The price of apples.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"description": "Where.", "type": "string"},
                    "pounds": {"description": "How many.", "type": "number", "default": 1},
                    "sorts": {"description": "Which.", "type": "array"},
                    "at": {"description": "When."}
                },
                "required": ["city", "at"]
            }
        }}]);
        assert_eq!(*tools, expected);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (record, says) in [
            (
                r#"{"query": "Q", "answers": "[", "tools": "[]"}"#,
                "`answers` is not JSON: EOF while parsing a list at line 1 column 1",
            ),
            (r#"{"query": "Q", "answers": [], "tools": []}"#, "`answers` calls nothing"),
            (
                r#"{"query": "Q", "answers": [{"name": "f"}], "tools": []}"#,
                "`answers[0]` has no `name` and `arguments`",
            ),
            (
                r#"{"query": "Q", "answers": [{"name": "f", "arguments": {}}], "tools": {"f": 1}}"#,
                "`tools` must be a list of objects",
            ),
            (
                r#"{"messages": [{"role": "user", "content": "Q"}]}"#,
                "`messages` has no assistant message",
            ),
            (
                r#"{"messages": [{"role": "assistant", "content": "A"}]}"#,
                "`messages` begins with an assistant message",
            ),
            (
                r#"{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}"#,
                "`messages: arguments` is not JSON: EOF while parsing an object at line 1 column 1",
            ),
        ] {
            assert_eq!(fault::<ToolCalls>("{}", record), says);
        }
    }
}

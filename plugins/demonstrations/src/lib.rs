//! Records to be imitated.
//!
//! | record | fields |
//! |---|---|
//! | conversation | `messages`: `role`, `content` |
//! | ShareGPT | `conversations`: `from`, `value` (or `role`, `content`); `system` if there is one |
//! | prompt and completion | `prompt`, `completion` or `response`: texts or lists of messages |
//! | Alpaca | `instruction`, `output`; `input` and `system` if there are any |
//!
//! The first of these whose first field is there is taken. A conversation's prompt is all before
//! its first assistant message. `turns = "together"` makes all assistant turns one response;
//! `"each"` makes each a response of its own with the history before it, as the UFT paper unfolds
//! conversations (arXiv 2410.21438).

use uft_core::prelude::*;
use uft_core::record::Value;

/// ShareGPT's speakers and the roles that they are.
const SPEAKERS: [(&str, &str); 9] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("chatgpt", "assistant"),
    ("assistant", "assistant"),
    ("system", "system"),
    ("tool", "tool"),
    ("observation", "tool"),
    ("function_response", "tool"),
];

struct Demonstrations {
    chat: Chat,
    turns: Turns,
    cut: bool,
}

impl FeedbackAdapter for Demonstrations {
    const NAME: &'static str = "demonstrations";
    const ABOUT: &'static str =
        "messages | conversations | prompt, completion|response | instruction, input, output";

    fn new(params: &mut Params) -> Self {
        let turns = params.choice(
            "turns",
            "together",
            &["together", "each"],
            "all assistant turns of a conversation are one response, or each is its own",
        );
        let trailing = params.choice(
            "trailing",
            "refuse",
            &["refuse", "cut"],
            "what becomes of messages behind the last assistant turn, which train nothing",
        );
        Self {
            chat: Chat::from_params(params),
            turns: if turns == "each" { Turns::Each } else { Turns::Together },
            cut: trailing == "cut",
        }
    }

    fn offers(&self) -> Kinds {
        Kinds::DEMONSTRATION
    }

    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        let (chat, field, prompt, response) = self.parts(record)?;
        let name = record.column(field);
        let sample = chat.sample(record, prompt)?;
        let response = chat.response(name, self.ended(name, response)?, &sample.prompt)?;
        Ok(vec![sample.response(response, Feedback::Demonstration).turns(self.turns)])
    }
}

impl Demonstrations {
    /// How strings are read, the response's field, prompt and response.
    fn parts(&self, record: &Record) -> Result<(Chat, &'static str, Content, Content), Fault> {
        match record.first_of(&["messages", "conversations", "prompt", "instruction"]) {
            Ok(field @ ("messages" | "conversations")) => {
                let (prompt, response) = split(record.column(field), conversation(record, field)?)?;
                Ok((self.chat, field, prompt, response))
            }
            Ok("prompt") => {
                let field = record.first_of(&["completion", "response"])?;
                Ok((self.chat, field, record.content("prompt")?, record.content(field)?))
            }
            Ok(_) => {
                let chat = self.chat.instruction_data();
                let answer = Content::text(record.text("output")?);
                Ok((chat, "output", instruction(record, chat)?, answer))
            }
            Err(_) if record.has("text") => Err(Fault::record(
                "`text` alone does not say what is prompt and what is answer: give `prompt`, which \
                 may be empty, and `completion`",
            )),
            Err(fault) => Err(fault),
        }
    }

    /// The response up to its last assistant message.
    fn ended(&self, name: &str, mut response: Content) -> Result<Content, Fault> {
        if let Content::Messages(messages) = &mut response
            && let Some(last) = messages.iter().rposition(|m| m.role == "assistant")
            && let Some(trailing) = messages.get(last + 1)
        {
            if !self.cut {
                return Err(Fault::record(format!(
                    "`{name}` ends with a `{}` message that nobody answers; `trailing = \"cut\"` \
                     leaves it out",
                    trailing.role
                )));
            }
            messages.truncate(last + 1);
        }
        Ok(response)
    }
}

/// A field that may be missing or empty.
fn optional<'r>(record: &'r Record, field: &str) -> Result<Option<&'r str>, Fault> {
    let text = record.has(field).then(|| record.text(field)).transpose()?;
    Ok(text.filter(|text| !text.is_empty()))
}

/// Alpaca's prompt: the instruction, its input behind an empty line, and what the system says.
fn instruction(record: &Record, chat: Chat) -> Result<Content, Fault> {
    let instruction = record.text("instruction")?;
    let prompt = match optional(record, "input")? {
        Some(input) => format!("{instruction}\n\n{input}"),
        None => instruction.to_owned(),
    };
    Ok(match optional(record, "system")? {
        None => Content::text(prompt),
        Some(system) if chat.is_text() => Content::text(format!("{system}\n\n{prompt}")),
        Some(system) => {
            Content::messages([Message::new("system", system), Message::new("user", prompt)])
        }
    })
}

/// All before the first assistant message, and the rest.
fn split(name: &str, mut messages: Vec<Message>) -> Result<(Content, Content), Fault> {
    match messages.iter().position(|m| m.role == "assistant") {
        None => Err(Fault::record(format!("`{name}` has no assistant message"))),
        Some(0) => Err(Fault::record(format!("`{name}` begins with the assistant"))),
        Some(first) => {
            let response = messages.split_off(first);
            Ok((Content::messages(messages), Content::messages(response)))
        }
    }
}

/// The messages of a conversation, whether in TRL's form or in ShareGPT's.
fn conversation(record: &Record, field: &str) -> Result<Vec<Message>, Fault> {
    let turns = record.get(field).and_then(|value| value.as_array());
    let mut messages = match turns {
        Some(turns) if turns.first().is_some_and(|turn| turn.get("from").is_some()) => {
            let name = record.column(field);
            let parsed = turns.iter().enumerate().map(|(i, turn)| {
                spoken(turn).map_err(|why| Fault::record(format!("`{name}` message {i}: {why}")))
            });
            parsed.collect::<Result<_, _>>()?
        }
        _ => record.messages(field)?,
    };
    if field == "conversations"
        && let Some(system) = optional(record, "system")?
    {
        messages.insert(0, Message::new("system", system));
    }
    Ok(messages)
}

/// A turn of ShareGPT, a JSON object.
fn spoken(turn: &Value) -> Result<Message, String> {
    let text = |key: &str| turn[key].as_str().ok_or_else(|| format!("no text `{key}`"));
    let from = text("from")?;
    let Some((_, role)) = SPEAKERS.iter().find(|(speaker, _)| *speaker == from) else {
        let known = SPEAKERS.map(|(speaker, _)| speaker).join(", ");
        return Err(format!("unknown `from` \"{from}\"; known: {known}"));
    };
    Ok(Message::new(*role, text("value")?))
}

uft_core::plugin! { adapters: [Demonstrations] }

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::adapt;

    fn fault(params: &str, record: &str) -> String {
        adapt::<Demonstrations>(params, record).unwrap_err().message.into()
    }

    /// Prompt and response of the only sample.
    fn parts(params: &str, record: &str) -> (Content, Content) {
        let sample = adapt::<Demonstrations>(params, record).unwrap().pop().unwrap();
        assert_eq!(sample.responses.len(), 1);
        assert_eq!(sample.responses[0].feedback, Feedback::Demonstration);
        (sample.prompt.clone(), sample.responses[0].content.clone())
    }

    fn messages(turns: &[(&str, &str)]) -> Content {
        Content::messages(turns.iter().map(|(role, text)| Message::new(*role, *text)))
    }

    #[test]
    fn a_conversation_is_split_before_its_first_answer() {
        // The shape of ultrachat_200k, which repeats the first turn as `prompt`.
        let record = r#"{"prompt": "Q", "prompt_id": "x", "messages": [
            {"role": "system", "content": "S"}, {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "R"}, {"role": "assistant", "content": "B"}
        ]}"#;
        let (prompt, response) = parts("{}", record);
        assert_eq!(prompt, messages(&[("system", "S"), ("user", "Q")]));
        assert_eq!(response, messages(&[("assistant", "A"), ("user", "R"), ("assistant", "B")]));
        let turns = |params| adapt::<Demonstrations>(params, record).unwrap()[0].responses[0].turns;
        assert_eq!(turns("{}"), Turns::Together);
        assert_eq!(turns(r#"{"turns": "each"}"#), Turns::Each);
    }

    #[test]
    fn share_gpt_speakers_are_roles() {
        let record = r#"{"id": "x", "system": "S", "conversations": [
            {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"},
            {"from": "observation", "value": "1"}, {"from": "gpt", "value": "B"}
        ]}"#;
        let (prompt, response) = parts("{}", record);
        assert_eq!(prompt, messages(&[("system", "S"), ("user", "Q")]));
        assert_eq!(response, messages(&[("assistant", "A"), ("tool", "1"), ("assistant", "B")]));
        let trl = r#"{"conversations": [
            {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
        ]}"#;
        let expected = (messages(&[("user", "Q")]), messages(&[("assistant", "A")]));
        assert_eq!(parts("{}", trl), expected);
    }

    #[test]
    fn prompt_and_completion_stay_what_they_are() {
        let expected = (Content::text("Q"), Content::text("A"));
        assert_eq!(parts("{}", r#"{"prompt": "Q", "completion": "A"}"#), expected);
        let record = r#"{"prompt": "Q", "response": "A", "messages": null}"#;
        assert_eq!(parts("{}", record), expected);
        let expected = (messages(&[("user", "Q")]), messages(&[("assistant", "A")]));
        assert_eq!(parts(r#"{"as_chat": true}"#, record), expected);
        let record = r#"{
            "prompt": [{"role": "user", "content": "Q"}],
            "completion": [{"role": "assistant", "content": "A"}]
        }"#;
        assert_eq!(parts("{}", record), expected);
        let unconditional = r#"{"prompt": "", "completion": "A"}"#;
        assert_eq!(parts("{}", unconditional), (Content::text(""), Content::text("A")));
    }

    #[test]
    fn alpaca_is_a_chat_unless_it_is_not_wanted() {
        let answer = messages(&[("assistant", "O")]);
        for (record, prompt) in [
            (r#"{"instruction": "I", "input": "", "output": "O"}"#, "I"),
            (r#"{"instruction": "I", "input": null, "output": "O", "text": "t"}"#, "I"),
            (r#"{"instruction": "I", "input": "N", "output": "O"}"#, "I\n\nN"),
        ] {
            assert_eq!(parts("{}", record), (messages(&[("user", prompt)]), answer.clone()));
        }
        let record = r#"{"instruction": "I", "output": "O", "system": "S"}"#;
        assert_eq!(parts("{}", record), (messages(&[("system", "S"), ("user", "I")]), answer));
        let text = (Content::text("S\n\nI"), Content::text("O"));
        assert_eq!(parts(r#"{"as_chat": false}"#, record), text);
    }

    #[test]
    fn trailing_turns_are_refused_or_cut() {
        let record = r#"{"messages": [
            {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"},
            {"role": "user", "content": "R"}
        ]}"#;
        assert_eq!(
            fault("{}", record),
            "`messages` ends with a `user` message that nobody answers; `trailing = \"cut\"` \
             leaves it out"
        );
        let expected = (messages(&[("user", "Q")]), messages(&[("assistant", "A")]));
        assert_eq!(parts(r#"{"trailing": "cut"}"#, record), expected);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (record, says) in [
            (
                r#"{"messages": [{"role": "user", "content": "Q"}]}"#,
                "`messages` has no assistant message",
            ),
            (r#"{"messages": []}"#, "`messages` has no assistant message"),
            (
                r#"{"messages": [{"role": "assistant", "content": "A"}]}"#,
                "`messages` begins with the assistant",
            ),
            (
                r#"{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]}"#,
                "`messages` has an empty assistant message",
            ),
            (
                r#"{"messages": [{"role": "user", "content": 5}]}"#,
                "`messages` message 0: no text `content`",
            ),
            (r#"{"messages": "Q"}"#, "`messages` must be a list of messages, not \"Q\""),
            (
                r#"{"conversations": [{"from": "human", "value": "Q"}, {"from": "narrator", "value": "A"}]}"#,
                "`conversations` message 1: unknown `from` \"narrator\"; known: human, user, gpt, \
                 chatgpt, assistant, system, tool, observation, function_response",
            ),
            (
                r#"{"conversations": [{"from": "human", "value": null}]}"#,
                "`conversations` message 0: no text `value`",
            ),
            (r#"{"prompt": "Q"}"#, "no field `completion` or `response`; the record has: prompt"),
            (r#"{"instruction": "I", "input": 3, "output": "O"}"#, "`input` must be a text, not 3"),
            (r#"{"instruction": "I"}"#, "no field `output`; the record has: instruction"),
            (
                r#"{"text": "once upon a time"}"#,
                "`text` alone does not say what is prompt and what is answer: give `prompt`, which \
                 may be empty, and `completion`",
            ),
            (
                r#"{"story": "once"}"#,
                "no field `messages` or `conversations` or `prompt` or `instruction`; the record \
                 has: story",
            ),
        ] {
            assert_eq!(fault("{}", record), says);
        }
        assert_eq!(
            fault(r#"{"turns": "all"}"#, "{}"),
            "parameter `turns` must be \"together\" or \"each\", not \"all\""
        );
    }
}

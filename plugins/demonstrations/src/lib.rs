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
                let mut prompt = record.text("instruction")?.to_owned();
                if let Some(input) = optional(record, "input")? {
                    prompt = format!("{prompt}\n\n{input}");
                }
                let chat = self.chat.instruction_data();
                let prompt = match optional(record, "system")? {
                    None => Content::text(prompt),
                    Some(system) if chat.is_text() => {
                        Content::text(format!("{system}\n\n{prompt}"))
                    }
                    Some(system) => Content::messages([
                        Message::new("system", system),
                        Message::new("user", prompt),
                    ]),
                };
                Ok((chat, "output", prompt, Content::text(record.text("output")?)))
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
    let Some(turns) = turns.filter(|t| t.first().is_some_and(|t| t.get("from").is_some())) else {
        return record.messages(field);
    };
    let fault = |i: usize, why: String| {
        Fault::record(format!("`{}` message {i}: {why}", record.column(field)))
    };
    let mut messages = Vec::with_capacity(turns.len() + 1);
    if let Some(system) = optional(record, "system")? {
        messages.push(Message::new("system", system));
    }
    for (i, turn) in turns.iter().enumerate() {
        let text = |key: &str| {
            turn.get(key)
                .and_then(|v| v.as_str())
                .ok_or_else(|| fault(i, format!("no text `{key}`")))
        };
        let from = text("from")?;
        let role = SPEAKERS.iter().find(|(speaker, _)| *speaker == from).ok_or_else(|| {
            let known = SPEAKERS.map(|(speaker, _)| speaker).join(", ");
            fault(i, format!("unknown `from` \"{from}\"; known: {known}"))
        })?;
        messages.push(Message::new(role.1, text("value")?));
    }
    Ok(messages)
}

uft_core::plugin! { adapters: [Demonstrations] }

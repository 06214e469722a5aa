//! Prompts and responses of a record: texts or messages, never a mix of the two.

use crate::fault::Fault;
use crate::params::Params;
use crate::record::Record;
use crate::sample::{Content, Message, Sample};

/// How an adapter reads prompts and responses that are plain strings: as text that the model
/// continues (TRL's convention), or as the turns of a chat.
#[derive(Clone, Copy, Debug)]
pub struct Chat {
    as_chat: Option<bool>,
}

impl Chat {
    /// Reads `as_chat = true | false | "auto"` from the parameters. `auto` is what
    /// [`instruction_data`](Chat::instruction_data) says of a record, and plain text otherwise.
    pub fn from_params(params: &mut Params) -> Self {
        let about = "texts become a user and an assistant message; \"auto\": only in instruction \
                     data (instruction/output, HelpSteer2)";
        Self { as_chat: params.flag_or_auto("as_chat", about) }
    }

    /// The same for a record of instruction data, whose strings are turns unless `as_chat = false`.
    pub fn instruction_data(self) -> Self {
        Self { as_chat: Some(self.as_chat.unwrap_or(true)) }
    }

    /// Whether strings stay text.
    pub fn is_text(self) -> bool {
        self.as_chat != Some(true)
    }

    /// A sample, still without responses, of a prompt and the record's template arguments.
    ///
    /// # Errors
    /// If the prompt is an empty list of messages, or `chat_template_kwargs` is not an object.
    pub fn sample(self, record: &Record, prompt: Content) -> Result<Sample, Fault> {
        let mut sample = Sample::new(self.turn(prompt, "user"));
        if matches!(&sample.prompt, Content::Messages(messages) if messages.is_empty()) {
            return Err(Fault::record("the prompt has no messages"));
        }
        sample.template_args = record.template_args()?.into();
        Ok(sample)
    }

    /// A response to `prompt`; `name` is what the file calls it. Messages that repeat those of the
    /// prompt first are taken without them.
    ///
    /// # Errors
    /// If there is nothing to train in it, it does not end with the assistant, or it is a text and
    /// the prompt is not (or the reverse).
    pub fn response(
        self,
        name: &str,
        response: Content,
        prompt: &Content,
    ) -> Result<Content, Fault> {
        let mixed = |is: &str, not: &str| {
            Err(Fault::record(format!(
                "`{name}` is {is} but the prompt is {not}; `as_chat = true` makes messages of texts"
            )))
        };
        match (self.turn(response, "assistant"), prompt) {
            (Content::Text(_), Content::Messages(_)) => mixed("a text", "a list of messages"),
            (Content::Messages(_), Content::Text(_)) => mixed("a list of messages", "a text"),
            (Content::Text(text), _) if text.is_empty() => {
                Err(Fault::record(format!("`{name}` is empty")))
            }
            (text @ Content::Text(_), _) => Ok(text),
            (Content::Messages(messages), Content::Messages(prompt)) => {
                let own = messages.strip_prefix(prompt.as_slice()).unwrap_or(&messages);
                check_turns(own).map_err(|why| Fault::record(format!("`{name}` {why}")))?;
                Ok(Content::messages(own.iter().cloned()))
            }
        }
    }

    fn turn(self, content: Content, role: &str) -> Content {
        match content {
            Content::Text(text) if !self.is_text() => Content::messages([Message::new(role, text)]),
            content => content,
        }
    }
}

/// Whether messages can be trained as a response.
///
/// # Errors
/// Why not: no assistant message, an empty one, or others after the last one.
fn check_turns(messages: &[Message]) -> Result<(), String> {
    let Some(last) = messages.iter().rposition(|m| m.role == "assistant") else {
        return Err("has no assistant message".into());
    };
    if let Some(trailing) = messages.get(last + 1) {
        return Err(format!("ends with a `{}` message that nobody answers", trailing.role));
    }
    // A message without text may still call a tool or hold reasoning.
    let empty =
        |m: &Message| m.role == "assistant" && m.content.trim().is_empty() && m.extra.is_empty();
    if messages.iter().any(empty) {
        return Err("has an empty assistant message".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(json: &str) -> Chat {
        let mut params = Params::from_json(json).unwrap();
        let chat = Chat::from_params(&mut params);
        params.finish().unwrap();
        chat
    }

    fn messages(turns: &[(&str, &str)]) -> Content {
        Content::messages(turns.iter().map(|(role, text)| Message::new(*role, *text)))
    }

    #[test]
    fn strings_are_text_unless_a_chat_is_wanted() {
        let text = Content::text("hi");
        assert_eq!(chat("{}").turn(text.clone(), "user"), text);
        let turn = messages(&[("user", "hi")]);
        assert_eq!(chat(r#"{"as_chat": true}"#).turn(text.clone(), "user"), turn);
        assert_eq!(chat("{}").instruction_data().turn(text.clone(), "user"), turn);
        let plain = chat(r#"{"as_chat": false}"#).instruction_data();
        assert_eq!(plain.turn(text.clone(), "user"), text);
    }

    #[test]
    fn what_cannot_be_trained_is_refused_in_words() {
        let (text, list) = (Content::text("q"), messages(&[("user", "q")]));
        for (response, prompt, says) in [
            (
                messages(&[("assistant", "a")]),
                &text,
                "`r` is a list of messages but the prompt is a text; `as_chat = true` makes \
                 messages of texts",
            ),
            (
                Content::text("a"),
                &list,
                "`r` is a text but the prompt is a list of messages; `as_chat = true` makes \
                 messages of texts",
            ),
            (Content::text(""), &text, "`r` is empty"),
            (messages(&[]), &list, "`r` has no assistant message"),
            (messages(&[("user", "x")]), &list, "`r` has no assistant message"),
            (
                messages(&[("assistant", "a"), ("user", "x")]),
                &list,
                "`r` ends with a `user` message that nobody answers",
            ),
            (messages(&[("assistant", " ")]), &list, "`r` has an empty assistant message"),
        ] {
            let fault = chat("{}").response("r", response, prompt).unwrap_err();
            assert_eq!(fault.message.as_str(), says);
        }
    }

    #[test]
    fn a_repeated_prompt_is_taken_once() {
        let prompt = messages(&[("system", "s"), ("user", "q")]);
        let full = messages(&[("system", "s"), ("user", "q"), ("assistant", "a")]);
        let own = chat("{}").response("r", full, &prompt).unwrap();
        assert_eq!(own, messages(&[("assistant", "a")]));
    }
}

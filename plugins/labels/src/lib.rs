//! Records with a thumbs-up or thumbs-down label: TRL's unpaired preferences.
//!
//! | field | is |
//! |---|---|
//! | `prompt` | a text or a list of messages |
//! | `completion` or `response` | the same kind |
//! | `label` or `kto_tag` | true or false; also 1 and 0 |

use uft_core::prelude::*;

struct Labels {
    chat: Chat,
}

impl FeedbackAdapter for Labels {
    const NAME: &'static str = "labels";
    const ABOUT: &'static str = "prompt, completion|response, label|kto_tag";

    fn new(params: &mut Params) -> Self {
        Self { chat: Chat::from_params(params) }
    }

    fn offers(&self) -> Kinds {
        Kinds::BINARY
    }

    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        let sample = self.chat.sample(record, record.content("prompt")?)?;
        let field = record.first_of(&["completion", "response"])?;
        let response =
            self.chat.response(record.column(field), record.content(field)?, &sample.prompt)?;
        let label = record.boolean(record.first_of(&["label", "kto_tag"])?)?;
        Ok(vec![sample.response(response, Feedback::Binary(label))])
    }
}

uft_core::plugin! { adapters: [Labels] }

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::adapt;

    fn fault(params: &str, record: &str) -> String {
        adapt::<Labels>(params, record).unwrap_err().message.into()
    }

    #[test]
    fn thumbs_in_the_forms_that_files_have() {
        for (record, up) in [
            (r#"{"prompt": "Q", "completion": " A", "label": true}"#, true),
            (r#"{"prompt": "Q", "response": " A", "label": 0, "completion": null}"#, false),
            (r#"{"prompt": "Q", "completion": " A", "kto_tag": "False", "label": null}"#, false),
        ] {
            let sample =
                Sample::new(Content::text("Q")).response(Content::text(" A"), Feedback::Binary(up));
            assert_eq!(adapt::<Labels>("{}", record).unwrap(), [sample]);
        }
    }

    #[test]
    fn conversations_keep_their_tools() {
        let record = r#"{
            "prompt": [{"role": "user", "content": "Q"}],
            "completion": [{"role": "assistant", "content": "A"}],
            "label": false,
            "tools": [{"name": "f"}],
            "chat_template_kwargs": {"enable_thinking": false}
        }"#;
        let samples = adapt::<Labels>("{}", record).unwrap();
        assert_eq!(samples[0].prompt, Content::messages([Message::new("user", "Q")]));
        let args = r#"{"enable_thinking":false,"tools":[{"name":"f"}]}"#;
        assert_eq!(samples[0].template_args.as_str(), args);
    }

    #[test]
    fn strings_become_a_chat_if_wanted() {
        let record = r#"{"question": "Q", "answer": "A", "label": true}"#;
        let columns = r#""columns": {"prompt": "question", "completion": "answer"}"#;
        let samples = adapt::<Labels>(&format!(r#"{{"as_chat": true, {columns}}}"#), record);
        let sample = Sample::new(Content::messages([Message::new("user", "Q")]))
            .response(Content::messages([Message::new("assistant", "A")]), Feedback::Binary(true));
        assert_eq!(samples.unwrap(), [sample]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (record, says) in [
            (
                r#"{"prompt": "Q", "completion": "A", "label": null}"#,
                "no field `label` or `kto_tag`; the record has: prompt, completion, label",
            ),
            (
                r#"{"prompt": "Q", "completion": "A", "label": 0.5}"#,
                "`label` must be true or false, not 0.5",
            ),
            (
                r#"{"prompt": 3, "completion": "A", "label": true}"#,
                "`prompt` must be a text or a list of messages, not 3",
            ),
            (r#"{"prompt": "Q", "completion": "", "label": true}"#, "`completion` is empty"),
            (
                r#"{"prompt": "Q", "label": true}"#,
                "no field `completion` or `response`; the record has: prompt, label",
            ),
        ] {
            assert_eq!(fault("{}", record), says);
        }
        assert_eq!(
            fault(r#"{"as_chat": "yes"}"#, "{}"),
            "parameter `as_chat` must be true, false or \"auto\", not \"yes\""
        );
    }
}

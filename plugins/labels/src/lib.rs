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

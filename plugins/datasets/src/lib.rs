//! Adapters for data sets as they are published, each with records of its form in `fixtures/`.
//!
//! | adapter | records |
//! |---|---|
//! | `ultrafeedback` | an instruction with four scored completions |
//! | `rankings` | a prompt with ranked responses; Nectar |
//! | `oasst` | a conversation tree with ranked replies |
//! | `hh-rlhf` | two whole conversations as text, one preferred |
//! | `tool-calls` | conversations that call tools; xLAM |
//!
//! The first three have several responses to a prompt with a score each and let the configuration
//! say what becomes of them: see [`shape`].

mod hh_rlhf;
mod human_turns;
mod oasst;
mod rankings;
mod shape;
mod tool_calls;
mod ultrafeedback;

use hh_rlhf::HhRlhf;
use oasst::Oasst;
use rankings::Rankings;
use tool_calls::ToolCalls;
use ultrafeedback::UltraFeedback;

uft_core::plugin! { adapters: [UltraFeedback, Rankings, Oasst, HhRlhf, ToolCalls] }

#[cfg(test)]
mod tests {
    use uft_core::prelude::*;

    pub fn messages(turns: &[(&str, &str)]) -> Content {
        Content::messages(turns.iter().map(|(role, text)| Message::new(*role, *text)))
    }

    /// The samples of every line of a fixture.
    pub fn adapted<T: FeedbackAdapter>(params: &str, fixture: &str) -> Vec<Vec<Sample>> {
        let line = |line| uft_core::check::adapt::<T>(params, line).expect("a record of its form");
        fixture.lines().map(line).collect()
    }

    pub fn fault<T: FeedbackAdapter>(params: &str, record: &str) -> String {
        uft_core::check::adapt::<T>(params, record).unwrap_err().message.into()
    }

    /// The last message's text and the feedback of every response.
    pub fn responses(sample: &Sample) -> Vec<(&str, Feedback)> {
        fn last(content: &Content) -> &str {
            match content {
                Content::Text(text) => text,
                Content::Messages(messages) => &messages.last().expect("a message").content,
            }
        }
        sample.responses.iter().map(|r| (last(&r.content), r.feedback)).collect()
    }
}

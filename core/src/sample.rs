//! A sample: a prompt and one or more responses, each with the feedback that it got.

use crate::needs::Kinds;
use abi_stable::{
    StableAbi,
    std_types::{ROption, RString, RVec},
};

/// What people said of a response.
#[repr(u8)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq)]
pub enum Feedback {
    /// Written to be imitated: a response whose reward is 1.
    Demonstration,
    /// An explicit score in `0..=1`.
    Score(f32),
    /// Thumbs up or down.
    Binary(bool),
    /// Preferred to the group's rejected responses, by this margin if one is known.
    Chosen(ROption<f32>),
    /// Less liked than the group's chosen responses.
    Rejected(ROption<f32>),
}

/// [`Feedback`] without its value.
#[repr(u8)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// To be imitated.
    Demonstration,
    /// Scored.
    Score,
    /// With a thumb up or down.
    Binary,
    /// The better of a pair.
    Chosen,
    /// The worse of a pair.
    Rejected,
}

impl Kind {
    /// Every kind, in the order of the bits of [`Kinds`](crate::needs::Kinds).
    pub const ALL: [Kind; 5] =
        [Kind::Demonstration, Kind::Score, Kind::Binary, Kind::Chosen, Kind::Rejected];

    /// As messages and metrics call it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Demonstration => "demonstration",
            Kind::Score => "score",
            Kind::Binary => "binary",
            Kind::Chosen => "chosen",
            Kind::Rejected => "rejected",
        }
    }
}

impl Feedback {
    /// The kind without the value.
    pub fn kind(self) -> Kind {
        match self {
            Feedback::Demonstration => Kind::Demonstration,
            Feedback::Score(_) => Kind::Score,
            Feedback::Binary(_) => Kind::Binary,
            Feedback::Chosen(_) => Kind::Chosen,
            Feedback::Rejected(_) => Kind::Rejected,
        }
    }

    /// Demonstration: 1. Score: the score. Binary: 1 or 0. Chosen and rejected: the margin, 0 if
    /// none was given.
    pub fn value(self) -> f32 {
        match self {
            Feedback::Demonstration => 1.0,
            Feedback::Score(score) => score,
            Feedback::Binary(up) => f32::from(up),
            Feedback::Chosen(margin) | Feedback::Rejected(margin) => margin.unwrap_or(0.0),
        }
    }
}

/// One turn of a conversation, as chat templates see it.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool` or what else the template knows.
    pub role: RString,
    /// Its text.
    pub content: RString,
    /// The record's further fields of this message (`tool_calls`, `name`, …) as a JSON object,
    /// empty if there are none.
    pub extra: RString,
}

impl Message {
    /// A message without further fields.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: RString::from(role.into()),
            content: RString::from(content.into()),
            extra: RString::new(),
        }
    }
}

/// A prompt or a response: plain text, or messages for the chat template.
#[repr(u8)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Continued by the model as it is, without a template.
    Text(RString),
    /// Rendered by the model's chat template.
    Messages(RVec<Message>),
}

impl Content {
    /// A text.
    pub fn text(text: impl Into<String>) -> Self {
        Content::Text(RString::from(text.into()))
    }

    /// Messages, in order.
    pub fn messages(messages: impl IntoIterator<Item = Message>) -> Self {
        Content::Messages(messages.into_iter().collect())
    }

    /// Whether there is no character, or no message.
    pub fn is_empty(&self) -> bool {
        match self {
            Content::Text(text) => text.is_empty(),
            Content::Messages(messages) => messages.is_empty(),
        }
    }
}

/// How the assistant turns of a response with several turns are counted.
#[repr(u8)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turns {
    /// All assistant turns are one response with one reward.
    Together,
    /// Each assistant turn is a response of its own, given the history before it (the unfolding
    /// of UFT, arXiv 2410.21438).
    Each,
}

/// One response to the sample's prompt.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq)]
pub struct Response {
    /// The text, or the messages that follow the prompt's. Only assistant messages are trained.
    pub content: Content,
    /// What was said of it.
    pub feedback: Feedback,
    /// What a response with several turns is.
    pub turns: Turns,
}

/// A prompt with its responses. Prompt and responses are all text or all messages.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq)]
pub struct Sample {
    /// What the responses answer; empty for text without a prompt.
    pub prompt: Content,
    /// At least one.
    pub responses: RVec<Response>,
    /// Further arguments of the chat template (`tools`, `chat_template_kwargs`) as a JSON object,
    /// empty if there are none.
    pub template_args: RString,
}

impl Sample {
    /// A prompt without responses yet.
    pub fn new(prompt: Content) -> Self {
        Self { prompt, responses: RVec::new(), template_args: RString::new() }
    }

    /// Whether it keeps what its types say in words, and has only feedback of the kinds `offers`.
    ///
    /// # Errors
    /// What does not, such as `a score of 1.5, outside of 0 to 1`.
    pub fn check(&self, offers: Kinds) -> Result<(), String> {
        if self.responses.is_empty() {
            return Err("a sample without a response".into());
        }
        for response in &self.responses {
            let kind = response.feedback.kind();
            if !offers.contains(Kinds::of(kind)) {
                return Err(format!("a {} response, which it does not offer", kind.name()));
            }
            let value = response.feedback.value();
            match response.feedback {
                Feedback::Score(_) if !(0.0..=1.0).contains(&value) => {
                    return Err(format!("a score of {value}, outside of 0 to 1"));
                }
                _ if !value.is_finite() => return Err(format!("a margin of {value}")),
                _ => {}
            }
        }
        Ok(())
    }

    /// Adds a response; builder style.
    pub fn response(mut self, content: Content, feedback: Feedback) -> Self {
        self.responses.push(Response { content, feedback, turns: Turns::Together });
        self
    }

    /// Sets how the turns of every response so far are counted; builder style.
    pub fn turns(mut self, turns: Turns) -> Self {
        for response in &mut self.responses {
            response.turns = turns;
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(feedback: Feedback) -> Sample {
        Sample::new(Content::text("q")).response(Content::text("a"), feedback)
    }

    #[test]
    fn samples_that_cannot_be_are_refused_in_words() {
        let kinds = Kinds::SCORE | Kinds::PAIR;
        let margin = |m: f32| Feedback::Chosen(Some(m).into());
        for (sample, says) in [
            (Sample::new(Content::text("q")), "a sample without a response"),
            (sample(Feedback::Score(1.5)), "a score of 1.5, outside of 0 to 1"),
            (sample(Feedback::Score(f32::NAN)), "a score of NaN, outside of 0 to 1"),
            (sample(margin(f32::INFINITY)), "a margin of inf"),
            (sample(Feedback::Binary(true)), "a binary response, which it does not offer"),
        ] {
            assert_eq!(sample.check(kinds), Err(says.to_owned()));
        }
        assert_eq!(sample(Feedback::Score(1.0)).check(kinds), Ok(()));
        assert_eq!(sample(margin(-2.0)).check(kinds), Ok(()));
    }
}

//! Which rows are taken, and why a row is refused.

use crate::config::{EndOfTurn, LongRows};
use crate::{Error, group::Group};
use std::fmt;

/// What a row has to keep to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most tokens of a prompt with its longest branch.
    pub max_length: usize,
    /// What happens to longer rows. Both [`LongRows::Skip`] and [`LongRows::Error`] refuse them
    /// with [`Reason::TooLong`]; the caller counts or stops.
    pub long_rows: LongRows,
    pub end_of_turn: EndOfTurn,
}

/// A row that does not become groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub reason: Reason,
    /// What is wrong with it and what to do, in one line.
    pub detail: String,
}

/// Why a row is refused, as counted in reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// Longer than [`Limits::max_length`].
    TooLong,
    /// A response has no token to train.
    NoTrainedTokens,
    /// The last trained token of a response does not end the turn.
    EndOfTurn,
    /// The tokens of the prompt are not those that prompt and response begin with.
    PromptMismatch,
    /// The turns of a response cannot be told apart, or not be trained as asked.
    Turns,
    /// The chat template refuses the messages, or there is none.
    Template,
    /// Text and messages in one sample.
    MixedContent,
    /// The tokenizer fails.
    Tokenizer,
}

impl Reason {
    /// The stable name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Reason::TooLong => "too-long",
            Reason::NoTrainedTokens => "no-trained-tokens",
            Reason::EndOfTurn => "end-of-turn",
            Reason::PromptMismatch => "prompt-mismatch",
            Reason::Turns => "turns",
            Reason::Template => "template",
            Reason::MixedContent => "mixed-content",
            Reason::Tokenizer => "tokenizer",
        }
    }
}

impl Refused {
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }

    /// For `map_err`: an error of the host, given a reason.
    pub(super) fn because(reason: Reason) -> impl Fn(Error) -> Self {
        move |error| Self::new(reason, error.message)
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason.name(), self.detail)
    }
}

impl Limits {
    /// Makes a group fit, by cutting its prompt's beginning if that is allowed. The first `kept`
    /// tokens (BOS) stay.
    ///
    /// # Errors
    /// [`Reason::TooLong`].
    pub fn fit(&self, group: &mut Group, kept: usize) -> Result<(), Refused> {
        let (length, longest) = (group.longest(), group.longest() - group.prompt.len());
        if length <= self.max_length {
            return Ok(());
        }
        let excess = length - self.max_length;
        let refused = |what: String| Err(Refused::new(Reason::TooLong, what));
        if self.long_rows != LongRows::CutPrompt {
            return refused(format!(
                "{length} tokens, {excess} more than max_length = {}",
                self.max_length
            ));
        }
        // The first token of a branch needs a token before it.
        let least = kept.max(1);
        if group.prompt.len() < least + excess {
            return refused(format!(
                "a response of {longest} tokens leaves no room for the prompt in max_length = {}",
                self.max_length
            ));
        }
        group.prompt.drain(kept..kept + excess);
        Ok(())
    }
}

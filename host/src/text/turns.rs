//! Where the assistant's turns stand in a rendered conversation.

use super::encode::covering;
use super::template::{Rendered, Template};
use super::tokenizer::Encoded;
use super::{Reason, Refused, Text, values};
use minijinja::Value;
use std::ops::Range;
use uft_core::Message;

/// Stands for a message's content when its place is searched: a character for private use.
const PLACE: &str = "\u{F8FE}";

/// A prompt with one response, up to the last assistant turn.
pub struct Conversation<'a> {
    text: &'a Text,
    template: &'a Template,
    variables: &'a [(String, Value)],
    messages: Vec<Value>,
    prompt_len: usize,
    /// Indices of the response's assistant messages.
    turns: Vec<usize>,
}

impl<'a> Conversation<'a> {
    /// Joins prompt and response. What follows the last assistant turn is left out: it is neither
    /// trained nor read by anything that is.
    ///
    /// # Errors
    /// A response without assistant turn; a message whose extra fields are not JSON.
    pub fn new(
        text: &'a Text,
        template: &'a Template,
        variables: &'a [(String, Value)],
        prompt: &[Value],
        response: &[Message],
    ) -> Result<Self, Refused> {
        let is_assistant = |i: &usize| response[*i].role == "assistant";
        let turns: Vec<usize> = (0..response.len()).filter(is_assistant).collect();
        let Some(last) = turns.last() else {
            let what = "the response has no assistant message";
            return Err(Refused::new(Reason::NoTrainedTokens, what));
        };
        let mut messages = prompt.to_vec();
        for message in &response[..=*last] {
            messages.push(values::message(message).map_err(Refused::because(Reason::Template))?);
        }
        let prompt_len = prompt.len();
        let turns = turns.iter().map(|i| prompt_len + i).collect();
        Ok(Self { text, template, variables, messages, prompt_len, turns })
    }

    /// Number of messages, prompt included.
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Number of messages of the prompt.
    pub fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// Indices of the assistant messages to train, rising.
    pub fn turns(&self) -> impl Iterator<Item = usize> {
        self.turns.iter().copied()
    }

    /// Whether the response begins with an assistant message.
    pub fn answers(&self) -> bool {
        self.turns[0] == self.prompt_len
    }

    /// Whether the response is one assistant message.
    pub fn is_single_turn(&self) -> bool {
        self.len() == self.prompt_len + 1
    }

    /// The first `count` messages as text.
    ///
    /// # Errors
    /// Whatever the template refuses.
    pub fn render(&self, count: usize, add_generation_prompt: bool) -> Result<Rendered, Refused> {
        self.render_messages(&self.messages[..count], add_generation_prompt)
    }

    fn render_messages(&self, messages: &[Value], open: bool) -> Result<Rendered, Refused> {
        let rendered = self.template.render(messages, self.variables, open);
        rendered.map_err(Refused::because(Reason::Template))
    }

    /// The tokens of every turn in the whole conversation: those in the template's generation
    /// blocks, or else those that each turn adds to the conversation before it, or else what can be
    /// found around the turn's content.
    ///
    /// `generation` belongs to the rendering that `full` encodes; `prompt` is given if it ends with
    /// the header of the first turn.
    ///
    /// # Errors
    /// Turns that cannot be found, and whatever template and tokenizer refuse.
    pub fn spans(
        &self,
        full: &Encoded,
        generation: &[Range<usize>],
        prompt: Option<&Encoded>,
    ) -> Result<Vec<Range<usize>>, Refused> {
        if self.template.has_generation() {
            let mut spans: Vec<Range<usize>> = Vec::new();
            for bytes in generation {
                let tokens = covering(full, bytes);
                let free = spans.last().map_or(0, |last| last.end);
                spans.push(tokens.start.max(free)..tokens.end.max(free));
            }
            return Ok(spans);
        }
        if let Some(spans) = self.stable_spans(full, prompt)? {
            return Ok(spans);
        }
        let mut spans = Vec::new();
        for turn in self.turns() {
            spans.push(self.located(full, turn)?.ok_or_else(|| {
                Refused::new(
                    Reason::Turns,
                    "the chat template changes earlier turns when later ones follow, and where they \
                     stand cannot be told; set turns = \"each\" in the adapter, or name a template \
                     with generation blocks in [text] template",
                )
            })?);
        }
        Ok(spans)
    }

    /// The tokens that each turn adds to the conversation before it, if the whole conversation
    /// begins with all of these shorter ones.
    ///
    /// # Errors
    /// Whatever template and tokenizer refuse.
    pub fn stable_spans(
        &self,
        full: &Encoded,
        prompt: Option<&Encoded>,
    ) -> Result<Option<Vec<Range<usize>>>, Refused> {
        let mut spans = Vec::new();
        for turn in self.turns() {
            let start = match prompt.filter(|_| turn == self.prompt_len) {
                Some(prompt) => full.ids.starts_with(&prompt.ids).then_some(prompt.ids.len()),
                None => self.tokens_of(full, &self.render(turn, true)?.text)?,
            };
            let end = if turn + 1 == self.len() {
                Some(full.ids.len())
            } else {
                self.tokens_of(full, &self.render(turn + 1, false)?.text)?
            };
            match (start, end) {
                (Some(start), Some(end)) => spans.push(start..end),
                _ => return Ok(None),
            }
        }
        Ok(Some(spans))
    }

    /// How many tokens of the whole conversation a shorter one has, if it is its beginning.
    fn tokens_of(&self, full: &Encoded, shorter: &str) -> Result<Option<usize>, Refused> {
        if !full.text.starts_with(shorter) {
            return Ok(None);
        }
        let tokens = self.text.tokenizer().prefix_tokens(full, shorter.len());
        tokens.map_err(Refused::because(Reason::Tokenizer))
    }

    /// A turn's tokens in a conversation that the template rewrites as it grows: from the header
    /// that stands before its content to the end that follows its content when it is the last
    /// message. `None` if the template does more than putting text around the content.
    fn located(&self, full: &Encoded, turn: usize) -> Result<Option<Range<usize>>, Refused> {
        let (closed, open) = (self.render(turn, false)?.text, self.render(turn, true)?.text);
        let whole = self.with_placeholder(turn, self.len())?;
        let alone = self.with_placeholder(turn, turn + 1)?;
        let found = (|| {
            let header = open.strip_prefix(&closed).filter(|header| !header.is_empty())?;
            let (before, after) = split_at_place(&whole)?;
            let end = split_at_place(&alone)?.1;
            let start = before.rfind(header)? + header.len();
            let same = full.text.starts_with(&before[..start])
                && full.text.ends_with(after)
                && after.starts_with(end);
            let end = (full.text.len() + end.len()).checked_sub(after.len())?;
            (same && start < end).then_some((start, end))
        })();
        let Some((start, end)) = found else { return Ok(None) };
        let tokens = |end| {
            let tokens = self.text.tokenizer().prefix_tokens(full, end);
            tokens.map_err(Refused::because(Reason::Tokenizer))
        };
        Ok(tokens(start)?.zip(tokens(end)?).map(|(start, end)| start..end))
    }

    /// The first `count` messages as text, the content of one of them being [`PLACE`].
    fn with_placeholder(&self, message: usize, count: usize) -> Result<String, Refused> {
        let mut messages = self.messages[..count].to_vec();
        let fields = messages[message].try_iter().into_iter().flatten();
        let replaced = fields.map(|key| {
            let value = match key.as_str() {
                Some("content") => Value::from(PLACE),
                _ => self.messages[message].get_item(&key).unwrap_or_default(),
            };
            (key, value)
        });
        messages[message] = Value::from_pairs(replaced.collect::<Vec<_>>());
        Ok(self.render_messages(&messages, false)?.text)
    }
}

/// What stands before and behind the only placeholder.
fn split_at_place(text: &str) -> Option<(&str, &str)> {
    let (before, after) = text.split_once(PLACE)?;
    (!after.contains(PLACE)).then_some((before, after))
}

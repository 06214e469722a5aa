//! Pairs of a chosen and a rejected response: TRL's preferences.
//!
//! | field | is |
//! |---|---|
//! | `prompt` | a text or a list of messages; may be missing |
//! | `chosen`, `rejected` | the same kind |
//! | `margin` | optional: by how much the chosen one is better |
//! | `chosen_score`, `rejected_score` | optional: their difference is the margin; also `score_chosen`, `chosen_reward`, `chosen_rating` with their rejected twins |
//!
//! Without a `prompt`, or with a text `prompt` beside two whole conversations, what `chosen` and
//! `rejected` have in common at their beginning is the prompt, as in TRL. Of texts this is cut at
//! white space, where TRL may cut inside a word and so change its tokens.

use uft_core::prelude::*;

const SCORES: [[&str; 2]; 4] = [
    ["chosen_score", "rejected_score"],
    ["score_chosen", "score_rejected"],
    ["chosen_reward", "rejected_reward"],
    ["chosen_rating", "rejected_rating"],
];

struct Preferences {
    chat: Chat,
}

impl FeedbackAdapter for Preferences {
    const NAME: &'static str = "preferences";
    const ABOUT: &'static str = "chosen, rejected, prompt (or their common beginning), margin";

    fn new(params: &mut Params) -> Self {
        Self { chat: Chat::from_params(params) }
    }

    fn offers(&self) -> Kinds {
        Kinds::PAIR
    }

    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        let (chosen, rejected) = (record.content("chosen")?, record.content("rejected")?);
        if chosen == rejected {
            return Err(Fault::record("`chosen` and `rejected` are the same"));
        }
        let margin = margin(record)?.map(|margin| margin as f32);
        let (prompt, chosen, rejected) = match prompt(record, &chosen, &rejected)? {
            Some(prompt) => (prompt, chosen, rejected),
            None => split(&chosen, &rejected)?,
        };
        let sample = self.chat.sample(record, prompt)?;
        let turn =
            |field, content| self.chat.response(record.column(field), content, &sample.prompt);
        let (chosen, rejected) = (turn("chosen", chosen)?, turn("rejected", rejected)?);
        Ok(vec![
            sample
                .response(chosen, Feedback::Chosen(margin.into()))
                .response(rejected, Feedback::Rejected(margin.into())),
        ])
    }
}

/// The record's prompt, unless it has none or both responses are whole conversations beside it.
fn prompt(record: &Record, chosen: &Content, rejected: &Content) -> Result<Option<Content>, Fault> {
    if !record.has("prompt") {
        return Ok(None);
    }
    let prompt = record.content("prompt")?;
    let whole = match (&prompt, chosen, rejected) {
        (Content::Text(_), Content::Messages(c), Content::Messages(r)) => {
            !c.is_empty() && c.first() == r.first()
        }
        _ => false,
    };
    Ok((!whole).then_some(prompt))
}

/// The common beginning and what is left of each.
fn split(chosen: &Content, rejected: &Content) -> Result<(Content, Content, Content), Fault> {
    let none = || Err(Fault::record("no `prompt`, and `chosen` and `rejected` begin differently"));
    match (chosen, rejected) {
        (Content::Messages(c), Content::Messages(r)) => {
            let n = c.iter().zip(r.iter()).take_while(|(c, r)| c == r).count();
            if n == 0 {
                return none();
            }
            let part = |m: &[Message]| Content::messages(m.iter().cloned());
            Ok((part(&c[..n]), part(&c[n..]), part(&r[n..])))
        }
        (Content::Text(c), Content::Text(r)) => {
            let common = c.char_indices().zip(r.chars()).find(|((_, c), r)| c != r);
            let common = &c[..common.map_or(c.len().min(r.len()), |((i, _), _)| i)];
            // A space belongs to the word behind it, as tokenizers see it; a line end does not.
            let Some(space) = common.rfind(char::is_whitespace) else { return none() };
            let n = if common[space..].starts_with(' ') { space } else { space + 1 };
            Ok((Content::text(&c[..n]), Content::text(&c[n..]), Content::text(&r[n..])))
        }
        _ => Err(Fault::record("one of `chosen` and `rejected` is a text, the other is not")),
    }
}

fn margin(record: &Record) -> Result<Option<f64>, Fault> {
    if record.has("margin") {
        return record.number("margin").map(Some);
    }
    let Some([chosen, rejected]) = SCORES.into_iter().find(|[c, r]| record.has(c) || record.has(r))
    else {
        return Ok(None);
    };
    Ok(Some(record.number(chosen)? - record.number(rejected)?))
}

uft_core::plugin! { adapters: [Preferences] }

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
            let space = common.char_indices().rfind(|(_, c)| c.is_whitespace());
            let Some((space, white)) = space else { return none() };
            let n = if white == ' ' { space } else { space + white.len_utf8() };
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

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::adapt;

    fn fault(record: &str) -> String {
        adapt::<Preferences>("{}", record).unwrap_err().message.into()
    }

    /// Prompt, chosen and rejected, and both margins, of the only sample.
    fn pair(record: &str) -> (Content, [Content; 2], [Feedback; 2]) {
        let sample = adapt::<Preferences>("{}", record).unwrap().pop().unwrap();
        let [chosen, rejected] = &sample.responses[..] else { panic!("not a pair") };
        let feedback = [chosen.feedback, rejected.feedback];
        (sample.prompt.clone(), [chosen.content.clone(), rejected.content.clone()], feedback)
    }

    fn messages(turns: &[(&str, &str)]) -> Content {
        Content::messages(turns.iter().map(|(role, text)| Message::new(*role, *text)))
    }

    fn margins(margin: Option<f32>) -> [Feedback; 2] {
        [Feedback::Chosen(margin.into()), Feedback::Rejected(margin.into())]
    }

    #[test]
    fn an_explicit_prompt() {
        let (prompt, texts, feedback) =
            pair(r#"{"prompt": "Q", "chosen": " A", "rejected": " B", "margin": 1.5}"#);
        assert_eq!(prompt, Content::text("Q"));
        assert_eq!(texts, [" A", " B"].map(Content::text));
        assert_eq!(feedback, margins(Some(1.5)));
    }

    #[test]
    fn whole_conversations_beside_a_prompt_that_is_text() {
        // The shape of ultrafeedback_binarized.
        let (prompt, [chosen, rejected], feedback) = pair(
            r#"{
                "prompt": "Q", "prompt_id": "x",
                "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
                "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}],
                "messages": [], "score_chosen": 8.5, "score_rejected": 8.0
            }"#,
        );
        assert_eq!(prompt, messages(&[("user", "Q")]));
        assert_eq!(chosen, messages(&[("assistant", "A")]));
        assert_eq!(rejected, messages(&[("assistant", "B")]));
        assert_eq!(feedback, margins(Some(0.5)));
    }

    #[test]
    fn whole_conversations_beside_a_prompt_of_messages() {
        let (prompt, [chosen, _], _) = pair(
            r#"{
                "prompt": [{"role": "user", "content": "Q"}],
                "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
                "rejected": [{"role": "assistant", "content": "B"}]
            }"#,
        );
        assert_eq!(prompt, messages(&[("user", "Q")]));
        assert_eq!(chosen, messages(&[("assistant", "A")]));
    }

    #[test]
    fn an_implicit_prompt_of_messages() {
        let (prompt, [chosen, rejected], feedback) = pair(
            r#"{
                "chosen": [
                    {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"},
                    {"role": "user", "content": "R"}, {"role": "assistant", "content": "C"}
                ],
                "rejected": [
                    {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"},
                    {"role": "user", "content": "R"}, {"role": "assistant", "content": "D"}
                ]
            }"#,
        );
        assert_eq!(prompt, messages(&[("user", "Q"), ("assistant", "A"), ("user", "R")]));
        assert_eq!(chosen, messages(&[("assistant", "C")]));
        assert_eq!(rejected, messages(&[("assistant", "D")]));
        assert_eq!(feedback, margins(None));
    }

    #[test]
    fn an_implicit_prompt_of_texts_ends_between_words() {
        for (chosen, rejected, prompt) in [
            // The shape of hh-rlhf; both answers begin with the same letters.
            (
                "\n\nHuman: Hi\n\nAssistant: blue",
                "\n\nHuman: Hi\n\nAssistant: black",
                "\n\nHuman: Hi\n\nAssistant:",
            ),
            ("Q:\nyes", "Q:\nno", "Q:\n"),
            ("Q: yes", "Q: yes, but", "Q:"),
            ("問\u{3000}甲", "問\u{3000}乙", "問\u{3000}"),
        ] {
            let (p, c, r) = split(&Content::text(chosen), &Content::text(rejected)).unwrap();
            assert_eq!(p, Content::text(prompt));
            assert_eq!([c, r], [chosen, rejected].map(|t| Content::text(&t[prompt.len()..])));
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (record, says) in [
            (
                r#"{"prompt": "Q", "chosen": "A", "rejected": "A"}"#,
                "`chosen` and `rejected` are the same",
            ),
            (
                r#"{"prompt": "Q", "chosen": "A", "rejected": null}"#,
                "no field `rejected`; the record has: prompt, chosen, rejected",
            ),
            (
                r#"{"chosen": "yes", "rejected": "no"}"#,
                "no `prompt`, and `chosen` and `rejected` begin differently",
            ),
            (
                r#"{"chosen": [{"role": "assistant", "content": "A"}], "rejected": "B"}"#,
                "one of `chosen` and `rejected` is a text, the other is not",
            ),
            (
                r#"{"prompt": "Q", "chosen": [{"role": "assistant", "content": "A"}], "rejected": [{"role": "assistant", "content": "B"}]}"#,
                "`chosen` is a list of messages but the prompt is a text; `as_chat = true` makes \
                 messages of texts",
            ),
            (
                r#"{"chosen": [{"role": "user", "content": "Q"}], "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}]}"#,
                "`chosen` has no assistant message",
            ),
            (
                r#"{"prompt": "Q", "chosen": ["A"], "rejected": "B"}"#,
                "`chosen` message 0: not an object with `role` and `content`",
            ),
            (
                r#"{"prompt": "Q", "chosen": "A", "rejected": "B", "margin": [1]}"#,
                "`margin` must be a number, not [1]",
            ),
            (
                r#"{"prompt": "Q", "chosen": "A", "rejected": "B", "chosen_score": 1}"#,
                "no field `rejected_score`; the record has: prompt, chosen, rejected, chosen_score",
            ),
        ] {
            assert_eq!(fault(record), says);
        }
    }
}

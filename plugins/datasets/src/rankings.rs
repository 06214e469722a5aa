//! Responses that were ranked, the best having the lowest rank.
//!
//! | record | fields |
//! |---|---|
//! | several responses | `prompt`, `completions` or `responses`, `ranks`: a list as long |
//! | Nectar (`berkeley-nest/Nectar`) | `prompt` as `Human:` and `Assistant:` turns, `answers`: `{answer, rank}` |
//!
//! The best response's score is 1, the worst's 0, the others' between by their ranks.
//! [`super::shape`] says what `as` does.

use super::human_turns;
use super::shape::{Scored, Shape, scores_of_ranks};
use uft_core::prelude::*;
use uft_core::record::Value;

pub struct Rankings {
    chat: Chat,
    shape: Shape,
}

impl FeedbackAdapter for Rankings {
    const NAME: &'static str = "rankings";
    const ABOUT: &'static str = "prompt, completions|responses, ranks (1 = best); Nectar's answers";

    fn new(params: &mut Params) -> Self {
        Self { chat: Chat::from_params(params), shape: Shape::from_params(params) }
    }

    fn offers(&self) -> Kinds {
        self.shape.offers()
    }

    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        match record.first_of(&["completions", "responses", "answers"])? {
            "answers" => self.nectar(record),
            field => self.ranked(record, field),
        }
    }
}

impl Rankings {
    fn ranked(&self, record: &Record, field: &str) -> Result<Vec<Sample>, Fault> {
        let (responses, ranks) = (record.contents(field)?, record.numbers("ranks")?);
        let (name, ranked) = (record.column(field), record.column("ranks"));
        if responses.len() != ranks.len() {
            let (n, m) = (responses.len(), ranks.len());
            return Err(Fault::record(format!("{n} `{name}` but {m} `{ranked}`")));
        }
        let scores = scores_of_ranks(ranked, &ranks)?;
        let sample = self.chat.sample(record, record.content("prompt")?)?;
        self.scored(self.chat, name, &sample, responses, scores)
    }

    fn nectar(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        let name = record.column("answers");
        let answers = record.get("answers").and_then(Value::as_array);
        let answers =
            answers.ok_or_else(|| Fault::record(format!("`{name}` must be a list of answers")))?;
        let read = |(i, answer): (usize, &Value)| match (
            answer["answer"].as_str(),
            answer["rank"].as_f64(),
        ) {
            (Some(text), Some(rank)) => Ok((Content::text(text.trim()), rank)),
            _ => Err(Fault::record(format!("`{name}[{i}]` has no `answer` and `rank`"))),
        };
        let read = answers.iter().enumerate().map(read).collect::<Result<Vec<_>, _>>()?;
        let (responses, ranks): (Vec<Content>, Vec<f64>) = read.into_iter().unzip();
        let scores = scores_of_ranks(name, &ranks)?;
        let chat = self.chat.instruction_data();
        let prompt = if chat.is_text() { record.content("prompt")? } else { turns(record)? };
        let sample = chat.sample(record, prompt)?;
        self.scored(chat, name, &sample, responses, scores)
    }

    fn scored(
        &self,
        chat: Chat,
        name: &str,
        sample: &Sample,
        responses: Vec<Content>,
        scores: Vec<f64>,
    ) -> Result<Vec<Sample>, Fault> {
        let scored = responses.into_iter().zip(scores).enumerate().map(|(i, (response, score))| {
            Ok((chat.response(&format!("{name}[{i}]"), response, &sample.prompt)?, score))
        });
        self.shape.samples(sample, scored.collect::<Result<Vec<Scored>, Fault>>()?)
    }
}

/// Nectar's prompt without the empty turn at its end, which waits for the answer.
fn turns(record: &Record) -> Result<Content, Fault> {
    let mut turns = human_turns::parse(record.column("prompt"), record.text("prompt")?)?;
    turns.pop_if(|last| last.role == "assistant" && last.content.is_empty());
    Ok(Content::messages(turns))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{adapted, fault, messages, responses};
    use super::*;

    const NECTAR: &str = include_str!("../fixtures/nectar.jsonl");
    const RANKINGS: &str = include_str!("../fixtures/rankings.jsonl");

    #[test]
    fn ranks_become_scores_from_1_to_0() {
        let samples = adapted::<Rankings>("{}", RANKINGS);
        let scored = [("Two.", 0.5), ("Four.", 1.0), ("A number.", 0.0)];
        let scored = scored.map(|(text, score)| (text, Feedback::Score(score)));
        assert_eq!(responses(&samples[0][0]), scored);
        assert_eq!(samples[0][0].prompt, Content::text("What is 2 + 2?\n"));
        assert_eq!(samples[1][0].prompt, messages(&[("user", "Say hello.")]));
    }

    #[test]
    fn nectar_is_a_chat() {
        let sample = &adapted::<Rankings>("{}", NECTAR)[0][0];
        let history = [
            ("user", "Is a tomato a fruit?"),
            ("assistant", "Yes, botanically."),
            ("user", "And a cucumber?"),
        ];
        assert_eq!(sample.prompt, messages(&history));
        let ranked = [("Also a fruit.", 1.0), ("It is green.", 1.0 / 3.0), ("No.", 0.0)];
        let listed: Vec<_> = responses(sample);
        assert_eq!(listed.len(), 4);
        for (text, score) in ranked {
            assert!(listed.contains(&(text, Feedback::Score(score))), "{text}: {listed:?}");
        }
        let pair = &adapted::<Rankings>(r#"{"as": "pair"}"#, NECTAR)[0][0];
        let pair: Vec<&str> = responses(pair).iter().map(|(text, _)| *text).collect();
        assert_eq!(pair, ["Also a fruit.", "No."]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (record, says) in [
            (
                r#"{"prompt": "Q", "completions": ["A", "B"], "ranks": [1]}"#,
                "2 `completions` but 1 `ranks`",
            ),
            (
                r#"{"prompt": "Q", "completions": ["A", "B"], "ranks": [1, 1]}"#,
                "`ranks` gives all responses the same rank",
            ),
            (
                r#"{"prompt": "Q", "completions": ["A", "B"]}"#,
                "no field `ranks`; the record has: prompt, completions",
            ),
            (
                r#"{"prompt": "\n\nHuman: Q", "answers": [{"answer": "A"}]}"#,
                "`answers[0]` has no `answer` and `rank`",
            ),
            (
                r#"{"prompt": "Q", "answers": [{"answer": "A", "rank": 1}, {"answer": "B", "rank": 2}]}"#,
                "`prompt` does not begin with a turn behind `Human:` or `Assistant:`",
            ),
        ] {
            assert_eq!(fault::<Rankings>("{}", record), says);
        }
    }
}

//! UltraFeedback (`openbmb/UltraFeedback`, arXiv 2310.01377): an `instruction` with four `completions`.
//!
//! A completion's score is its `fine-grained_score`, the mean of its four ratings from 1 to 5, or its
//! `overall_score` from 1 to 10, of which some were wrong in the first edition. The system prompts that
//! made the completions differ, and the critiques, are not used. [`super::shape`] says what `as` does.

use super::shape::{Scored, Shape};
use uft_core::prelude::*;
use uft_core::record::Value;

pub struct UltraFeedback {
    chat: Chat,
    shape: Shape,
    /// The score's field with its lowest and highest value.
    score: (&'static str, f64, f64),
}

impl FeedbackAdapter for UltraFeedback {
    const NAME: &'static str = "ultrafeedback";
    const ABOUT: &'static str = "UltraFeedback: instruction, completions with their scores";

    fn new(params: &mut Params) -> Self {
        let about = "the mean of the four ratings, or the overall score";
        let words = ["fine-grained", "overall"];
        Self {
            chat: Chat::from_params(params).instruction_data(),
            shape: Shape::from_params(params),
            score: match params.choice("score", "fine-grained", &words, about) {
                "overall" => ("overall_score", 1.0, 10.0),
                _ => ("fine-grained_score", 1.0, 5.0),
            },
        }
    }

    fn offers(&self) -> Kinds {
        self.shape.offers()
    }

    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        let name = record.column("completions");
        let completions = record.get("completions").and_then(Value::as_array);
        let completions = completions.filter(|list| !list.is_empty()).ok_or_else(|| {
            Fault::record(format!("`{name}` must be a list of completions with their scores"))
        })?;
        let sample = self.chat.sample(record, record.content("instruction")?)?;
        let scored = completions.iter().enumerate().map(|(i, completion)| {
            let place = format!("{name}[{i}]");
            let text = completion["response"].as_str();
            let text =
                text.ok_or_else(|| Fault::record(format!("`{place}` has no text `response`")))?;
            let response = self.chat.response(&place, Content::text(text), &sample.prompt)?;
            Ok((response, self.score(&place, completion)?))
        });
        let scored: Vec<Scored> = scored.collect::<Result<_, Fault>>()?;
        self.shape.samples(&sample, scored)
    }
}

impl UltraFeedback {
    /// A completion's score from 0 to 1.
    fn score(&self, place: &str, completion: &Value) -> Result<f64, Fault> {
        let (field, low, high) = self.score;
        let value = &completion[field];
        let score = value.as_f64().or_else(|| value.as_str()?.trim().parse().ok());
        match score {
            Some(score) if (low..=high).contains(&score) => Ok((score - low) / (high - low)),
            _ => Err(Fault::record(format!(
                "`{place}` has no `{field}` from {low} to {high}, but {value}"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{adapted, fault, messages, responses};
    use super::*;

    const FIXTURE: &str = include_str!("../fixtures/ultrafeedback.jsonl");

    fn scores(params: &str, record: usize) -> Vec<f32> {
        let samples = &adapted::<UltraFeedback>(params, FIXTURE)[record];
        assert_eq!(samples.len(), 1);
        samples[0].responses.iter().map(|r| r.feedback.value()).collect()
    }

    #[test]
    fn four_completions_are_a_group_with_their_scores() {
        assert_eq!(scores("{}", 0), [0.9375, 0.25, 0.75, 0.25]);
        assert_eq!(scores(r#"{"score": "overall"}"#, 0), [8.0 / 9.0, 2.0 / 9.0, 6.0 / 9.0, 0.0]);
        let sample = &adapted::<UltraFeedback>("{}", FIXTURE)[0][0];
        assert_eq!(sample.prompt, messages(&[("user", "Name three rivers in Europe.")]));
        assert_eq!(responses(sample)[1], ("The Nile.", Feedback::Score(0.25)));
    }

    #[test]
    fn or_a_sample_each_or_the_best_against_the_worst() {
        let samples = &adapted::<UltraFeedback>(r#"{"as": "scores"}"#, FIXTURE)[0];
        assert!(samples.len() == 4 && samples.iter().all(|s| s.responses.len() == 1));
        let samples = &adapted::<UltraFeedback>(r#"{"as": "pair"}"#, FIXTURE)[0];
        let margin = Some(0.6875).into();
        let pair = [
            ("The Rhine, the Danube and the Loire.", Feedback::Chosen(margin)),
            ("Rivers are bodies of water.", Feedback::Rejected(margin)),
        ];
        assert_eq!(responses(&samples[0]), pair);
        assert_eq!(adapted::<UltraFeedback>(r#"{"as": "pairs"}"#, FIXTURE)[0].len(), 5);
    }

    #[test]
    fn texts_stay_texts_if_wanted() {
        let sample = &adapted::<UltraFeedback>(r#"{"as_chat": false}"#, FIXTURE)[0][0];
        assert_eq!(sample.prompt, Content::text("Name three rivers in Europe."));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (record, says) in [
            (
                r#"{"instruction": "Q", "completions": []}"#,
                "`completions` must be a list of completions with their scores",
            ),
            (
                r#"{"instruction": "Q", "completions": [{"fine-grained_score": 3}]}"#,
                "`completions[0]` has no text `response`",
            ),
            (
                r#"{"instruction": "Q", "completions": [{"response": "A", "fine-grained_score": "N/A"}]}"#,
                "`completions[0]` has no `fine-grained_score` from 1 to 5, but \"N/A\"",
            ),
            (
                r#"{"instruction": "Q", "completions": [{"response": "", "fine-grained_score": 3}]}"#,
                "`completions[0]` has an empty assistant message",
            ),
        ] {
            assert_eq!(fault::<UltraFeedback>("{}", record), says);
        }
    }
}

//! What becomes of several responses to one prompt of which each has a score from 0 to 1.
//!
//! | `as` | samples | for |
//! |---|---|---|
//! | `"group"` | one, with every response and its score | objectives on groups (`nca`), or on scores: the prompt is computed once |
//! | `"scores"` | one for each response with its score | objectives on scores, in batches that mix prompts more |
//! | `"pair"` | one, the best against the worst | objectives on pairs |
//! | `"pairs"` | one for each two responses with different scores | objectives on pairs |
//!
//! A pair's margin is the difference of its scores.

use uft_core::prelude::*;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    Group,
    Scores,
    Pair,
    Pairs,
}

/// A response with its score.
pub type Scored = (Content, f64);

impl Shape {
    pub const WORDS: [&'static str; 4] = ["group", "scores", "pair", "pairs"];

    /// Reads `as`.
    pub fn from_params(params: &mut Params) -> Self {
        let about = "one sample with all scores, one sample each, best against worst, or all pairs";
        Self::of(params.choice("as", "group", &Self::WORDS, about))
    }

    pub fn of(word: &str) -> Self {
        match word {
            "scores" => Shape::Scores,
            "pair" => Shape::Pair,
            "pairs" => Shape::Pairs,
            _ => Shape::Group,
        }
    }

    pub fn offers(self) -> Kinds {
        match self {
            Shape::Group | Shape::Scores => Kinds::SCORE,
            Shape::Pair | Shape::Pairs => Kinds::PAIR,
        }
    }

    /// The samples of a prompt; `empty` is one without responses.
    ///
    /// # Errors
    /// If pairs are wanted and all scores are the same.
    pub fn samples(self, empty: &Sample, responses: Vec<Scored>) -> Result<Vec<Sample>, Fault> {
        let add = |sample: Sample, (content, score): Scored| {
            sample.response(content, Feedback::Score(score as f32))
        };
        match self {
            Shape::Group => Ok(vec![responses.into_iter().fold(empty.clone(), add)]),
            Shape::Scores => {
                Ok(responses.into_iter().map(|scored| add(empty.clone(), scored)).collect())
            }
            Shape::Pair | Shape::Pairs => {
                let mut ranked = responses;
                // Stable: of equals the first in the record is taken as the better one.
                ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
                let last = ranked.len().saturating_sub(1);
                let two = |better: usize, worse: usize| {
                    let ((won, high), (lost, low)) = (&ranked[better], &ranked[worse]);
                    let margin = Some((high - low) as f32);
                    let sample =
                        empty.clone().response(won.clone(), Feedback::Chosen(margin.into()));
                    (high > low)
                        .then(|| sample.response(lost.clone(), Feedback::Rejected(margin.into())))
                };
                let pairs: Vec<Sample> = match self {
                    Shape::Pair => two(0, last).into_iter().collect(),
                    _ => (0..last)
                        .flat_map(|better| (better + 1..=last).map(move |worse| (better, worse)))
                        .filter_map(|(better, worse)| two(better, worse))
                        .collect(),
                };
                match pairs.is_empty() {
                    true => Err(Fault::record(
                        "all responses are equally good, which gives no pair; `as = \"group\"` takes them",
                    )),
                    false => Ok(pairs),
                }
            }
        }
    }
}

/// Ranks, of which the lowest is the best, as scores: the best gets 1, the worst 0.
///
/// # Errors
/// If all are the same: such ranks say nothing.
pub fn scores_of_ranks(name: &str, ranks: &[f64]) -> Result<Vec<f64>, Fault> {
    let best = ranks.iter().copied().fold(f64::INFINITY, f64::min);
    let worst = ranks.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if best >= worst {
        return Err(Fault::record(format!("`{name}` gives all responses the same rank")));
    }
    Ok(ranks.iter().map(|rank| (worst - rank) / (worst - best)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(shape: Shape, scores: &[f64]) -> Result<Vec<Sample>, Fault> {
        let responses = scores.iter().enumerate().map(|(i, s)| (Content::text(i.to_string()), *s));
        shape.samples(&Sample::new(Content::text("Q")), responses.collect())
    }

    /// Chosen, rejected and margin of every sample.
    fn pairs(shape: Shape, scores: &[f64]) -> Vec<(String, String, f32)> {
        let pair = |sample: Sample| {
            let text = |i: usize| match &sample.responses[i].content {
                Content::Text(text) => text.to_string(),
                Content::Messages(_) => unreachable!("texts"),
            };
            assert_eq!(sample.responses[0].feedback.kind(), Kind::Chosen);
            assert_eq!(sample.responses[1].feedback.kind(), Kind::Rejected);
            (text(0), text(1), sample.responses[0].feedback.value())
        };
        samples(shape, scores).unwrap().into_iter().map(pair).collect()
    }

    #[test]
    fn scores_are_one_sample_or_one_each() {
        let group = samples(Shape::Group, &[0.25, 1.0, 0.5]).unwrap();
        let values: Vec<f32> = group[0].responses.iter().map(|r| r.feedback.value()).collect();
        assert_eq!((group.len(), values.as_slice()), (1, &[0.25, 1.0, 0.5][..]));
        let single = samples(Shape::Scores, &[0.25, 1.0, 0.5]).unwrap();
        assert!(single.len() == 3 && single.iter().all(|s| s.responses.len() == 1));
        assert_eq!(single[1].responses[0].feedback, Feedback::Score(1.0));
    }

    #[test]
    fn pairs_are_best_and_worst_or_every_two_that_differ() {
        let scores = [0.25, 1.0, 0.5, 0.25];
        assert_eq!(pairs(Shape::Pair, &scores), [("1".into(), "3".into(), 0.75)]);
        let all = pairs(Shape::Pairs, &scores);
        let named: Vec<String> = all.iter().map(|(won, lost, _)| format!("{won}>{lost}")).collect();
        assert_eq!(named, ["1>2", "1>0", "1>3", "2>0", "2>3"]);
    }

    #[test]
    fn equals_give_no_pair() {
        for shape in [Shape::Pair, Shape::Pairs] {
            for scores in [&[0.5, 0.5][..], &[0.5]] {
                let fault = samples(shape, scores).unwrap_err();
                assert!(fault.message.starts_with("all responses are equally good"), "{fault}");
            }
        }
    }

    #[test]
    fn ranks_become_scores() {
        assert_eq!(scores_of_ranks("ranks", &[1.0, 3.0, 2.0]).unwrap(), [1.0, 0.0, 0.5]);
        assert_eq!(scores_of_ranks("ranks", &[0.0, 1.0]).unwrap(), [1.0, 0.0]);
        let fault = scores_of_ranks("ranks", &[2.0, 2.0]).unwrap_err();
        assert_eq!(fault.message.as_str(), "`ranks` gives all responses the same rank");
    }
}

//! OpenAssistant's conversation trees (`OpenAssistant/oasst1`, `oasst2`: files `*.trees.jsonl`).
//!
//! A tree's `prompt` is its first message; every message has a `text`, a `role` (`prompter` or `assistant`) and
//! `replies`, and where people ranked the replies each has a `rank`, 0 for the best. Deleted messages and
//! those that did not pass review are left out with what replies to them.
//!
//! With `as = "demonstration"` a tree is one conversation, which follows the best reply at every turn and
//! ends with the assistant. Otherwise every message of a prompter with two ranked replies or more is a
//! prompt, with the conversation that leads to it; the best reply's score is 1, the worst's 0, and
//! [`super::shape`] says what `as` does.

use super::shape::{Shape, scores_of_ranks};
use uft_core::prelude::*;
use uft_core::record::Value;

pub struct Oasst {
    /// None: demonstrations.
    shape: Option<Shape>,
}

impl FeedbackAdapter for Oasst {
    const NAME: &'static str = "oasst";
    const ABOUT: &'static str = "OpenAssistant trees: prompt with replies, of ranks 0, 1, …";

    fn new(params: &mut Params) -> Self {
        let [group, scores, pair, pairs] = Shape::WORDS;
        let words = ["demonstration", group, scores, pair, pairs];
        let about = "the best conversation, or for each prompt with ranked replies one sample with all \
                     scores, one each, best against worst, or all pairs";
        let word = params.choice("as", "group", &words, about);
        Self { shape: (word != "demonstration").then(|| Shape::of(word)) }
    }

    fn offers(&self) -> Kinds {
        self.shape.map_or(Kinds::DEMONSTRATION, Shape::offers)
    }

    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        let root = Node::read(record.get("prompt"))?;
        match self.shape {
            None => root.best_conversation(),
            Some(shape) => {
                let mut samples = Vec::new();
                root.ranked(shape, &mut Vec::new(), &mut samples)?;
                match samples.is_empty() {
                    true => Err(Fault::record(
                        "no message of the tree has two replies with different ranks; `as = \
                         \"demonstration\"` takes trees without",
                    )),
                    false => Ok(samples),
                }
            }
        }
    }
}

/// A message with its replies.
struct Node {
    message: Message,
    rank: Option<f64>,
    replies: Vec<Node>,
}

impl Node {
    fn read(value: Option<&Value>) -> Result<Node, Fault> {
        let wrong =
            || Fault::record("`prompt` must be a message with `text`, `role` and `replies`");
        let fields = value.and_then(Value::as_object).ok_or_else(wrong)?;
        let text = fields.get("text").and_then(Value::as_str).ok_or_else(wrong)?;
        let role = match fields.get("role").and_then(Value::as_str) {
            Some("prompter") => "user",
            Some("assistant") => "assistant",
            _ => {
                return Err(Fault::record(
                    "a message has another `role` than prompter or assistant",
                ));
            }
        };
        let replies =
            fields.get("replies").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        Ok(Node {
            message: Message::new(role, text),
            rank: fields.get("rank").and_then(Value::as_f64),
            replies: replies
                .iter()
                .filter(|reply| !left_out(reply))
                .map(|reply| Node::read(Some(reply)))
                .collect::<Result<_, _>>()?,
        })
    }

    /// The conversation of the best replies, up to the assistant's last turn.
    fn best_conversation(&self) -> Result<Vec<Sample>, Fault> {
        let (mut messages, mut node) = (Vec::new(), self);
        // Replies without a rank come after those with one, in the tree's order.
        let order = |a: &&Node, b: &&Node| {
            let rank = |node: &Node| node.rank.unwrap_or(f64::INFINITY);
            rank(a).total_cmp(&rank(b))
        };
        while let Some(best) = node.replies.iter().min_by(order) {
            messages.push(best.message.clone());
            node = best;
        }
        messages.pop_if(|last| last.role == "user");
        if messages.is_empty() {
            return Err(Fault::record("the tree's first message has no reply"));
        }
        let prompt = Content::messages([self.message.clone()]);
        let sample = Sample::new(prompt);
        Ok(vec![sample.response(Content::messages(messages), Feedback::Demonstration)])
    }

    /// Adds the samples of this message and of all below it; `history` is what leads here.
    fn ranked(
        &self,
        shape: Shape,
        history: &mut Vec<Message>,
        samples: &mut Vec<Sample>,
    ) -> Result<(), Fault> {
        history.push(self.message.clone());
        let ranked = self.replies.iter().filter_map(|reply| Some((reply, reply.rank?)));
        let (replies, ranks): (Vec<&Node>, Vec<f64>) = ranked.unzip();
        let differ = ranks.iter().any(|rank| *rank != ranks[0]);
        if self.message.role == "user" && differ {
            let scores = scores_of_ranks("rank", &ranks)?;
            let turn = |node: &Node| Content::messages([node.message.clone()]);
            let scored = replies.iter().map(|node| turn(node)).zip(scores).collect();
            let prompt = Sample::new(Content::messages(history.iter().cloned()));
            samples.extend(shape.samples(&prompt, scored)?);
        }
        for reply in &self.replies {
            reply.ranked(shape, history, samples)?;
        }
        history.pop();
        Ok(())
    }
}

/// Whether a message was deleted or refused.
fn left_out(message: &Value) -> bool {
    message["deleted"].as_bool() == Some(true) || message["review_result"].as_bool() == Some(false)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{adapted, fault, messages, responses};
    use super::*;

    const FIXTURE: &str = include_str!("../fixtures/oasst.jsonl");

    #[test]
    fn every_message_with_ranked_replies_is_a_prompt() {
        let samples = &adapted::<Oasst>("{}", FIXTURE)[0];
        assert_eq!(samples.len(), 2);
        assert_eq!(samples[0].prompt, messages(&[("user", "Why is the sky blue?")]));
        let scored =
            [("Air scatters blue light most.", 1.0), ("It is not.", 0.0), ("Physics.", 0.5)];
        let scored = scored.map(|(text, score)| (text, Feedback::Score(score)));
        assert_eq!(responses(&samples[0]), scored);
        let history = [
            ("user", "Why is the sky blue?"),
            ("assistant", "Air scatters blue light most."),
            ("user", "And why are sunsets red?"),
        ];
        assert_eq!(samples[1].prompt, messages(&history));
        let scored = [("Because of the sun.", 0.0), ("The blue is gone by then.", 1.0)];
        let scored = scored.map(|(text, score)| (text, Feedback::Score(score)));
        assert_eq!(responses(&samples[1]), scored);
    }

    #[test]
    fn pairs_are_of_the_same_prompt() {
        let samples = &adapted::<Oasst>(r#"{"as": "pair"}"#, FIXTURE)[0];
        let texts: Vec<Vec<&str>> =
            samples.iter().map(|s| responses(s).iter().map(|(text, _)| *text).collect()).collect();
        assert_eq!(
            texts,
            [
                ["Air scatters blue light most.", "It is not."],
                ["The blue is gone by then.", "Because of the sun."]
            ]
        );
    }

    #[test]
    fn the_best_conversation_is_a_demonstration() {
        let samples = &adapted::<Oasst>(r#"{"as": "demonstration"}"#, FIXTURE)[0];
        let turns = [
            ("assistant", "Air scatters blue light most."),
            ("user", "And why are sunsets red?"),
            ("assistant", "The blue is gone by then."),
        ];
        assert_eq!(samples.len(), 1);
        assert_eq!(samples[0].responses[0].content, messages(&turns));
        assert_eq!(samples[0].responses[0].feedback, Feedback::Demonstration);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let reply = r#"{"text": "A", "role": "assistant", "replies": []}"#;
        for (params, prompt, says) in [
            ("{}", "\"Q\"".into(), "`prompt` must be a message with `text`, `role` and `replies`"),
            (
                "{}",
                r#"{"text": "Q", "role": "judge", "replies": []}"#.into(),
                "a message has another `role` than prompter or assistant",
            ),
            (
                "{}",
                format!(r#"{{"text": "Q", "role": "prompter", "replies": [{reply}, {reply}]}}"#),
                "no message of the tree has two replies with different ranks; `as = \
                 \"demonstration\"` takes trees without",
            ),
            (
                r#"{"as": "demonstration"}"#,
                r#"{"text": "Q", "role": "prompter", "replies": []}"#.into(),
                "the tree's first message has no reply",
            ),
        ] {
            assert_eq!(fault::<Oasst>(params, &format!(r#"{{"prompt": {prompt}}}"#)), says);
        }
    }
}

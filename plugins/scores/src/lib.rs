//! Records with explicit scores, mapped to `0..=1`.
//!
//! | record | fields |
//! |---|---|
//! | one response | `prompt`, `completion` or `response`, `score` or `reward` or `rating` |
//! | several | `prompt`, `completions` or `responses`, `scores` or `rewards` or `ratings`: one sample, whose prompt is computed once |
//! | HelpSteer2 | `prompt`, `response` and the attributes that `weights` names, if there is no score |
//!
//! A score `v` in `range = [low, high]` becomes `(v - low) / (high - low)`. HelpSteer2's attributes
//! are weighed: with `u = (a - low) / (high - low)` by `attribute_range`,
//! `s = (sum w u - sum of the negative w) / sum |w|`, which spans `0..=1`; with the default weights
//! this is UNA's `(0.65 helpfulness + 0.8 correctness + 0.45 coherence) / 7.6`
//! (arXiv 2408.15339, section 4; its published code).
//!
//! HelpSteer2 holds the earlier turns of a conversation in the prompt's text, behind lines
//! `<extra_id_1>Assistant` and `<extra_id_1>User`; those prompts become messages.

use uft_core::prelude::*;

const MARKER: &str = "<extra_id_1>";

struct Scores {
    chat: Chat,
    range: (f64, f64),
    weights: Vec<(String, f64)>,
    attribute_range: (f64, f64),
}

impl FeedbackAdapter for Scores {
    const NAME: &'static str = "scores";
    const ABOUT: &'static str =
        "prompt, completion|response, score|reward|rating; lists of them; HelpSteer2's attributes";

    fn new(params: &mut Params) -> Self {
        let una = [("helpfulness", 0.65), ("correctness", 0.8), ("coherence", 0.45)];
        let weights = params.numbers("weights", &una, "HelpSteer2 attributes and their weights");
        if weights.iter().all(|(_, w)| *w == 0.0) {
            params.reject("parameter `weights` has no weight other than 0");
        }
        Self {
            chat: Chat::from_params(params),
            range: params.range("range", (0.0, 1.0), "the scores that become 0 and 1"),
            weights,
            attribute_range: params.range(
                "attribute_range",
                (0.0, 4.0),
                "lowest and highest value of a HelpSteer2 attribute",
            ),
        }
    }

    fn offers(&self) -> Kinds {
        Kinds::SCORE
    }

    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        if let Ok(field) = record.first_of(&["completions", "responses"]) {
            return self.several(record, field);
        }
        let rated = ["score", "reward", "rating"];
        let score = rated.into_iter().find(|f| record.has(f));
        let helpsteer = score.is_none() && self.weights.iter().all(|(name, _)| record.has(name));
        let (chat, prompt, score) = if helpsteer {
            let score = self.weighed(record)?;
            (self.chat.instruction_data(), turns(record.content("prompt")?)?, score)
        } else {
            let field = record.first_of(&rated)?;
            let score = unit(record.column(field), record.number(field)?, self.range)?;
            (self.chat, record.content("prompt")?, score)
        };
        let sample = chat.sample(record, prompt)?;
        let field = record.first_of(&["completion", "response"])?;
        let name = record.column(field);
        let response = chat.response(name, record.content(field)?, &sample.prompt)?;
        Ok(vec![sample.response(response, Feedback::Score(score as f32))])
    }
}

impl Scores {
    fn several(&self, record: &Record, field: &str) -> Result<Vec<Sample>, Fault> {
        let rated = record.first_of(&["scores", "rewards", "ratings"])?;
        let (responses, scores) = (record.contents(field)?, record.numbers(rated)?);
        let (name, rated) = (record.column(field), record.column(rated));
        if responses.len() != scores.len() || responses.is_empty() {
            let (n, m) = (responses.len(), scores.len());
            return Err(Fault::record(format!("{n} `{name}` but {m} `{rated}`")));
        }
        let mut sample = self.chat.sample(record, record.content("prompt")?)?;
        for (i, (response, score)) in responses.into_iter().zip(scores).enumerate() {
            let response = self.chat.response(&format!("{name}[{i}]"), response, &sample.prompt)?;
            let score = unit(&format!("{rated}[{i}]"), score, self.range)?;
            sample = sample.response(response, Feedback::Score(score as f32));
        }
        Ok(vec![sample])
    }

    fn weighed(&self, record: &Record) -> Result<f64, Fault> {
        let (mut sum, mut scale) = (0.0, 0.0);
        for (name, weight) in &self.weights {
            let value = unit(record.column(name), record.number(name)?, self.attribute_range)?;
            sum += weight * value + (-weight).max(0.0);
            scale += weight.abs();
        }
        Ok(sum / scale)
    }
}

/// A score's place in its range, `0..=1`.
fn unit(name: &str, value: f64, (low, high): (f64, f64)) -> Result<f64, Fault> {
    if (low..=high).contains(&value) {
        return Ok((value - low) / (high - low));
    }
    Err(Fault::record(format!("`{name}` is {value}, outside the range [{low}, {high}]")))
}

/// HelpSteer2's prompt: the first user turn, then marked turns.
fn turns(prompt: Content) -> Result<Content, Fault> {
    let text = match &prompt {
        Content::Text(text) if text.contains(MARKER) => text,
        _ => return Ok(prompt),
    };
    let mut parts = text.split(MARKER);
    let first = parts.next().unwrap_or_default();
    let mut messages = vec![Message::new("user", first.trim_end_matches('\n'))];
    for part in parts {
        let (role, text) = part.split_once('\n').unwrap_or((part, ""));
        let role = match role.trim_end() {
            "Assistant" => "assistant",
            "User" => "user",
            other => {
                let why = format!("`prompt` has a turn of `{other}` behind `{MARKER}`");
                return Err(Fault::record(why));
            }
        };
        messages.push(Message::new(role, text.trim_end_matches('\n')));
    }
    Ok(Content::messages(messages))
}

uft_core::plugin! { adapters: [Scores] }

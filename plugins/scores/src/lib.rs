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
//! `<extra_id_1>Assistant` and `<extra_id_1>User`; they become messages. With `as_chat = false` the
//! text stays as it is, which is what UNA's published code trains on.

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
            let (chat, prompt) = (self.chat.instruction_data(), record.content("prompt")?);
            (chat, if chat.is_text() { prompt } else { turns(prompt)? }, self.weighed(record)?)
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

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::adapt;

    fn fault(params: &str, record: &str) -> String {
        adapt::<Scores>(params, record).unwrap_err().message.into()
    }

    /// The scores of the only sample.
    fn scores(params: &str, record: &str) -> Vec<f32> {
        let samples = adapt::<Scores>(params, record).unwrap();
        assert_eq!(samples.len(), 1);
        samples[0].responses.iter().map(|r| r.feedback.value()).collect()
    }

    #[test]
    fn a_score_is_its_place_in_the_range() {
        let record = r#"{"prompt": "Q", "completion": "A", "score": 0.25}"#;
        let sample =
            Sample::new(Content::text("Q")).response(Content::text("A"), Feedback::Score(0.25));
        assert_eq!(adapt::<Scores>("{}", record).unwrap(), [sample]);
        let record = r#"{"prompt": "Q", "response": "A", "rating": "7.75"}"#;
        assert_eq!(scores(r#"{"range": [1, 10]}"#, record), [0.75]);
        let record = r#"{"prompt": "Q", "response": "A", "score": null, "reward": -1}"#;
        assert_eq!(scores(r#"{"range": [-1, 1]}"#, record), [0.0]);
    }

    #[test]
    fn several_responses_share_their_prompt() {
        let record = r#"{
            "prompt": [{"role": "user", "content": "Q"}],
            "completions": [
                [{"role": "assistant", "content": "A"}],
                [{"role": "assistant", "content": "B"}]
            ],
            "scores": [1, 4]
        }"#;
        assert_eq!(scores(r#"{"range": [0, 4]}"#, record), [0.25, 1.0]);
        let texts = r#"{"prompt": "Q", "responses": ["A", "B", "C"], "rewards": [0, 0.5, 1]}"#;
        assert_eq!(scores("{}", texts), [0.0, 0.5, 1.0]);
    }

    const HELPSTEER2: &str = r#"{
        "prompt": "Hi\n<extra_id_1>Assistant\nHello!\n\n<extra_id_1>User\nAnd now?",
        "response": "Bye.",
        "helpfulness": 3, "correctness": 4, "coherence": 2, "complexity": 1, "verbosity": 4
    }"#;

    #[test]
    fn helpsteer2_is_weighed_as_una_does() {
        let una = (0.65 * 3.0 + 0.8 * 4.0 + 0.45 * 2.0) / 7.6;
        assert_eq!(scores("{}", HELPSTEER2), [una as f32]);
        // A negative weight counts what is missing to the top.
        let params = r#"{"weights": {"helpfulness": 3, "verbosity": -1}}"#;
        assert_eq!(scores(params, HELPSTEER2), [(3.0 * 0.75 + 1.0 - 1.0) / 4.0]);
        // A score column comes first.
        let scored = HELPSTEER2.replace("\"complexity\"", "\"score\"");
        assert_eq!(scores("{}", &scored), [1.0]);
    }

    #[test]
    fn helpsteer2_prompts_become_turns() {
        let sample = &adapt::<Scores>("{}", HELPSTEER2).unwrap()[0];
        let turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "And now?")];
        let turns = turns.map(|(role, text)| Message::new(role, text));
        assert_eq!(sample.prompt, Content::messages(turns));
        let answer = Content::messages([Message::new("assistant", "Bye.")]);
        assert_eq!(sample.responses[0].content, answer);
        let raw = &adapt::<Scores>(r#"{"as_chat": false}"#, HELPSTEER2).unwrap()[0];
        assert!(matches!(&raw.prompt, Content::Text(text) if text.contains(MARKER)));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (record, says) in [
            (
                r#"{"prompt": "Q", "completion": "A", "score": 7}"#,
                "`score` is 7, outside the range [0, 1]",
            ),
            (
                r#"{"prompt": "Q", "completion": "A", "score": "good"}"#,
                "`score` must be a number, not \"good\"",
            ),
            (
                r#"{"prompt": "Q", "completion": "A", "helpfulness": 3, "coherence": null}"#,
                "no field `score` or `reward` or `rating`; the record has: prompt, completion, \
                 helpfulness, coherence",
            ),
            (
                r#"{"prompt": "Q", "response": "A", "helpfulness": 5, "correctness": 0, "coherence": 0}"#,
                "`helpfulness` is 5, outside the range [0, 4]",
            ),
            (
                r#"{"prompt": "Q<extra_id_1>Tool\n1", "response": "A", "helpfulness": 4, "correctness": 0, "coherence": 0}"#,
                "`prompt` has a turn of `Tool` behind `<extra_id_1>`",
            ),
            (
                r#"{"prompt": "Q", "completions": ["A", "B"], "scores": [1]}"#,
                "2 `completions` but 1 `scores`",
            ),
            (
                r#"{"prompt": "Q", "completions": [], "scores": []}"#,
                "0 `completions` but 0 `scores`",
            ),
            (
                r#"{"prompt": "Q", "completions": ["A", ""], "scores": [1, 0]}"#,
                "`completions[1]` is empty",
            ),
            (
                r#"{"prompt": "Q", "completions": ["A", "B"], "scores": [1, 2]}"#,
                "`scores[1]` is 2, outside the range [0, 1]",
            ),
            (
                r#"{"prompt": "Q", "completions": "A", "scores": [1]}"#,
                "`completions` must be a list, not \"A\"",
            ),
            (
                r#"{"prompt": "Q", "completions": ["A"], "scores": [null]}"#,
                "`scores` must be a list of numbers, not [null]",
            ),
        ] {
            assert_eq!(fault("{}", record), says);
        }
        assert_eq!(
            fault(r#"{"weights": {"helpfulness": 0}}"#, "{}"),
            "parameter `weights` has no weight other than 0"
        );
        assert_eq!(
            fault(r#"{"range": [5, 1]}"#, "{}"),
            "parameter `range` must be two numbers [low, high] in rising order, not [5,1]"
        );
    }
}

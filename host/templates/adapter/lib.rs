//! my-plugin: which files it reads.
//!
//! Records are `{"question": …, "answer": …, "stars": 1 to 5}`: replace it by your own.

use uft_core::prelude::*;

struct MyPlugin {
    most: f64,
}

impl FeedbackAdapter for MyPlugin {
    const NAME: &'static str = "my-plugin";
    const ABOUT: &'static str = "question, answer, stars";

    fn new(params: &mut Params) -> Self {
        let about = "stars of the best answer";
        Self {
            most: params.number("most", 5.0, Bound::Within(2.0, 100.0), about),
        }
    }

    fn offers(&self) -> Kinds {
        Kinds::SCORE
    }

    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        let (question, answer) = (record.text("question")?, record.text("answer")?);
        let stars = record.number("stars")?;
        if !(1.0..=self.most).contains(&stars) {
            return Err(Fault::record(format!(
                "`stars` must be from 1 to {}, not {stars}",
                self.most
            )));
        }
        let score = ((stars - 1.0) / (self.most - 1.0)) as f32;
        let prompt = Content::messages([Message::new("user", question)]);
        let response = Content::messages([Message::new("assistant", answer)]);
        Ok(vec![
            Sample::new(prompt).response(response, Feedback::Score(score)),
        ])
    }
}

uft_core::plugin! { adapters: [MyPlugin] }

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::{self, adapt};

    const RECORD: &str = r#"{"question": "Is it open?", "answer": "Yes.", "stars": 4}"#;

    #[test]
    fn is_a_sound_adapter() {
        check::adapter::<MyPlugin>("{}", &[RECORD]).expect_passed();
    }

    #[test]
    fn stars_become_scores() {
        let samples = adapt::<MyPlugin>("{}", RECORD).unwrap();
        assert_eq!(samples[0].responses[0].feedback, Feedback::Score(0.75));
        let fault = adapt::<MyPlugin>(r#"{"most": 3}"#, RECORD).unwrap_err();
        assert_eq!(fault.to_string(), "`stars` must be from 1 to 3, not 4");
    }
}

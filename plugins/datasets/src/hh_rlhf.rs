//! HH-RLHF (`Anthropic/hh-rlhf`): `chosen` and `rejected` are whole conversations as text.
//!
//! Both become messages; the turns that they have in common are the prompt. (`preferences` reads the
//! same records as plain text.)

use super::human_turns;
use uft_core::prelude::*;

pub struct HhRlhf;

impl FeedbackAdapter for HhRlhf {
    const NAME: &'static str = "hh-rlhf";
    const ABOUT: &'static str = "HH-RLHF: chosen, rejected, texts of Human: and Assistant: turns";

    fn new(_: &mut Params) -> Self {
        Self
    }

    fn offers(&self) -> Kinds {
        Kinds::PAIR
    }

    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        let turns = |field| human_turns::parse(record.column(field), record.text(field)?);
        let (chosen, rejected) = (turns("chosen")?, turns("rejected")?);
        let common = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
        let names = [record.column("chosen"), record.column("rejected")];
        let own = [&chosen[common..], &rejected[common..]];
        if own.iter().all(|turns| turns.is_empty()) {
            return Err(Fault::record(format!("`{}` and `{}` are the same", names[0], names[1])));
        }
        if common == 0 {
            return Err(Fault::record(format!(
                "`{}` and `{}` begin differently: they have no prompt in common",
                names[0], names[1]
            )));
        }
        for (name, turns) in names.into_iter().zip(own) {
            match turns {
                [] => return Err(Fault::record(format!("`{name}` is the beginning of the other"))),
                [only] if only.role == "assistant" && only.content.is_empty() => {
                    return Err(Fault::record(format!("`{name}` ends with an empty answer")));
                }
                [first, ..] if first.role != "assistant" => {
                    let why = format!("`{name}` parts from the other at a `Human:` turn");
                    return Err(Fault::record(why));
                }
                _ => {}
            }
        }
        let chat = Chat::from_params(&mut Params::default()).instruction_data();
        let sample = chat.sample(record, Content::messages(chosen[..common].iter().cloned()))?;
        let response = |name, turns: &[Message]| {
            chat.response(name, Content::messages(turns.iter().cloned()), &sample.prompt)
        };
        let (won, lost) = (response(names[0], own[0])?, response(names[1], own[1])?);
        Ok(vec![
            sample
                .response(won, Feedback::Chosen(None.into()))
                .response(lost, Feedback::Rejected(None.into())),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{adapted, fault, messages};
    use super::*;

    #[test]
    fn what_both_have_in_common_is_the_prompt() {
        let samples = adapted::<HhRlhf>("{}", include_str!("../fixtures/hh-rlhf.jsonl"));
        let [first] = &samples[0][..] else { panic!("one pair a record") };
        assert_eq!(first.prompt, messages(&[("user", "How do I boil an egg?")]));
        let answer = |sample: &Sample, i: usize| sample.responses[i].content.clone();
        let good = "Seven minutes in boiling water, then cold water.";
        assert_eq!(answer(first, 0), messages(&[("assistant", good)]));
        assert_eq!(first.responses[0].feedback, Feedback::Chosen(None.into()));
        assert_eq!(answer(first, 1), messages(&[("assistant", "You just boil it.")]));
        assert_eq!(first.responses[1].feedback, Feedback::Rejected(None.into()));
        let second = &samples[1][0];
        let history = [
            ("user", "I can't sleep."),
            ("assistant", "What keeps you awake?"),
            ("user", "Noise from the street."),
        ];
        assert_eq!(second.prompt, messages(&history));
        // The rejected conversation went on by itself.
        let turns = [
            ("assistant", "Move."),
            ("user", "I can't afford that."),
            ("assistant", "Then I don't know."),
        ];
        assert_eq!(answer(second, 1), messages(&turns));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (chosen, rejected, says) in [
            ("A", "A", "`chosen` and `rejected` are the same"),
            ("A", "", "`rejected` ends with an empty answer"),
            ("A\\n\\nHuman: B", "C", "`chosen` ends with a `user` message that nobody answers"),
            (
                "A\\n\\nHuman: B\\n\\nAssistant: C",
                "A\\n\\nHuman: D\\n\\nAssistant: E",
                "`chosen` parts from the other at a `Human:` turn",
            ),
            ("A", "A\\n\\nHuman: B\\n\\nAssistant: C", "`chosen` is the beginning of the other"),
        ] {
            let begin = "\\n\\nHuman: Q\\n\\nAssistant: ";
            let record =
                format!(r#"{{"chosen": "{begin}{chosen}", "rejected": "{begin}{rejected}"}}"#);
            assert_eq!(fault::<HhRlhf>("{}", &record), says);
        }
        let apart = r#"{"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: R\n\nAssistant: B"}"#;
        let says = "`chosen` and `rejected` begin differently: they have no prompt in common";
        assert_eq!(fault::<HhRlhf>("{}", apart), says);
    }
}

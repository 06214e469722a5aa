//! A feedback adapter of a plugin, with its samples checked.

use super::{BUG, fault};
use crate::{Error, Result};
use uft_core::abi::AdapterObject;
use uft_core::{Feedback, Kinds, Sample};

/// A feedback adapter of a plugin.
pub struct Adapter {
    pub name: String,
    object: AdapterObject,
}

impl Adapter {
    pub(super) fn new(name: &str, object: AdapterObject) -> Self {
        Self { name: name.to_owned(), object }
    }

    /// The feedback kinds of its samples.
    pub fn offers(&self) -> Kinds {
        self.object.offers()
    }

    /// The samples of one record, given as a line of JSON.
    ///
    /// # Errors
    /// If the record cannot be understood, or the plugin panicked or gave a sample that cannot be.
    pub fn adapt(&self, record: &str) -> Result<Vec<Sample>> {
        let samples = self.object.adapt(record.into()).into_result();
        let samples = samples.map_err(|f| fault(&self.name, &f))?;
        for sample in &samples {
            check(sample, self.offers()).map_err(|what| {
                Error::plugin(format!("plugin `{}` gave {what}; {BUG}", self.name))
            })?;
        }
        Ok(samples.into_iter().collect())
    }
}

/// Whether a sample keeps what its types say in words.
///
/// # Errors
/// What does not.
fn check(sample: &Sample, offers: Kinds) -> std::result::Result<(), String> {
    if sample.responses.is_empty() {
        return Err("a sample without a response".into());
    }
    for response in &sample.responses {
        let kind = response.feedback.kind();
        if !offers.contains(Kinds::of(kind)) {
            return Err(format!("a {} response, which it does not offer", kind.name()));
        }
        let value = response.feedback.value();
        let fits = match response.feedback {
            Feedback::Score(_) => (0.0..=1.0).contains(&value),
            _ => value.is_finite(),
        };
        if !fits {
            return Err(match response.feedback {
                Feedback::Score(_) => format!("a score of {value}, outside of 0 to 1"),
                _ => format!("a margin of {value}"),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::Content;

    fn sample(feedback: Feedback) -> Sample {
        Sample::new(Content::text("q")).response(Content::text("a"), feedback)
    }

    #[test]
    fn samples_that_cannot_be_are_refused_in_words() {
        let kinds = Kinds::SCORE | Kinds::PAIR;
        let margin = |m: f32| Feedback::Chosen(Some(m).into());
        for (sample, says) in [
            (Sample::new(Content::text("q")), "a sample without a response"),
            (sample(Feedback::Score(1.5)), "a score of 1.5, outside of 0 to 1"),
            (sample(Feedback::Score(f32::NAN)), "a score of NaN, outside of 0 to 1"),
            (sample(margin(f32::INFINITY)), "a margin of inf"),
            (sample(Feedback::Binary(true)), "a binary response, which it does not offer"),
        ] {
            assert_eq!(check(&sample, kinds), Err(says.to_owned()));
        }
        assert_eq!(check(&sample(Feedback::Score(1.0)), kinds), Ok(()));
        assert_eq!(check(&sample(margin(-2.0)), kinds), Ok(()));
    }
}

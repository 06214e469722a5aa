//! SFT: supervised fine-tuning, maximum likelihood of demonstrations.
//!
//! `per = "token"`: `L = -sum over responses of log pi(y|x) / trained tokens of the step`, the
//! token mean of the Hugging Face trainers, here over the whole optimizer step.
//! `per = "response"`: `L = -mean over responses of log pi(y|x)`, the token-summed likelihood that
//! the UFT paper writes (arXiv 2410.21438, eq. 1).
//!
//! It has no reference and no saturation; `uft-sft` has both. Chosen responses of pairs are imitated
//! too: as one of several objectives, it gives a preference loss its anchor.

use uft_core::prelude::*;

struct Sft {
    per_token: bool,
}

impl Objective for Sft {
    const NAME: &'static str = "sft";
    const ABOUT: &'static str =
        "-log pi(y|x), the mean per token or per response (UFT, arXiv 2410.21438, eq. 1)";

    fn new(params: &mut Params) -> Self {
        let per = params.choice("per", "token", &["token", "response"], "what the mean is over");
        Self { per_token: per == "token" }
    }

    fn needs(&self) -> Needs {
        Needs::TOKEN_COUNTS
    }

    fn accepts(&self) -> Kinds {
        Kinds::DEMONSTRATION | Kinds::CHOSEN
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let n = if self.per_token { batch.step.tokens } else { batch.step.segments } as f64;
        for segment in batch.segments() {
            let logp = batch.logp(segment);
            out.loss(-logp / n);
            out.gradient(segment, -1.0 / n);
            out.metric("logps/chosen", logp);
            out.metric_over("nll_loss", -logp, f64::from(segment.tokens));
        }
        Ok(())
    }
}

uft_core::plugin! { objectives: [Sft] }

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::{self, Case};

    fn step() -> Case {
        Case::new().group(&[(Feedback::Demonstration, &[-1.0, -0.5, -0.5], &[0.0; 3])]).group(&[(
            Feedback::Demonstration,
            &[-4.0],
            &[0.0],
        )])
    }

    #[test]
    fn is_a_sound_objective() {
        for params in ["{}", r#"{"per": "response"}"#] {
            check::objective::<Sft>(params).expect_passed();
        }
    }

    #[test]
    fn the_mean_is_over_the_tokens_of_the_step_or_over_its_responses() {
        let seen = step().on::<Sft>("{}").unwrap();
        seen.expect(6.0 / 4.0, &[-0.25; 4]);
        assert_eq!(seen.metric("nll_loss"), Some(1.5));
        assert_eq!(seen.metric("logps/chosen"), Some(-3.0));
        step().on::<Sft>(r#"{"per": "response"}"#).unwrap().expect(6.0 / 2.0, &[-0.5; 4]);
    }

    #[test]
    fn parameters_are_checked() {
        let fault = step().on::<Sft>(r#"{"per": "batch"}"#).unwrap_err();
        let says = "parameter `per` must be \"token\" or \"response\", not \"batch\"";
        assert_eq!(fault.message.as_str(), says);
        let fault = step().on::<Sft>(r#"{"beta": 1}"#).unwrap_err();
        assert_eq!(fault.message.as_str(), "unknown parameter `beta`; known: per");
    }
}

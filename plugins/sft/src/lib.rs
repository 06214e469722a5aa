//! SFT: supervised fine-tuning, maximum likelihood of demonstrations.
//!
//! `per = "token"`: `L = -sum over responses of log pi(y|x) / trained tokens of the step`, the
//! token mean of the Hugging Face trainers, here over the whole optimizer step.
//! `per = "response"`: `L = -mean over responses of log pi(y|x)`, the token-summed likelihood that
//! the UFT paper writes (arXiv 2410.21438, eq. 1).
//!
//! It has no reference and no saturation; `uft-sft` has both. Chosen responses of pairs are not
//! accepted: a row that is to be imitated is a demonstration.

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
        Kinds::DEMONSTRATION
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

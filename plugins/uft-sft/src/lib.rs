//! UFT's fine-tuning part: a demonstration is a response whose reward is 1.
//!
//! `L = mean over responses of D(sigmoid(r), 1)` with the implicit reward
//! `r = beta * (log pi(y|x) - log pi_ref(y|x)) + shift`. `D` is the squared error of the paper
//! (UFT, arXiv 2410.21438, eq. 7), or the cross-entropy `-log sigmoid(r)`, which the paper doesn't
//! report but which keeps learning where the model is badly wrong.
//!
//! At the start the gradient on `log pi(y|x)` is `-beta / 2` (MSE: `-beta / 4`) per response, that
//! of token-mean SFT on an answer of `2 / beta` (`4 / beta`) tokens: learning rate and beta are
//! not independent.

use uft_core::math::Discrepancy;
use uft_core::prelude::*;

struct UftSft {
    beta: f64,
    shift: f64,
    loss: Discrepancy,
}

impl Objective for UftSft {
    const NAME: &'static str = "uft-sft";
    const ABOUT: &'static str =
        "(sigmoid(r) - 1)^2, r = beta*log(pi/pi_ref) + shift (UFT, arXiv 2410.21438, eq. 7)";

    fn new(params: &mut Params) -> Self {
        Self {
            beta: params.number("beta", 0.01, Bound::Positive, "scale of the implicit reward"),
            shift: params.number("shift", 0.0, Bound::Finite, "f(x) + c of the implicit reward"),
            loss: Discrepancy::from_params(params),
        }
    }

    fn needs(&self) -> Needs {
        Needs::REFERENCE
    }

    fn accepts(&self) -> Kinds {
        Kinds::DEMONSTRATION
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let n = batch.step.segments as f64;
        for segment in batch.segments() {
            let reward = self.beta * batch.log_ratio(segment) + self.shift;
            let (loss, slope) = self.loss.at(reward, 1.0);
            out.loss(loss / n);
            out.gradient(segment, slope * self.beta / n);
            out.response_metrics(batch, segment, reward, true);
        }
        Ok(())
    }
}

uft_core::plugin! { objectives: [UftSft] }

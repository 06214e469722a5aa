//! UNA-score: the implicit score meets the explicit one.
//!
//! `L = mean over responses of D(sigmoid(r), s)` with the implicit reward
//! `r = beta * (log pi(y|x) - log pi_ref(y|x)) + shift` and the explicit score `s` in `0..=1`.
//! `D` is the squared error of the paper (UNA, arXiv 2408.15339, eq. 13) or the cross-entropy, which
//! does not flatten where the model is badly wrong.

use uft_core::math::Discrepancy;
use uft_core::prelude::*;

struct UnaScore {
    beta: f64,
    shift: f64,
    loss: Discrepancy,
}

impl Objective for UnaScore {
    const NAME: &'static str = "una-score";
    const ABOUT: &'static str =
        "(sigmoid(r) - score)^2, r = beta*log(pi/pi_ref) + shift (UNA, arXiv 2408.15339, eq. 13)";

    fn new(params: &mut Params) -> Self {
        Self {
            beta: params.number("beta", 0.03, Bound::Positive, "scale of the implicit reward"),
            shift: params.number("shift", 0.0, Bound::Finite, "f(x) + c of the implicit reward"),
            loss: Discrepancy::from_params(params),
        }
    }

    fn needs(&self) -> Needs {
        Needs::REFERENCE
    }

    fn accepts(&self) -> Kinds {
        Kinds::SCORE
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let n = batch.step.segments as f64;
        for segment in batch.segments() {
            let reward = self.beta * batch.log_ratio(segment) + self.shift;
            let score = f64::from(segment.value);
            let (loss, slope) = self.loss.at(reward, score);
            out.loss(loss / n);
            out.gradient(segment, slope * self.beta / n);
            out.response_metrics(batch, segment, reward, score > 0.5);
            out.metric("rewards/score/mse", (math::sigmoid(reward) - score).powi(2));
        }
        Ok(())
    }
}

uft_core::plugin! { objectives: [UnaScore] }

//! UNA-binary: thumbs up and down on the implicit score.
//!
//! `L = mean over responses of w * D(sigmoid(r), label)` with label 1 or 0 and the implicit reward
//! `r = beta * (log pi(y|x) - log pi_ref(y|x)) + shift`. `D` is the squared error (UNA, arXiv
//! 2408.15339, eq. 11) or the cross-entropy (eq. 12). `w` is the weight of the label's class; the
//! mean divides by the number of responses, not by the sum of weights, as KTO's does.

use uft_core::math::Discrepancy;
use uft_core::prelude::*;

struct UnaBinary {
    beta: f64,
    shift: f64,
    loss: Discrepancy,
    desirable_weight: f64,
    undesirable_weight: f64,
}

impl Objective for UnaBinary {
    const NAME: &'static str = "una-binary";
    const ABOUT: &'static str = "(sigmoid(r) - label)^2, r = beta*log(pi/pi_ref) + shift (UNA, arXiv 2408.15339, eq. 11, 12)";

    fn new(params: &mut Params) -> Self {
        let weight = Bound::NotNegative;
        Self {
            beta: params.number("beta", 0.01, Bound::Positive, "scale of the implicit reward"),
            shift: params.number("shift", 0.0, Bound::Finite, "f(x) + c of the implicit reward"),
            loss: Discrepancy::from_params(params),
            desirable_weight: params.number("desirable_weight", 1.0, weight, "factor of thumbs up"),
            undesirable_weight: params.number(
                "undesirable_weight",
                1.0,
                weight,
                "factor of thumbs down",
            ),
        }
    }

    fn needs(&self) -> Needs {
        Needs::REFERENCE
    }

    fn accepts(&self) -> Kinds {
        Kinds::BINARY
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let n = batch.step.segments as f64;
        for segment in batch.segments() {
            let desirable = segment.value > 0.5;
            let weight = if desirable { self.desirable_weight } else { self.undesirable_weight };
            let reward = self.beta * batch.log_ratio(segment) + self.shift;
            let (loss, slope) = self.loss.at(reward, f64::from(segment.value));
            out.loss(weight * loss / n);
            out.gradient(segment, weight * slope * self.beta / n);
            out.response_metrics(batch, segment, reward, desirable);
        }
        Ok(())
    }
}

uft_core::plugin! { objectives: [UnaBinary] }

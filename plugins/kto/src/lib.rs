//! KTO: Kahneman-Tversky optimisation on thumbs up and down (arXiv 2402.01306, eq. 7).
//!
//! `L = mean over responses of w * (1 - sigmoid(v))`, where `v = beta * (d - z0) + shift` for
//! thumbs up and its negative for thumbs down, `d = log pi(y|x) - log pi_ref(y|x)`, and `w` is the
//! weight of the label's class.
//!
//! `z0 = max(0, mean of d over prompts with another prompt's completion)` estimates how far the
//! policy is from the reference. It is in nats, so beta multiplies it; nothing is back-propagated
//! through it. TRL takes it per micro-batch; here it is the mean over the whole optimizer step, so
//! that the loss does not depend on how a step is split.

use uft_core::math::sigmoid;
use uft_core::prelude::*;

struct Kto {
    beta: f64,
    shift: f64,
    desirable_weight: f64,
    undesirable_weight: f64,
}

impl Objective for Kto {
    const NAME: &'static str = "kto";
    const ABOUT: &'static str = "1 - sigmoid(+-beta*(d - z0)), d = log(pi/pi_ref), z0 the step's KL (KTO, arXiv 2402.01306, eq. 7)";

    fn new(params: &mut Params) -> Self {
        let weight = Bound::NotNegative;
        Self {
            beta: params.number("beta", 0.03, Bound::Positive, "scale of the implicit reward"),
            shift: params.number("shift", 0.0, Bound::Finite, "f(x) + c of the implicit reward"),
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
        Needs::REFERENCE | Needs::MISMATCHED
    }

    fn accepts(&self) -> Kinds {
        Kinds::BINARY
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let n = batch.step.segments as f64;
        let mismatched = batch.step.mismatched.as_slice();
        if mismatched.is_empty() {
            return Err(Fault::evaluation("z0 needs at least two prompts in every optimizer step"));
        }
        let z0 = (mismatched.iter().sum::<f64>() / mismatched.len() as f64).max(0.0);
        for segment in batch.segments() {
            let desirable = segment.value > 0.5;
            let (sign, weight) = match desirable {
                true => (1.0, self.desirable_weight),
                false => (-1.0, self.undesirable_weight),
            };
            let reward = self.beta * batch.log_ratio(segment) + self.shift;
            let v = sign * (reward - self.beta * z0);
            // sigmoid(-v) = 1 - sigmoid(v), without the cancellation.
            out.loss(weight * sigmoid(-v) / n);
            out.gradient(segment, -sign * weight * self.beta * sigmoid(v) * sigmoid(-v) / n);
            out.response_metrics(batch, segment, reward, desirable);
            out.metric("kl", z0);
        }
        Ok(())
    }
}

uft_core::plugin! { objectives: [Kto] }

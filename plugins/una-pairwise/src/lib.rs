//! UNA-pairwise: preference pairs on the implicit reward, which is DPO.
//!
//! `L = mean over pairs of -(1-e) log sigmoid(z) - e log sigmoid(-z)` with
//! `z = r(chosen) - r(rejected) - margin_scale * margin` and the implicit reward
//! `r = beta * (log pi(y|x) - log pi_ref(y|x))`. An offset `f(x) + c` of the reward would cancel.
//!
//! - `e = label_smoothing = 0`: DPO (arXiv 2305.18290, eq. 7) = UNA eq. 10 under the log-sigmoid
//!   (arXiv 2408.15339); above 0: cDPO, labels that are wrong with probability `e`.
//! - `margin_scale > 0`: the chosen response's margin becomes an offset that the rewards have to
//!   differ by (ODPO, arXiv 2402.10571). A pair without a margin has margin 0.
//!
//! A response that is in several pairs of its group collects the gradients of all of them.

use uft_core::math::{sigmoid, softplus};
use uft_core::prelude::*;

struct UnaPairwise {
    beta: f64,
    label_smoothing: f64,
    margin_scale: f64,
}

impl Objective for UnaPairwise {
    const NAME: &'static str = "una-pairwise";
    const ABOUT: &'static str =
        "-log sigmoid(beta*(d_w - d_l)), d = log(pi/pi_ref) (DPO, arXiv 2305.18290, eq. 7)";

    fn new(params: &mut Params) -> Self {
        let probability = Bound::Within(0.0, 0.5);
        Self {
            beta: params.number("beta", 0.03, Bound::Positive, "scale of the implicit reward"),
            label_smoothing: params.number(
                "label_smoothing",
                0.0,
                probability,
                "probability that a pair is the wrong way round (cDPO)",
            ),
            margin_scale: params.number(
                "margin_scale",
                0.0,
                Bound::NotNegative,
                "reward difference asked for per unit of the pair's margin (ODPO)",
            ),
        }
    }

    fn needs(&self) -> Needs {
        Needs::REFERENCE | Needs::PAIRS
    }

    fn accepts(&self) -> Kinds {
        Kinds::PAIR
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let (n, e) = (batch.step.pairs as f64, self.label_smoothing);
        for segment in batch.segments() {
            out.gradient(segment, 0.0);
        }
        for (chosen, rejected) in batch.pairs() {
            let [won, lost] = [chosen, rejected].map(|s| self.beta * batch.log_ratio(s));
            let z = won - lost - self.margin_scale * f64::from(chosen.value);
            out.loss(((1.0 - e) * softplus(-z) + e * softplus(z)) / n);
            let slope = (e * sigmoid(z) - (1.0 - e) * sigmoid(-z)) * self.beta / n;
            out.add_gradient(chosen, slope);
            out.add_gradient(rejected, -slope);
            out.pair_metrics(batch, (chosen, won), (rejected, lost));
        }
        Ok(())
    }
}

uft_core::plugin! { objectives: [UnaPairwise] }

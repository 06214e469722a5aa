//! Objectives that are a mean over preference pairs of a loss of the pair alone.
//!
//! | objective | module |
//! |---|---|
//! | `robust-dpo`, `hinge`, `exo` | [`difference`]: of the difference of the implicit rewards |
//! | `ipo`, `ln-dpo` | [`per_token`]: of log-ratios per token |
//! | `dpop`, `apo-down` | [`anchored`]: of the chosen response's reward, too |
//! | `rpo` | [`explicit`]: of the rewards that the data give |
//! | `simpo`, `cpo`, `orpo` | [`reference_free`]: of the policy alone |
//!
//! Notation: for a response of `n` tokens `S = log pi(y|x)`, `a = S / n`, `d = log pi(y|x) - log
//! pi_ref(y|x)`, in nats; `w` is the chosen and `l` the rejected response. A response that is in
//! several pairs of its group collects the gradients of all of them.
//!
//! DPO itself, with its labels smoothed (cDPO) or with margins (ODPO), is `una-pairwise`.

mod anchored;
mod difference;
mod explicit;
mod per_token;
mod reference_free;

use anchored::{ApoDown, Dpop};
use difference::{Exo, Hinge, RobustDpo};
use explicit::Rpo;
use per_token::{Ipo, LnDpo};
use reference_free::{Cpo, Orpo, SimPo};
use uft_core::prelude::*;

/// The loss of one pair.
trait PairLoss: Send + Sync + Sized + 'static {
    const NAME: &'static str;
    const ABOUT: &'static str;
    /// Beside pairs.
    const NEEDS: Needs;

    fn new(params: &mut Params) -> Self;

    /// What the metrics call a response's reward.
    fn reward(&self, response: &Summed) -> Dual64;

    fn loss(&self, chosen: &Summed, rejected: &Summed) -> Dual64;
}

/// A [`PairLoss`] as an objective.
struct Pairwise<L>(L);

impl<L: PairLoss> Objective for Pairwise<L> {
    const NAME: &'static str = L::NAME;
    const ABOUT: &'static str = L::ABOUT;

    fn new(params: &mut Params) -> Self {
        Self(L::new(params))
    }

    fn needs(&self) -> Needs {
        Needs::PAIRS | L::NEEDS
    }

    fn accepts(&self) -> Kinds {
        Kinds::PAIR
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let Self(pair) = self;
        out.mean_over_pairs(
            batch,
            |response| pair.reward(response),
            |chosen, rejected| pair.loss(chosen, rejected),
        );
        Ok(())
    }
}

/// Reads `beta`, the factor of a log-ratio or log-prob.
fn beta(params: &mut Params, default: f64) -> f64 {
    params.number("beta", default, Bound::Positive, "scale of the implicit reward")
}

uft_core::plugin! {
    objectives: [
        Pairwise<RobustDpo>,
        Pairwise<Hinge>,
        Pairwise<Exo>,
        Pairwise<Ipo>,
        Pairwise<LnDpo>,
        Pairwise<Dpop>,
        Pairwise<ApoDown>,
        Pairwise<Rpo>,
        Pairwise<SimPo>,
        Pairwise<Cpo>,
        Pairwise<Orpo>,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::{self, Case, Evaluated};

    /// A pair: log-ratio 2 on two tokens, preferred by 0.75, and log-ratio -1 on one.
    pub fn pair() -> Case {
        Case::new().group(&[
            (Feedback::Chosen(Some(0.75).into()), &[-1.0, -0.5], &[-2.0, -1.5]),
            (Feedback::Rejected(Some(0.75).into()), &[-2.0], &[-1.0]),
        ])
    }

    /// A pair of responses of one token with these log-ratios.
    pub fn ratios(chosen: f32, rejected: f32) -> Case {
        Case::new().group(&[
            (Feedback::Chosen(None.into()), &[chosen - 9.0], &[-9.0]),
            (Feedback::Rejected(None.into()), &[rejected - 9.0], &[-9.0]),
        ])
    }

    pub fn on<L: PairLoss>(case: &Case, params: &str) -> Evaluated {
        case.on::<Pairwise<L>>(params).unwrap()
    }

    pub fn check<L: PairLoss>(variants: &[&str]) {
        for params in variants {
            check::objective::<Pairwise<L>>(params).expect_passed();
        }
    }

    #[test]
    fn a_response_in_two_pairs_collects_both_gradients() {
        let step = Case::new().group(&[
            (Feedback::Chosen(None.into()), &[-1.0], &[-3.0]),
            (Feedback::Rejected(None.into()), &[-2.0], &[-1.0]),
            (Feedback::Rejected(None.into()), &[-1.0], &[-5.0]),
        ]);
        // The hinge reaches 1 in the first pair and not in the second.
        let seen = on::<Hinge>(&step, r#"{"beta": 0.5}"#);
        seen.expect((0.0 + 2.0) / 2.0, &[-0.25, 0.0, 0.25]);
        assert_eq!(seen.metric("rewards/accuracies"), Some(0.5));
    }

    #[test]
    fn parameters_are_checked() {
        let fault = pair().on::<Pairwise<RobustDpo>>(r#"{"label_smoothing": 0.5}"#).unwrap_err();
        let says = "parameter `label_smoothing` must be a number from 0 to 0.499, not 0.5";
        assert_eq!(fault.message.as_str(), says);
        let fault = pair().on::<Pairwise<SimPo>>(r#"{"gama": 1}"#).unwrap_err();
        assert_eq!(fault.message.as_str(), "unknown parameter `gama`; did you mean `gamma`?");
    }
}

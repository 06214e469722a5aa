//! Losses that look at the chosen response's reward by itself, not only at its distance from the
//! rejected one's.

use super::{PairLoss, beta};
use uft_core::math::{relu, sigmoid, softplus};
use uft_core::prelude::*;

/// DPO-Positive: `-log sigmoid(beta * (d_w - d_l - lambda * max(0, -d_w)))`, which costs a chosen response
/// that becomes less likely than under the reference (Smaug, arXiv 2402.13228, eq. 3; its defaults).
/// The penalty stands inside of the sigmoid and times beta, as in the equation.
pub struct Dpop {
    beta: f64,
    lambda: f64,
}

impl PairLoss for Dpop {
    const NAME: &'static str = "dpop";
    const ABOUT: &'static str = "-log sigmoid(beta*(d_w - d_l - lambda*max(0, -d_w))) \
        (DPO-Positive, arXiv 2402.13228, eq. 3)";
    const NEEDS: Needs = Needs::REFERENCE;

    fn new(params: &mut Params) -> Self {
        let about = "cost of a chosen response that is less likely than under the reference";
        Self {
            beta: beta(params, 0.3),
            lambda: params.number("lambda", 50.0, Bound::NotNegative, about),
        }
    }

    fn reward(&self, response: &Summed) -> Dual64 {
        response.log_ratio() * self.beta
    }

    fn loss(&self, chosen: &Summed, rejected: &Summed) -> Dual64 {
        let (won, lost) = (chosen.log_ratio(), rejected.log_ratio());
        softplus((lost - won + relu(-won) * self.lambda) * self.beta)
    }
}

/// APO-down: `sigmoid(r_w) + 1 - sigmoid(r_w - r_l)` with `r = beta * d`: both responses become less
/// likely, the rejected one more so; for chosen responses that are worse than what the model would
/// say (arXiv 2408.06266, eq. 8; beta: section 5.2).
pub struct ApoDown {
    beta: f64,
}

impl PairLoss for ApoDown {
    const NAME: &'static str = "apo-down";
    const ABOUT: &'static str = "sigmoid(r_w) + 1 - sigmoid(r_w - r_l), r = beta*d \
        (APO-down, arXiv 2408.06266, eq. 8)";
    const NEEDS: Needs = Needs::REFERENCE;

    fn new(params: &mut Params) -> Self {
        Self { beta: beta(params, 0.1) }
    }

    fn reward(&self, response: &Summed) -> Dual64 {
        response.log_ratio() * self.beta
    }

    fn loss(&self, chosen: &Summed, rejected: &Summed) -> Dual64 {
        let (won, lost) = (self.reward(chosen), self.reward(rejected));
        sigmoid(won) + sigmoid(lost - won)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, on, ratios};
    use super::*;

    #[test]
    fn are_sound_objectives() {
        check::<Dpop>(&["{}", r#"{"beta": 0.1, "lambda": 0.5}"#]);
        check::<ApoDown>(&["{}", r#"{"beta": 2}"#]);
    }

    #[test]
    fn dpop_is_dpo_while_the_chosen_response_is_likelier_than_under_the_reference() {
        let params = r#"{"beta": 0.5, "lambda": 4}"#;
        let slope = -0.5 * sigmoid(-2.0);
        on::<Dpop>(&ratios(3.0, -1.0), params).expect(softplus(-2.0), &[slope, -slope]);
        // d_w = -1 costs 4: z = 0.5 * (-1 + 3 - 4).
        let slope = -0.5 * sigmoid(1.0);
        on::<Dpop>(&ratios(-1.0, -3.0), params).expect(softplus(1.0), &[5.0 * slope, -slope]);
    }

    #[test]
    fn apo_down_pushes_both_down() {
        let slope = |x: f64| 0.1 * sigmoid(x) * sigmoid(-x);
        let seen = on::<ApoDown>(&ratios(2.0, -1.0), "{}");
        let expected = sigmoid(0.2) + 1.0 - sigmoid(0.3);
        seen.expect(expected, &[slope(0.2) - slope(0.3), slope(0.3)]);
        assert!(seen.dlogp[1] > seen.dlogp[0] && seen.dlogp[0] > 0.0, "a descent lowers both");
    }
}

//! Losses of how much better the chosen response is by explicit rewards: the pair's margin.

use super::{PairLoss, beta};
use uft_core::math::{log_sigmoid, sigmoid};
use uft_core::prelude::*;

/// How far the implicit difference `z` is from the explicit one, `m`.
#[derive(Clone, Copy)]
enum Distance {
    /// `KL(sigmoid(m) || sigmoid(z))`.
    Backward,
    /// `KL(sigmoid(z) || sigmoid(m))`.
    Forward,
    /// `(z - m)^2`.
    Squared,
}

/// Reward-aware preference optimisation: the difference of the implicit rewards, `z = beta * (d_w - d_l)`,
/// meets that of the explicit ones, `m = reward_scale * margin` (Nemotron-4, arXiv 2406.11704, section 3.3;
/// the three distances: arXiv 2502.00203). The names of the divergences and the defaults are those of
/// the authors' code. With a margin that goes to infinity the backward one is DPO. A pair without a
/// margin counts as one of equally good responses, so the data have to give margins.
pub struct Rpo {
    beta: f64,
    reward_scale: f64,
    distance: Distance,
}

impl PairLoss for Rpo {
    const NAME: &'static str = "rpo";
    const ABOUT: &'static str = "KL(sigmoid(m) || sigmoid(z)), z = beta*(d_w - d_l), \
        m = reward_scale*margin (RPO, arXiv 2406.11704, section 3.3; arXiv 2502.00203)";
    const NEEDS: Needs = Needs::REFERENCE;

    fn new(params: &mut Params) -> Self {
        let about = "eta: factor of the pair's margin, which is 0 where the data give none";
        let words = ["backward", "forward", "squared"];
        Self {
            beta: beta(params, 0.2),
            reward_scale: params.number("reward_scale", 1.0, Bound::Positive, about),
            distance: match params.choice(
                "distance",
                "backward",
                &words,
                "KL, its reverse, or \
                 (z - m)^2",
            ) {
                "forward" => Distance::Forward,
                "squared" => Distance::Squared,
                _ => Distance::Backward,
            },
        }
    }

    fn reward(&self, response: &Summed) -> Dual64 {
        response.log_ratio() * self.beta
    }

    fn loss(&self, chosen: &Summed, rejected: &Summed) -> Dual64 {
        let z = self.reward(chosen) - self.reward(rejected);
        let m = Dual64::from(self.reward_scale * chosen.value());
        match self.distance {
            Distance::Backward => divergence(m, z),
            Distance::Forward => divergence(z, m),
            Distance::Squared => (z - m).powi(2),
        }
    }
}

/// `KL(sigmoid(a) || sigmoid(b))` of two Bernoulli distributions.
fn divergence(a: Dual64, b: Dual64) -> Dual64 {
    sigmoid(a) * (log_sigmoid(a) - log_sigmoid(b))
        + sigmoid(-a) * (log_sigmoid(-a) - log_sigmoid(-b))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, on, pair};
    use super::*;

    #[test]
    fn is_a_sound_objective() {
        check::<Rpo>(&[
            "{}",
            r#"{"beta": 2, "reward_scale": 5}"#,
            r#"{"distance": "forward"}"#,
            r#"{"distance": "forward", "beta": 2, "reward_scale": 5}"#,
            r#"{"distance": "squared"}"#,
        ]);
    }

    #[test]
    fn it_rests_where_both_differences_are_the_same() {
        // z = 0.25 * 3 and the margin is 0.75.
        for distance in ["backward", "forward", "squared"] {
            let params = format!(r#"{{"beta": 0.25, "distance": "{distance}"}}"#);
            on::<Rpo>(&pair(), &params).expect(0.0, &[0.0, 0.0, 0.0]);
        }
    }

    #[test]
    fn with_a_large_margin_it_is_dpo() {
        let seen = on::<Rpo>(&pair(), r#"{"beta": 0.1, "reward_scale": 100}"#);
        let slope = -0.1 * sigmoid(-0.3);
        seen.expect(-log_sigmoid(0.3), &[slope, slope, -slope]);
    }

    #[test]
    fn by_hand() {
        // z = 0.6, m = 1.5
        let seen = on::<Rpo>(&pair(), r#"{"reward_scale": 2, "distance": "squared"}"#);
        let slope = 2.0 * (0.6 - 1.5) * 0.2;
        seen.expect(0.9 * 0.9, &[slope, slope, -slope]);
        let slope = 0.2 * (sigmoid(0.6) - sigmoid(1.5));
        let seen = on::<Rpo>(&pair(), r#"{"reward_scale": 2}"#);
        seen.expect(divergence(1.5.into(), 0.6.into()).re, &[slope, slope, -slope]);
    }
}

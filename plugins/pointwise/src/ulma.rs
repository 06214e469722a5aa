//! ULMA: demonstrations and point-wise preferences in one loss (arXiv 2312.02554, section 4).
//!
//! With `S = log pi(y|x)`, `d = S - log pi_ref(y|x)` and `r = beta * d + shift`, the mean over responses of
//!
//! | feedback | loss |
//! |---|---|
//! | demonstration, thumbs up | `-S`; with `positives = "reward"`: `-log sigmoid(r)`, point-wise DPO |
//! | thumbs down | `-log sigmoid(-r)` |
//! | score `s` | `(s - r)^2`, without a sigmoid |
//!
//! `shift` is the authors' constant for `beta * log Z(x)`. The paper writes log-probs of whole responses;
//! the authors' code has their mean per token, which is `per = "token"`. Each response counts once,
//! where that code adds the mean over positives to the mean over the others.

use uft_core::math::softplus;
use uft_core::prelude::*;

pub struct Ulma {
    beta: f64,
    shift: f64,
    by_reward: bool,
    per_token: bool,
}

impl Objective for Ulma {
    const NAME: &'static str = "ulma";
    const ABOUT: &'static str = "-log pi for positives, -log sigmoid(-r) for negatives, \
        (s - r)^2 for scores, r = beta*d + shift (ULMA, arXiv 2312.02554, section 4)";

    fn new(params: &mut Params) -> Self {
        let positives = "demonstrations and thumbs up: by their likelihood or their reward";
        let per = "log-probs are sums over the response or means over its tokens";
        Self {
            beta: params.number("beta", 0.1, Bound::Positive, "scale of the implicit reward"),
            shift: params.number("shift", 0.0, Bound::Finite, "beta * log Z(x), a constant"),
            by_reward: params.choice(
                "positives",
                "likelihood",
                &["likelihood", "reward"],
                positives,
            ) == "reward",
            per_token: params.choice("per", "response", &["response", "token"], per) == "token",
        }
    }

    fn needs(&self) -> Needs {
        Needs::REFERENCE | Needs::TOKEN_COUNTS
    }

    fn accepts(&self) -> Kinds {
        Kinds::DEMONSTRATION | Kinds::BINARY | Kinds::SCORE
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let n = |response: &Summed| if self.per_token { response.tokens() } else { 1.0 };
        let reward = |y: &Summed| y.log_ratio() * (self.beta / n(y)) + self.shift;
        out.mean_over_responses(batch, reward, |y| match (y.kind(), y.is_desirable()) {
            (Kind::Score, _) => (reward(y) - y.value()).powi(2),
            (_, false) => softplus(reward(y)),
            (_, true) if self.by_reward => softplus(-reward(y)),
            (_, true) => -y.logp / n(y),
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::{self, Case};
    use uft_core::math::{Discrepancy, sigmoid};

    /// Log-ratios of 2 on two tokens, and of -1.
    fn step(first: Feedback, second: Feedback) -> Case {
        Case::new().group(&[(first, &[-1.0, -0.5], &[-2.0, -1.5])]).group(&[(
            second,
            &[-2.0],
            &[-1.0],
        )])
    }

    #[test]
    fn is_a_sound_objective() {
        for params in [
            "{}",
            r#"{"beta": 2, "positives": "reward", "shift": -0.5}"#,
            r#"{"beta": 2, "per": "token"}"#,
        ] {
            check::objective::<Ulma>(params).expect_passed();
        }
    }

    #[test]
    fn positives_are_imitated_and_negatives_avoided() {
        let demonstrated = step(Feedback::Demonstration, Feedback::Binary(false));
        let seen = demonstrated.on::<Ulma>("{}").unwrap();
        let slope = 0.1 * sigmoid(-0.1) / 2.0;
        seen.expect((1.5 + softplus(-0.1)) / 2.0, &[-0.5, -0.5, slope]);
        let liked = step(Feedback::Binary(true), Feedback::Binary(false));
        assert_eq!(liked.on::<Ulma>("{}").unwrap().dlogp, seen.dlogp);
        let seen = demonstrated.on::<Ulma>(r#"{"per": "token"}"#).unwrap();
        seen.expect((0.75 + softplus(-0.1)) / 2.0, &[-0.25, -0.25, slope]);
    }

    #[test]
    fn by_the_reward_of_positives_it_is_the_cross_entropy_of_una_binary() {
        let liked = step(Feedback::Binary(true), Feedback::Binary(false));
        let seen = liked.on::<Ulma>(r#"{"positives": "reward", "shift": 0.25}"#).unwrap();
        let (up, down) = (Discrepancy::Bce.at(0.45, 1.0), Discrepancy::Bce.at(0.15, 0.0));
        let slopes = [0.1 * up.1 / 2.0, 0.1 * up.1 / 2.0, 0.1 * down.1 / 2.0];
        seen.expect((up.0 + down.0) / 2.0, &slopes);
    }

    #[test]
    fn a_score_is_the_reward_to_reach() {
        let scored = step(Feedback::Score(0.25), Feedback::Score(1.0));
        let seen = scored.on::<Ulma>(r#"{"beta": 0.125}"#).unwrap();
        seen.expect(1.125f64.powi(2) / 2.0, &[0.0, 0.0, -0.125 * 1.125]);
    }
}

//! Losses that hold every response to its own anchor, summed over the responses to a prompt: on a
//! pair the sum of two, as in TRL.

use super::beta;
use uft_core::math::sigmoid;
use uft_core::prelude::*;

/// SPPO: `(d - (P - 1/2) / beta)^2` with `P` the probability that the response beats the policy's own
/// (arXiv 2405.00675, eq. 4.7; its `eta` is `1 / beta`, default: the paper's 1000). `P` is the score, or 1
/// and 0 for chosen and rejected responses (SPPO-hard).
pub struct Sppo {
    beta: f64,
}

impl Objective for Sppo {
    const NAME: &'static str = "sppo";
    const ABOUT: &'static str = "sum of (d - (P - 1/2)/beta)^2, P the score or 1 and 0 \
        (SPPO, arXiv 2405.00675, eq. 4.7)";

    fn new(params: &mut Params) -> Self {
        let about = "1 / eta: a sure win is to be 1 / (2 beta) nats likelier than by the reference";
        Self { beta: params.number("beta", 1e-3, Bound::Positive, about) }
    }

    fn needs(&self) -> Needs {
        Needs::REFERENCE
    }

    fn accepts(&self) -> Kinds {
        Kinds::SCORE | Kinds::PAIR
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let wins = |response: &Summed| match response.kind() {
            Kind::Score => response.value(),
            _ => f64::from(response.is_desirable()),
        };
        let reward = |response: &Summed| response.log_ratio() * self.beta;
        out.mean_over_groups(batch, reward, |responses| {
            let apart = |y: &Summed| y.log_ratio() - (wins(y) - 0.5) / self.beta;
            responses.iter().map(|y| apart(y).powi(2)).sum()
        });
        Ok(())
    }
}

/// APO-zero: `1 - sigmoid(r)` for chosen responses and thumbs up, `sigmoid(r)` for rejected ones and
/// thumbs down (arXiv 2408.06266, eq. 7; beta: section 5.2): for chosen responses that are better than
/// what the model would say.
pub struct ApoZero {
    beta: f64,
}

impl Objective for ApoZero {
    const NAME: &'static str = "apo-zero";
    const ABOUT: &'static str = "sum of 1 - sigmoid(r_w) and sigmoid(r_l), r = beta*d \
        (APO-zero, arXiv 2408.06266, eq. 7)";

    fn new(params: &mut Params) -> Self {
        Self { beta: beta(params, 0.1) }
    }

    fn needs(&self) -> Needs {
        Needs::REFERENCE
    }

    fn accepts(&self) -> Kinds {
        Kinds::PAIR | Kinds::BINARY
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let reward = |response: &Summed| response.log_ratio() * self.beta;
        out.mean_over_groups(batch, reward, |responses| {
            let good = |y: &Summed| if y.is_desirable() { -reward(y) } else { reward(y) };
            responses.iter().map(|y| sigmoid(good(y))).sum()
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{group, on, pair};
    use super::*;
    use uft_core::check;

    #[test]
    fn are_sound_objectives() {
        for params in ["{}", r#"{"beta": 2}"#] {
            check::objective::<Sppo>(params).expect_passed();
            check::objective::<ApoZero>(params).expect_passed();
        }
    }

    #[test]
    fn sppo_is_linear_in_the_log_ratio() {
        // Anchors at 1 and -1.
        let seen = on::<Sppo>(&pair(3.0, -0.5), r#"{"beta": 0.5}"#);
        seen.expect(4.0 + 0.25, &[2.0 * 2.0, 2.0 * 0.5]);
        let scored = group(&[(Feedback::Score(0.75), 0.5), (Feedback::Score(0.5), 2.0)]);
        on::<Sppo>(&scored, r#"{"beta": 0.5}"#).expect(4.0, &[0.0, 4.0]);
    }

    #[test]
    fn apo_zero_is_how_far_the_implicit_score_is_from_the_label() {
        let (won, lost) = (sigmoid(0.2), sigmoid(-0.1));
        let slope = |p: f64| 0.1 * p * (1.0 - p);
        on::<ApoZero>(&pair(2.0, -1.0), "{}")
            .expect((won - 1.0).abs() + lost, &[-slope(won), slope(lost)]);
        let thumb = group(&[(Feedback::Binary(true), 2.0)]);
        on::<ApoZero>(&thumb, "{}").expect(1.0 - won, &[-slope(won)]);
    }

    #[test]
    fn at_step_0_apo_zero_is_one_half_a_response() {
        let slope = 0.25 * 0.1;
        on::<ApoZero>(&pair(0.0, 0.0), "{}").expect(1.0, &[-slope, slope]);
    }
}

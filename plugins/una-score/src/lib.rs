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

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::{self, Case};

    /// Log-ratios of 1 and -3, scores of 0.75 and 0.25, for one prompt.
    fn step() -> Case {
        Case::new().group(&[
            (Feedback::Score(0.75), &[-1.0, -0.5], &[-1.5, -1.0]),
            (Feedback::Score(0.25), &[-4.0], &[-1.0]),
        ])
    }

    #[test]
    fn is_a_sound_objective() {
        for params in [
            "{}",
            r#"{"loss": "bce"}"#,
            r#"{"beta": 2, "shift": -0.5}"#,
            r#"{"beta": 2, "loss": "bce", "shift": 3}"#,
        ] {
            check::objective::<UnaScore>(params).expect_passed();
        }
    }

    #[test]
    fn by_hand() {
        let mse = step().on::<UnaScore>(r#"{"beta": 0.1}"#).unwrap();
        mse.expect(0.040727398, &[-0.00561147992, -0.00561147992, 0.00429164859]);
        assert!((mse.metric("rewards/score/mse").unwrap() - mse.loss).abs() < 1e-15);
        assert_eq!(mse.metric("rewards/accuracies"), Some(1.0));
        let bce = step().on::<UnaScore>(r#"{"beta": 0.1, "loss": "bce"}"#).unwrap();
        bce.expect(0.649375952, &[-0.0112510406, -0.0112510406, 0.00877787416]);
        let shifted = step().on::<UnaScore>(r#"{"beta": 0.1, "shift": 0.5}"#).unwrap();
        assert!((shifted.loss - 0.050394016187).abs() < 1e-9);
    }

    #[test]
    fn at_step_0_the_implicit_score_is_a_half() {
        for score in [0.0, 0.25, 1.0] {
            let start = Case::new().group(&[(Feedback::Score(score), &[-2.0], &[-2.0])]);
            let apart = 0.5 - f64::from(score);
            start.on::<UnaScore>("{}").unwrap().expect(apart * apart, &[0.5 * apart * 0.03]);
        }
    }

    #[test]
    fn it_is_at_rest_where_the_log_ratio_is_the_logit_of_the_score_over_beta() {
        let ratio = (0.75f32 / 0.25).ln() / 0.5;
        let rest = Case::new().group(&[(Feedback::Score(0.75), &[ratio - 9.0], &[-9.0])]);
        for loss in ["mse", "bce"] {
            let seen = rest.on::<UnaScore>(&format!(r#"{{"beta": 0.5, "loss": "{loss}"}}"#));
            assert!(seen.unwrap().dlogp[0].abs() < 1e-6, "{loss}");
        }
    }

    #[test]
    fn parameters_are_checked() {
        let fault = step().on::<UnaScore>(r#"{"loss": "mae"}"#).unwrap_err();
        let says = "parameter `loss` must be \"mse\" or \"bce\", not \"mae\"";
        assert_eq!(fault.message.as_str(), says);
    }
}

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
    const ABOUT: &'static str = "(sigmoid(r) - label)^2, r = beta*log(pi/pi_ref) + shift \
        (UNA, arXiv 2408.15339, eq. 11 and 12)";

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

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::{self, Case};

    /// Thumbs up at a log-ratio of 2, thumbs down at 1.
    fn step() -> Case {
        Case::new().group(&[(Feedback::Binary(true), &[-1.0, -0.5], &[-2.0, -1.5])]).group(&[(
            Feedback::Binary(false),
            &[-1.0],
            &[-2.0],
        )])
    }

    #[test]
    fn is_a_sound_objective() {
        for params in [
            "{}",
            r#"{"loss": "bce"}"#,
            r#"{"beta": 2, "shift": -0.5, "undesirable_weight": 1.33}"#,
            r#"{"beta": 2, "loss": "bce", "shift": 3, "desirable_weight": 0}"#,
        ] {
            check::objective::<UnaBinary>(params).expect_passed();
        }
    }

    #[test]
    fn by_hand() {
        let params = r#"{"beta": 0.1, "undesirable_weight": 3}"#;
        let mse = step().on::<UnaBinary>(params).unwrap();
        mse.expect(0.514729436, &[-0.0111423546, -0.0111423546, 0.0392751693]);
        assert_eq!(mse.metric("rewards/binary/accuracy"), Some(0.5));
        assert_eq!(mse.metric("rewards/chosen"), Some(0.2));
        assert_eq!(mse.metric("rewards/rejected"), Some(0.1));
        assert_eq!(mse.metric("logps/rejected"), Some(-1.0));
        let params = r#"{"beta": 0.1, "undesirable_weight": 3, "loss": "bce"}"#;
        assert!((step().on::<UnaBinary>(params).unwrap().loss - 1.415664424801).abs() < 1e-9);
    }

    #[test]
    fn at_step_0_the_loss_is_a_quarter_or_log_2() {
        for label in [true, false] {
            let start = Case::new().group(&[(Feedback::Binary(label), &[-1.0], &[-1.0])]);
            let sign = if label { -1.0 } else { 1.0 };
            start.on::<UnaBinary>("{}").unwrap().expect(0.25, &[sign * 0.25 * 0.01]);
            let bce = start.on::<UnaBinary>(r#"{"loss": "bce"}"#).unwrap();
            bce.expect(std::f64::consts::LN_2, &[sign * 0.5 * 0.01]);
        }
    }

    #[test]
    fn cross_entropy_is_dpo_against_a_response_of_log_ratio_0() {
        let up = Case::new().group(&[(Feedback::Binary(true), &[-1.0], &[-4.0])]);
        let seen = up.on::<UnaBinary>(r#"{"beta": 0.3, "loss": "bce"}"#).unwrap();
        seen.expect(-math::log_sigmoid(0.3 * 3.0), &[-0.3 * math::sigmoid(-0.3 * 3.0)]);
    }

    #[test]
    fn parameters_are_checked() {
        let fault = step().on::<UnaBinary>(r#"{"desirable_weight": -1}"#).unwrap_err();
        let says = "parameter `desirable_weight` must be a number that is not negative, not -1";
        assert_eq!(fault.message.as_str(), says);
    }
}

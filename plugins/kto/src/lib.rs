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
    const ABOUT: &'static str = "1 - sigmoid(+-beta*(d - z0)), d = log(pi/pi_ref), z0 \
        the step's KL (KTO, arXiv 2402.01306, eq. 7)";

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

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::{self, Case};

    /// Thumbs up at a log-ratio of 2, thumbs down at -1; the policy's KL is estimated as 0.5.
    fn step() -> Case {
        Case::new()
            .group(&[(Feedback::Binary(true), &[-1.0, -0.5], &[-2.0, -1.5])])
            .group(&[(Feedback::Binary(false), &[-2.0], &[-1.0])])
            .mismatched(&[2.0, -1.0])
    }

    #[test]
    fn is_a_sound_objective() {
        for params in [
            "{}",
            r#"{"beta": 0.5, "undesirable_weight": 1.33}"#,
            r#"{"beta": 2, "desirable_weight": 0, "shift": -0.5}"#,
        ] {
            check::objective::<Kto>(params).expect_passed();
        }
    }

    #[test]
    fn by_hand() {
        let params = r#"{"beta": 0.1, "undesirable_weight": 1.5}"#;
        let seen = step().on::<Kto>(params).unwrap();
        seen.expect(0.578212693, &[-0.0124299503, -0.0124299503, 0.0186449255]);
        assert_eq!(seen.metric("kl"), Some(0.5));
        assert_eq!(seen.metric("rewards/chosen"), Some(0.2));
        assert_eq!(seen.metric("rewards/rejected"), Some(-0.1));
        assert_eq!(seen.metric("rewards/binary/accuracy"), Some(1.0));
    }

    #[test]
    fn the_kl_is_never_negative() {
        let params = r#"{"beta": 0.1, "undesirable_weight": 1.5}"#;
        let seen = step().mismatched(&[-2.0, 1.0]).on::<Kto>(params).unwrap();
        assert!((seen.loss - 0.581348610735).abs() < 1e-9);
        assert_eq!(seen.metric("kl"), Some(0.0));
    }

    #[test]
    fn at_step_0_the_loss_is_a_half() {
        for label in [true, false] {
            let start = Case::new()
                .group(&[(Feedback::Binary(label), &[-1.0], &[-1.0])])
                .mismatched(&[0.0]);
            let sign = if label { -1.0 } else { 1.0 };
            start.on::<Kto>("{}").unwrap().expect(0.5, &[sign * 0.25 * 0.03]);
        }
    }

    #[test]
    fn it_is_the_distance_of_the_shifted_score_from_the_label() {
        let p = |ratio: f64| math::sigmoid(0.1 * ratio - 0.1 * 0.5);
        let expected = ((p(2.0) - 1.0).abs() + (p(-1.0) - 0.0).abs()) / 2.0;
        let seen = step().on::<Kto>(r#"{"beta": 0.1}"#).unwrap();
        assert!((seen.loss - expected).abs() < 1e-12);
    }

    #[test]
    fn a_lone_prompt_and_wrong_parameters_are_refused() {
        let fault = step().mismatched(&[]).on::<Kto>("{}").unwrap_err();
        let says = "z0 needs at least two prompts in every optimizer step";
        assert_eq!(fault.message.as_str(), says);
        let fault = step().on::<Kto>(r#"{"desirable_wight": 1}"#).unwrap_err();
        let says = "unknown parameter `desirable_wight`; did you mean `desirable_weight`?";
        assert_eq!(fault.message.as_str(), says);
    }
}

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

use uft_core::math::softplus;
use uft_core::prelude::*;

struct UnaPairwise {
    beta: f64,
    label_smoothing: f64,
    margin_scale: f64,
}

impl Objective for UnaPairwise {
    const NAME: &'static str = "una-pairwise";
    const ABOUT: &'static str = "-log sigmoid(beta*(d_w - d_l)), d = log(pi/pi_ref) \
        (DPO, arXiv 2305.18290, eq. 7; label-smoothed: cDPO; margins: ODPO, arXiv 2402.10571)";

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
        let e = self.label_smoothing;
        let reward = |response: &Summed| response.log_ratio() * self.beta;
        out.mean_over_pairs(batch, reward, |chosen, rejected| {
            let z = reward(chosen) - reward(rejected) - self.margin_scale * chosen.value();
            softplus(-z) * (1.0 - e) + softplus(z) * e
        });
        Ok(())
    }
}

uft_core::plugin! { objectives: [UnaPairwise] }

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::{self, Case};
    use uft_core::math::Discrepancy;

    type Response = (Feedback, &'static [f32], &'static [f32]);

    /// Of log-ratio 2, with a margin.
    fn chosen(margin: Option<f32>) -> Response {
        (Feedback::Chosen(margin.into()), &[-1.0, -0.5], &[-2.0, -1.5])
    }

    /// Of log-ratio -1.
    fn rejected() -> Response {
        (Feedback::Rejected(None.into()), &[-2.0], &[-1.0])
    }

    fn pair() -> Case {
        Case::new().group(&[chosen(None), rejected()])
    }

    #[test]
    fn is_a_sound_objective() {
        for params in [
            "{}",
            r#"{"beta": 2}"#,
            r#"{"beta": 0.1, "label_smoothing": 0.1}"#,
            r#"{"beta": 1, "label_smoothing": 0.5, "margin_scale": 0.7}"#,
        ] {
            check::objective::<UnaPairwise>(params).expect_passed();
        }
    }

    #[test]
    fn by_hand() {
        let seen = pair().on::<UnaPairwise>(r#"{"beta": 0.1}"#).unwrap();
        seen.expect(0.554355244, &[-0.0425557483, -0.0425557483, 0.0425557483]);
        assert!((seen.metric("rewards/margins").unwrap() - 0.3).abs() < 1e-12);
        assert_eq!(seen.metric("rewards/pair/accuracy"), Some(1.0));
        let cdpo = pair().on::<UnaPairwise>(r#"{"beta": 0.1, "label_smoothing": 0.1}"#).unwrap();
        cdpo.expect(0.584355244, &[-0.0325557483, -0.0325557483, 0.0325557483]);
        let odpo = Case::new().group(&[chosen(Some(2.0)), rejected()]);
        let odpo = odpo.on::<UnaPairwise>(r#"{"beta": 0.1, "margin_scale": 0.5}"#).unwrap();
        assert!((odpo.loss - 1.103186048885).abs() < 1e-9);
    }

    #[test]
    fn a_response_in_two_pairs_collects_both_gradients() {
        let liked: Response = (Feedback::Rejected(None.into()), &[-1.0], &[-5.0]);
        let both = Case::new().group(&[chosen(None), rejected(), liked]);
        let seen = both.on::<UnaPairwise>(r#"{"beta": 0.1}"#).unwrap();
        seen.expect(0.676247057, &[-0.0487695740, -0.0487695740, 0.0212778742, 0.0274916999]);
        assert_eq!(seen.metric("rewards/accuracies"), Some(0.5));
    }

    #[test]
    fn at_step_0_the_loss_is_log_2() {
        let start = Case::new().group(&[
            (Feedback::Chosen(None.into()), &[-1.0], &[-1.0]),
            (Feedback::Rejected(None.into()), &[-3.0], &[-3.0]),
        ]);
        let seen = start.on::<UnaPairwise>("{}").unwrap();
        seen.expect(std::f64::consts::LN_2, &[-0.5 * 0.03, 0.5 * 0.03]);
        assert_eq!(seen.metric("rewards/accuracies"), Some(0.5));
    }

    #[test]
    fn it_is_the_cross_entropy_of_the_reward_difference() {
        for e in [0.0, 0.2] {
            let params = format!(r#"{{"beta": 0.4, "label_smoothing": {e}}}"#);
            let (loss, slope) = Discrepancy::Bce.at(0.4 * 3.0, 1.0 - e);
            let slope = 0.4 * slope;
            pair().on::<UnaPairwise>(&params).unwrap().expect(loss, &[slope, slope, -slope]);
        }
    }

    #[test]
    fn parameters_are_checked() {
        let fault = pair().on::<UnaPairwise>(r#"{"label_smoothing": 0.7}"#).unwrap_err();
        let says = "parameter `label_smoothing` must be a number from 0 to 0.5, not 0.7";
        assert_eq!(fault.message.as_str(), says);
    }
}

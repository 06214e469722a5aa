//! UFT's fine-tuning part: a demonstration is a response whose reward is 1.
//!
//! `L = mean over responses of D(sigmoid(r), 1)` with the implicit reward
//! `r = beta * (log pi(y|x) - log pi_ref(y|x)) + shift`. `D` is the squared error of the paper
//! (UFT, arXiv 2410.21438, eq. 7), or the cross-entropy `-log sigmoid(r)`, which the paper doesn't
//! report but which keeps learning where the model is badly wrong.
//!
//! At the start the gradient on `log pi(y|x)` is `-beta / 2` (MSE: `-beta / 4`) per response, that
//! of token-mean SFT on an answer of `2 / beta` (`4 / beta`) tokens: learning rate and beta are
//! not independent.

use uft_core::math::Discrepancy;
use uft_core::prelude::*;

struct UftSft {
    beta: f64,
    shift: f64,
    loss: Discrepancy,
}

impl Objective for UftSft {
    const NAME: &'static str = "uft-sft";
    const ABOUT: &'static str =
        "(sigmoid(r) - 1)^2, r = beta*log(pi/pi_ref) + shift (UFT, arXiv 2410.21438, eq. 7)";

    fn new(params: &mut Params) -> Self {
        Self {
            beta: params.number("beta", 0.01, Bound::Positive, "scale of the implicit reward"),
            shift: params.number("shift", 0.0, Bound::Finite, "f(x) + c of the implicit reward"),
            loss: Discrepancy::from_params(params),
        }
    }

    fn needs(&self) -> Needs {
        Needs::REFERENCE
    }

    fn accepts(&self) -> Kinds {
        Kinds::DEMONSTRATION
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let n = batch.step.segments as f64;
        for segment in batch.segments() {
            let reward = self.beta * batch.log_ratio(segment) + self.shift;
            let (loss, slope) = self.loss.at(reward, 1.0);
            out.loss(loss / n);
            out.gradient(segment, slope * self.beta / n);
            out.response_metrics(batch, segment, reward, true);
        }
        Ok(())
    }
}

uft_core::plugin! { objectives: [UftSft] }

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::{self, Case};

    /// Log-ratios of 2 and -4.
    fn step() -> Case {
        Case::new().group(&[(Feedback::Demonstration, &[-1.0, -0.5], &[-2.0, -1.5])]).group(&[(
            Feedback::Demonstration,
            &[-5.0],
            &[-1.0],
        )])
    }

    #[test]
    fn is_a_sound_objective() {
        for params in [
            "{}",
            r#"{"loss": "bce"}"#,
            r#"{"beta": 2, "shift": -0.5}"#,
            r#"{"beta": 2, "loss": "bce", "shift": 3}"#,
        ] {
            check::objective::<UftSft>(params).expect_passed();
        }
    }

    #[test]
    fn by_hand() {
        let mse = step().on::<UftSft>(r#"{"beta": 0.1}"#).unwrap();
        mse.expect(0.280538172, &[-0.0111423546, -0.0111423546, -0.0143841144]);
        assert_eq!(mse.metric("rewards/chosen"), Some(0.1 * 0.5 * (2.0 - 4.0)));
        assert_eq!(mse.metric("rewards/demonstration/accuracy"), Some(0.5));
        let bce = step().on::<UftSft>(r#"{"beta": 0.1, "loss": "bce"}"#).unwrap();
        bce.expect(0.755577061, &[-0.0225083001, -0.0225083001, -0.0299343830]);
        // A shift moves the reward, not the log-ratio: r = -0.4 + 0.6 is that of a log-ratio of 2.
        let one = |ratio| Case::new().group(&[(Feedback::Demonstration, &[ratio], &[0.0])]);
        let shifted = one(-4.0).on::<UftSft>(r#"{"beta": 0.1, "shift": 0.6}"#).unwrap();
        assert!((shifted.loss - math::sigmoid(-0.2).powi(2)).abs() < 1e-12);
    }

    #[test]
    fn at_step_0_the_loss_is_a_quarter_or_log_2() {
        let start = Case::new().group(&[(Feedback::Demonstration, &[-1.0], &[-1.0])]);
        start.on::<UftSft>("{}").unwrap().expect(0.25, &[-0.25 * 0.01]);
        let bce = start.on::<UftSft>(r#"{"loss": "bce"}"#).unwrap();
        bce.expect(std::f64::consts::LN_2, &[-0.5 * 0.01]);
    }

    #[test]
    fn parameters_are_checked() {
        let fault = step().on::<UftSft>(r#"{"beta": 0}"#).unwrap_err();
        let says = "parameter `beta` must be a number above 0, not 0";
        assert_eq!(fault.message.as_str(), says);
    }
}

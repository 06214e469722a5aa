//! Losses of the difference of the implicit rewards, `z = beta * (d_w - d_l)`.

use super::{PairLoss, beta};
use uft_core::math::{log_sigmoid, relu, sigmoid, softplus};
use uft_core::prelude::*;

fn difference(beta: f64, chosen: &Summed, rejected: &Summed) -> Dual64 {
    (chosen.log_ratio() - rejected.log_ratio()) * beta
}

/// Robust DPO: `(-(1-e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2e)`, whose mean over labels that
/// are wrong with probability `e` is DPO's loss of the right ones (arXiv 2403.00409, section 3.1).
/// Defaults: the paper's section 6 for `e`, table 4 of appendix B for beta.
pub struct RobustDpo {
    beta: f64,
    label_smoothing: f64,
}

impl PairLoss for RobustDpo {
    const NAME: &'static str = "robust-dpo";
    const ABOUT: &'static str = "(-(1-e)*log sigmoid(z) + e*log sigmoid(-z)) / (1-2e), \
        z = beta*(d_w - d_l) (robust DPO, arXiv 2403.00409, section 3.1)";
    const NEEDS: Needs = Needs::REFERENCE;

    fn new(params: &mut Params) -> Self {
        // At a half the labels say nothing and the loss is not defined.
        let probability = Bound::Within(0.0, 0.499);
        let about = "e: probability that a pair is the wrong way round";
        Self {
            beta: beta(params, 0.1),
            label_smoothing: params.number("label_smoothing", 0.1, probability, about),
        }
    }

    fn reward(&self, response: &Summed) -> Dual64 {
        response.log_ratio() * self.beta
    }

    fn loss(&self, chosen: &Summed, rejected: &Summed) -> Dual64 {
        let (z, e) = (difference(self.beta, chosen, rejected), self.label_smoothing);
        (softplus(-z) * (1.0 - e) - softplus(z) * e) / (1.0 - 2.0 * e)
    }
}

/// Hinge: `max(0, 1 - z)`, the calibration loss of SLiC-HF (arXiv 2305.10425, section 2) on log-ratios,
/// as RSO does (arXiv 2309.06657, hinge-norm; default: its gamma). SLiC's margin is `1 / beta`.
pub struct Hinge {
    beta: f64,
}

impl PairLoss for Hinge {
    const NAME: &'static str = "hinge";
    const ABOUT: &'static str = "max(0, 1 - beta*(d_w - d_l)) \
        (SLiC, arXiv 2305.10425, section 2; on log-ratios: RSO, arXiv 2309.06657)";
    const NEEDS: Needs = Needs::REFERENCE;

    fn new(params: &mut Params) -> Self {
        Self { beta: beta(params, 0.05) }
    }

    fn reward(&self, response: &Summed) -> Dual64 {
        response.log_ratio() * self.beta
    }

    fn loss(&self, chosen: &Summed, rejected: &Summed) -> Dual64 {
        relu(-difference(self.beta, chosen, rejected) + 1.0)
    }
}

/// EXO on pairs: the reverse KL divergence from the policy's preference `sigmoid(z)` to the label's,
/// smoothed to `1 - e` (arXiv 2402.00856, eq. 16). Defaults: the paper's appendix B; TRL's `e`.
pub struct Exo {
    beta: f64,
    label_smoothing: f64,
}

impl PairLoss for Exo {
    const NAME: &'static str = "exo";
    const ABOUT: &'static str = "KL(sigmoid(z) || 1-e), z = beta*(d_w - d_l) \
        (EXO, arXiv 2402.00856, eq. 16)";
    const NEEDS: Needs = Needs::REFERENCE;

    fn new(params: &mut Params) -> Self {
        // Against a certain label the divergence is infinite.
        let probability = Bound::Within(1e-9, 0.5);
        let about = "e: probability that a pair is the wrong way round";
        Self {
            beta: beta(params, 0.1),
            label_smoothing: params.number("label_smoothing", 1e-3, probability, about),
        }
    }

    fn reward(&self, response: &Summed) -> Dual64 {
        response.log_ratio() * self.beta
    }

    fn loss(&self, chosen: &Summed, rejected: &Summed) -> Dual64 {
        let (z, e) = (difference(self.beta, chosen, rejected), self.label_smoothing);
        sigmoid(z) * (log_sigmoid(z) - (-e).ln_1p()) + sigmoid(-z) * (log_sigmoid(-z) - e.ln())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, on, pair, ratios};
    use super::*;

    #[test]
    fn are_sound_objectives() {
        check::<RobustDpo>(&["{}", r#"{"beta": 2, "label_smoothing": 0.4}"#]);
        check::<Hinge>(&["{}", r#"{"beta": 2}"#]);
        check::<Exo>(&["{}", r#"{"beta": 2, "label_smoothing": 0.2}"#]);
    }

    #[test]
    fn robust_dpo_without_smoothing_is_dpo() {
        let seen = on::<RobustDpo>(&pair(), r#"{"beta": 0.1, "label_smoothing": 0}"#);
        let slope = -0.1 * sigmoid(-0.3);
        seen.expect(softplus(-0.3), &[slope, slope, -slope]);
    }

    #[test]
    fn robust_dpo_on_flipped_labels_is_dpo_on_the_right_ones_in_the_mean() {
        let params = r#"{"beta": 0.5, "label_smoothing": 0.2}"#;
        let loss = |w, l| on::<RobustDpo>(&ratios(w, l), params).loss;
        let mean = 0.8 * loss(3.0, -1.0) + 0.2 * loss(-1.0, 3.0);
        assert!((mean - softplus(-2.0)).abs() < 1e-12);
    }

    #[test]
    fn the_hinge_rests_beyond_its_margin() {
        on::<Hinge>(&ratios(3.0, -1.0), r#"{"beta": 0.25}"#).expect(0.0, &[0.0, 0.0]);
        on::<Hinge>(&ratios(1.0, -1.0), r#"{"beta": 0.25}"#).expect(0.5, &[-0.25, 0.25]);
    }

    #[test]
    fn exo_rests_where_the_preference_is_the_label() {
        // sigmoid(z) = 1 - e, at z = ln 3 for e = 1/4
        let seen = on::<Exo>(&ratios(3f32.ln(), 0.0), r#"{"beta": 1, "label_smoothing": 0.25}"#);
        assert!(seen.loss.abs() < 1e-7 && seen.dlogp[0].abs() < 1e-6, "{seen:?}");
    }
}

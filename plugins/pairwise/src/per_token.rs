//! Losses of log-ratios per token, so that long and short responses count alike.

use super::{PairLoss, beta};
use uft_core::math::softplus;
use uft_core::prelude::*;

/// `d_w/n_w - d_l/n_l`.
fn difference(chosen: &Summed, rejected: &Summed) -> Dual64 {
    chosen.log_ratio() / chosen.tokens() - rejected.log_ratio() / rejected.tokens()
}

/// IPO: `(d_w/n_w - d_l/n_l - 1/(2 beta))^2` (arXiv 2310.12036, eq. 17). The mean per token is not in the
/// paper, but what its authors ran, as TRL found out.
pub struct Ipo {
    beta: f64,
}

impl PairLoss for Ipo {
    const NAME: &'static str = "ipo";
    const ABOUT: &'static str =
        "(d_w/n_w - d_l/n_l - 1/(2*beta))^2 (IPO, arXiv 2310.12036, eq. 17)";
    const NEEDS: Needs = Needs(Needs::REFERENCE.0 | Needs::TOKEN_COUNTS.0);

    fn new(params: &mut Params) -> Self {
        let about = "tau: the margin per token to reach is 1 / (2 beta)";
        Self { beta: params.number("beta", 0.1, Bound::Positive, about) }
    }

    fn reward(&self, response: &Summed) -> Dual64 {
        response.log_ratio() * self.beta
    }

    fn loss(&self, chosen: &Summed, rejected: &Summed) -> Dual64 {
        (difference(chosen, rejected) - 0.5 / self.beta).powi(2)
    }
}

/// Length-normalised DPO: `-log sigmoid(beta * (d_w/n_w - d_l/n_l))` (Tulu 3, arXiv 2411.15124, section 5;
/// default: the beta of its authors' training commands). Beta is per token, hence some tens of times DPO's.
pub struct LnDpo {
    beta: f64,
}

impl PairLoss for LnDpo {
    const NAME: &'static str = "ln-dpo";
    const ABOUT: &'static str = "-log sigmoid(beta*(d_w/n_w - d_l/n_l)) \
        (length-normalised DPO, Tulu 3, arXiv 2411.15124, section 5)";
    const NEEDS: Needs = Needs(Needs::REFERENCE.0 | Needs::TOKEN_COUNTS.0);

    fn new(params: &mut Params) -> Self {
        Self { beta: beta(params, 5.0) }
    }

    fn reward(&self, response: &Summed) -> Dual64 {
        response.log_ratio() * (self.beta / response.tokens())
    }

    fn loss(&self, chosen: &Summed, rejected: &Summed) -> Dual64 {
        softplus(-difference(chosen, rejected) * self.beta)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, on, pair, ratios};
    use super::*;
    use uft_core::math::sigmoid;

    #[test]
    fn are_sound_objectives() {
        check::<Ipo>(&["{}", r#"{"beta": 2}"#]);
        check::<LnDpo>(&["{}", r#"{"beta": 0.1}"#]);
    }

    #[test]
    fn ipo_rests_at_its_margin() {
        // d/n is 1 for the chosen response and -1 for the rejected one.
        on::<Ipo>(&pair(), r#"{"beta": 0.25}"#).expect(0.0, &[0.0, 0.0, 0.0]);
        on::<Ipo>(&pair(), r#"{"beta": 0.5}"#).expect(1.0, &[1.0, 1.0, -2.0]);
    }

    #[test]
    fn ln_dpo_divides_by_the_tokens() {
        let slope = -0.5 * sigmoid(-1.0);
        let seen = on::<LnDpo>(&pair(), r#"{"beta": 0.5}"#);
        seen.expect(softplus(-1.0), &[slope / 2.0, slope / 2.0, -slope]);
        // On responses of one token it is DPO.
        let slope = -0.5 * sigmoid(-2.0);
        on::<LnDpo>(&ratios(3.0, -1.0), r#"{"beta": 0.5}"#)
            .expect(softplus(-2.0), &[slope, -slope]);
    }
}

//! Losses of the policy alone; no reference is computed.

use super::{PairLoss, beta};
use uft_core::math::{Number, softplus};
use uft_core::prelude::*;

/// `a = log pi(y|x) / n`.
fn per_token(response: &Summed) -> Dual64 {
    response.logp / response.tokens()
}

/// SimPO: `-log sigmoid(beta * (a_w - a_l) - gamma)` (arXiv 2405.14734, eq. 6). Defaults: those of the
/// authors' code, where gamma is given as `gamma / beta = 0.25`; they tune both for each model.
pub struct SimPo {
    beta: f64,
    gamma: f64,
}

impl PairLoss for SimPo {
    const NAME: &'static str = "simpo";
    const ABOUT: &'static str =
        "-log sigmoid(beta*(a_w - a_l) - gamma), a = log pi / n (SimPO, arXiv 2405.14734, eq. 6)";
    const NEEDS: Needs = Needs::TOKEN_COUNTS;

    fn new(params: &mut Params) -> Self {
        let about = "by how much the rewards have to differ";
        Self {
            beta: beta(params, 2.0),
            gamma: params.number("gamma", 0.5, Bound::NotNegative, about),
        }
    }

    fn reward(&self, response: &Summed) -> Dual64 {
        per_token(response) * self.beta
    }

    fn loss(&self, chosen: &Summed, rejected: &Summed) -> Dual64 {
        softplus(self.reward(rejected) - self.reward(chosen) + self.gamma)
    }
}

/// CPO: `-log sigmoid(beta * (S_w - S_l)) + alpha * nll_w` (arXiv 2401.08417, eq. 3 and section 3.2; its
/// defaults). The likelihood term is the mean per token of the chosen response, as in the authors'
/// trainer with one pair a batch, or its sum, as the paper writes it.
pub struct Cpo {
    beta: f64,
    alpha: f64,
    summed: bool,
}

impl PairLoss for Cpo {
    const NAME: &'static str = "cpo";
    const ABOUT: &'static str = "-log sigmoid(beta*(log pi_w - log pi_l)) - alpha*a_w, \
        a = log pi / n (CPO, arXiv 2401.08417, eq. 3)";
    const NEEDS: Needs = Needs::TOKEN_COUNTS;

    fn new(params: &mut Params) -> Self {
        let likelihood = "weight of the chosen response's negative log-likelihood";
        let nll = "that likelihood is a mean per token or a sum";
        Self {
            beta: beta(params, 0.1),
            alpha: params.number("alpha", 1.0, Bound::NotNegative, likelihood),
            summed: params.choice("nll", "mean", &["mean", "sum"], nll) == "sum",
        }
    }

    fn reward(&self, response: &Summed) -> Dual64 {
        response.logp * self.beta
    }

    fn loss(&self, chosen: &Summed, rejected: &Summed) -> Dual64 {
        let nll = if self.summed { -chosen.logp } else { -per_token(chosen) };
        softplus(self.reward(rejected) - self.reward(chosen)) + nll * self.alpha
    }
}

/// ORPO: `-a_w - lambda * log sigmoid(log odds(a_w) - log odds(a_l))` with `odds = e^a / (1 - e^a)` (arXiv
/// 2403.07691, eq. 6 and 7; its lambda). TRL's likelihood term counts the prompt's tokens too; here as in
/// the paper only the response is trained.
pub struct Orpo {
    lambda: f64,
}

impl PairLoss for Orpo {
    const NAME: &'static str = "orpo";
    const ABOUT: &'static str = "-a_w - lambda*log sigmoid(log odds(a_w) - log odds(a_l)), \
        a = log pi / n, odds = e^a / (1 - e^a) (ORPO, arXiv 2403.07691, eq. 6 and 7)";
    const NEEDS: Needs = Needs::TOKEN_COUNTS;

    fn new(params: &mut Params) -> Self {
        let about = "weight of the odds ratio";
        Self { lambda: params.number("lambda", 0.1, Bound::NotNegative, about) }
    }

    fn reward(&self, response: &Summed) -> Dual64 {
        per_token(response) * self.lambda
    }

    fn loss(&self, chosen: &Summed, rejected: &Summed) -> Dual64 {
        let (won, lost) = (per_token(chosen), per_token(rejected));
        softplus(log_odds(lost) - log_odds(won)) * self.lambda - won
    }
}

/// `log(e^a / (1 - e^a))`. The odds of a certain response are infinite; they are cut at a
/// probability of `1 - 1e-6`, about what an f32 log-prob can tell from 1.
fn log_odds(a: Dual64) -> Dual64 {
    const MOST: f64 = -1e-6;
    a.through(|a| a.min(MOST) - (-a.min(MOST).exp_m1()).ln(), |a| -1.0 / a.min(MOST).exp_m1())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, on, pair};
    use super::*;
    use uft_core::check::Case;
    use uft_core::math::sigmoid;

    #[test]
    fn are_sound_objectives() {
        check::<SimPo>(&["{}", r#"{"beta": 10, "gamma": 3}"#]);
        check::<Cpo>(&["{}", r#"{"alpha": 0}"#, r#"{"beta": 1, "nll": "sum"}"#]);
        check::<Orpo>(&["{}", r#"{"lambda": 2}"#]);
    }

    #[test]
    fn the_reference_does_not_matter() {
        let mut other = pair();
        other.ref_logps.fill(-7.0);
        assert_eq!(on::<SimPo>(&pair(), "{}"), on::<SimPo>(&other, "{}"));
        assert_eq!(on::<Cpo>(&pair(), "{}"), on::<Cpo>(&other, "{}"));
        assert_eq!(on::<Orpo>(&pair(), "{}"), on::<Orpo>(&other, "{}"));
    }

    #[test]
    fn simpo_by_hand() {
        // a is -0.75 and -2: z = 2 * 1.25 - 0.5
        let slope = -2.0 * sigmoid(-2.0);
        on::<SimPo>(&pair(), "{}").expect(softplus(-2.0), &[slope / 2.0, slope / 2.0, -slope]);
    }

    #[test]
    fn cpo_is_dpo_under_a_uniform_reference_and_a_likelihood() {
        // S is -1.5 and -2.
        let slope = -0.1 * sigmoid(-0.05);
        let seen = on::<Cpo>(&pair(), "{}");
        seen.expect(softplus(-0.05) + 0.75, &[slope - 0.5, slope - 0.5, -slope]);
        let seen = on::<Cpo>(&pair(), r#"{"nll": "sum", "alpha": 2}"#);
        seen.expect(softplus(-0.05) + 3.0, &[slope - 2.0, slope - 2.0, -slope]);
    }

    #[test]
    fn orpo_without_its_weight_is_sft_on_the_chosen_response() {
        on::<Orpo>(&pair(), r#"{"lambda": 0}"#).expect(0.75, &[-0.5, -0.5, 0.0]);
    }

    #[test]
    fn orpo_of_even_odds() {
        // Both responses have a mean probability of a half per token: odds of 1.
        let half = -std::f32::consts::LN_2;
        let step = Case::new().group(&[
            (Feedback::Chosen(None.into()), &[half], &[0.0]),
            (Feedback::Rejected(None.into()), &[half, half], &[0.0, 0.0]),
        ]);
        let seen = on::<Orpo>(&step, r#"{"lambda": 1}"#);
        // d log odds / d a = 1 / (1 - 1/2)
        seen.expect(2.0 * std::f64::consts::LN_2, &[-1.0 - 0.5 * 2.0, 0.5, 0.5]);
    }
}

//! Noise-contrastive alignment (arXiv 2402.05369): among K responses to a prompt, tell those of the
//! optimal policy from noise.
//!
//! A response's share `t` of the target is `softmax(score / temperature)` among scored responses; of
//! chosen and rejected ones the chosen share it equally. The paper's rewards are any numbers, here scores
//! are from 0 to 1. The default temperature is the authors' for its range: nearly all of the target
//! is the best response's.

use super::beta;
use uft_core::math::{log_sigmoid, softplus};
use uft_core::prelude::*;

struct Targets {
    beta: f64,
    temperature: f64,
}

impl Targets {
    fn new(params: &mut Params) -> Self {
        let about =
            "of the scores: 1 spreads the target over the responses, 0.001 gives it to the best";
        Self {
            beta: beta(params, 0.01),
            temperature: params.number("temperature", 1e-4, Bound::Positive, about),
        }
    }

    fn reward(&self, response: &Summed) -> Dual64 {
        response.log_ratio() * self.beta
    }

    fn of(&self, responses: &[Summed]) -> Vec<f64> {
        let best = responses.iter().map(Summed::value).fold(f64::NEG_INFINITY, f64::max);
        let weight = |response: &Summed| match response.kind() {
            Kind::Score => ((response.value() - best) / self.temperature).exp(),
            Kind::Chosen => 1.0,
            _ => 0.0,
        };
        let weights: Vec<f64> = responses.iter().map(weight).collect();
        // A prompt with rejected responses alone has no target.
        let sum = weights.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        weights.into_iter().map(|weight| weight / sum).collect()
    }
}

/// A score says nothing of a response that was only chosen.
fn refuse_mixed(batch: &Batch) -> Result<(), Fault> {
    let mixed = |group: &[Segment]| {
        group.iter().any(|s| s.kind == Kind::Score) && group.iter().any(|s| s.kind != Kind::Score)
    };
    if batch.segments().chunk_by(|a, b| a.group == b.group).any(mixed) {
        return Err(Fault::evaluation(
            "a prompt has scored responses beside chosen or rejected ones; give one sort",
        ));
    }
    Ok(())
}

/// InfoNCA: `-sum over k of t_k * log softmax(r)_k` (arXiv 2402.05369, section 3). On a pair this is DPO.
pub struct InfoNca(Targets);

impl Objective for InfoNca {
    const NAME: &'static str = "info-nca";
    const ABOUT: &'static str = "-sum_k t_k*log softmax(r)_k, r = beta*d, \
        t = softmax(score/temperature) (InfoNCA, arXiv 2402.05369, section 3)";

    fn new(params: &mut Params) -> Self {
        Self(Targets::new(params))
    }

    fn needs(&self) -> Needs {
        Needs::REFERENCE | Needs::GROUPS
    }

    fn accepts(&self) -> Kinds {
        Kinds::SCORE | Kinds::PAIR
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        refuse_mixed(batch)?;
        let Self(targets) = self;
        let reward = |response: &Summed| targets.reward(response);
        out.mean_over_groups(batch, reward, |responses| {
            let rewards: Vec<Dual64> = responses.iter().map(reward).collect();
            let all = log_sum_exp(&rewards);
            let shares = targets.of(responses).into_iter().zip(rewards);
            shares.map(|(t, r)| (all - r) * t).sum()
        });
        Ok(())
    }
}

/// `log sum e^x`.
fn log_sum_exp(x: &[Dual64]) -> Dual64 {
    let largest = x.iter().map(|x| x.re).fold(f64::NEG_INFINITY, f64::max);
    x.iter().map(|x| (*x - largest).exp()).sum::<Dual64>().ln() + largest
}

/// NCA: `-sum over k of t_k * log sigmoid(r_k) - mean over k of log sigmoid(-r_k)` (arXiv 2402.05369,
/// section 4), which keeps good responses from becoming less likely.
pub struct Nca(Targets);

impl Objective for Nca {
    const NAME: &'static str = "nca";
    const ABOUT: &'static str = "-sum_k t_k*log sigmoid(r_k) - mean_k log sigmoid(-r_k), \
        r = beta*d, t = softmax(score/temperature) (NCA, arXiv 2402.05369, section 4)";

    fn new(params: &mut Params) -> Self {
        Self(Targets::new(params))
    }

    fn needs(&self) -> Needs {
        Needs::REFERENCE | Needs::GROUPS
    }

    fn accepts(&self) -> Kinds {
        Kinds::SCORE | Kinds::PAIR
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        refuse_mixed(batch)?;
        let Self(targets) = self;
        let reward = |response: &Summed| targets.reward(response);
        out.mean_over_groups(batch, reward, |responses| {
            let k = responses.len() as f64;
            let shares = targets.of(responses).into_iter().zip(responses);
            shares.map(|(t, y)| softplus(reward(y)) / k - log_sigmoid(reward(y)) * t).sum()
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{group, on, pair};
    use super::*;
    use uft_core::check;
    use uft_core::math::sigmoid;

    const BETA: &str = r#"{"beta": 0.5}"#;

    #[test]
    fn are_sound_objectives() {
        for params in ["{}", r#"{"beta": 0.5, "temperature": 0.3}"#] {
            check::objective::<InfoNca>(params).expect_passed();
            check::objective::<Nca>(params).expect_passed();
        }
    }

    #[test]
    fn info_nca_on_a_pair_is_dpo() {
        let slope = -0.5 * sigmoid(-1.5);
        on::<InfoNca>(&pair(2.0, -1.0), BETA).expect(softplus(-1.5), &[slope, -slope]);
    }

    #[test]
    fn nca_on_a_pair_is_half_its_noise_for_each_response() {
        let (won, lost) = (sigmoid(1.0), sigmoid(-0.5));
        let loss = softplus(-1.0) + 0.5 * softplus(1.0) + 0.5 * softplus(-0.5);
        let slopes = [0.5 * (1.5 * won - 1.0), 0.5 * 0.5 * lost];
        on::<Nca>(&pair(2.0, -1.0), BETA).expect(loss, &slopes);
    }

    #[test]
    fn info_nca_rests_where_the_rewards_are_the_scores() {
        let scores = [0.0f32, 0.5, 1.0];
        let responses = scores.map(|s| (Feedback::Score(s), 4.0 * s - 1.0));
        let seen = on::<InfoNca>(&group(&responses), r#"{"beta": 0.5, "temperature": 0.5}"#);
        assert!(seen.dlogp.iter().all(|g| g.abs() < 1e-8), "{seen:?}");
    }

    #[test]
    fn with_a_low_temperature_the_best_response_is_the_target() {
        let four = [(0.25, 1.0), (0.75, -2.0), (0.5, 0.5), (0.0, 3.0)];
        let scored = group(&four.map(|(score, ratio)| (Feedback::Score(score), ratio)));
        let chosen = group(&four.map(|(score, ratio)| match score {
            0.75 => (Feedback::Chosen(None.into()), ratio),
            _ => (Feedback::Rejected(None.into()), ratio),
        }));
        for (scored, chosen) in [
            (on::<Nca>(&scored, BETA), on::<Nca>(&chosen, BETA)),
            (on::<InfoNca>(&scored, BETA), on::<InfoNca>(&chosen, BETA)),
        ] {
            assert_eq!((scored.loss, scored.dlogp), (chosen.loss, chosen.dlogp));
        }
    }

    #[test]
    fn scores_beside_pairs_are_refused() {
        let mixed = group(&[(Feedback::Score(1.0), 0.0), (Feedback::Rejected(None.into()), 0.0)]);
        let fault = mixed.on::<Nca>("{}").unwrap_err();
        let says = "a prompt has scored responses beside chosen or rejected ones; give one sort";
        assert_eq!(fault.message.as_str(), says);
    }
}

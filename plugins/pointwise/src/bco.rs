//! BCO: binary classifier optimisation (arXiv 2404.04656, section 4).
//!
//! `L = mean over responses of -log sigmoid(r - delta)` for thumbs up and chosen responses and
//! `-log sigmoid(-(r - delta))` for the others, with `r = beta * d`, `d = log pi(y|x) - log pi_ref(y|x)`.
//! `delta` is the mean reward of all responses of all steps so far, the step's own included; nothing is
//! back-propagated through it. TRL takes it per micro-batch, here it is taken once for every optimizer
//! step, so that the loss does not depend on how a step is split. A checkpoint keeps it; evaluation
//! reads it and leaves it alone.
//!
//! The paper's weights by how far the prompts of thumbs down are from those of thumbs up need
//! embeddings of prompts, which an objective does not get: they belong into the data.

use uft_core::math::softplus;
use uft_core::prelude::*;

pub struct Bco {
    beta: f64,
    /// Mean log-ratio of all responses that were trained on, in nats, and their number.
    mean: f64,
    seen: f64,
}

impl Objective for Bco {
    const NAME: &'static str = "bco";
    const ABOUT: &'static str = "-log sigmoid(+-(beta*d - delta)), delta the running mean reward \
        (BCO, arXiv 2404.04656, section 4)";

    fn new(params: &mut Params) -> Self {
        let about = "scale of the implicit reward";
        let beta = params.number("beta", 0.01, Bound::Positive, about);
        Self { beta, mean: 0.0, seen: 0.0 }
    }

    fn needs(&self) -> Needs {
        Needs::REFERENCE | Needs::STEP_LOG_RATIOS | Needs::STATE
    }

    fn accepts(&self) -> Kinds {
        Kinds::BINARY | Kinds::PAIR
    }

    fn begin_step(&mut self, step: &Step) -> Result<(), Fault> {
        let ratios = step.log_ratios.as_slice();
        if step.training && !ratios.is_empty() {
            self.seen += ratios.len() as f64;
            let above: f64 = ratios.iter().map(|d| d - self.mean).sum();
            self.mean += above / self.seen;
        }
        Ok(())
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let reward = |response: &Summed| response.log_ratio() * self.beta;
        let delta = self.beta * self.mean;
        out.mean_over_responses(batch, reward, |response| match response.is_desirable() {
            true => softplus(-reward(response) + delta),
            false => softplus(reward(response) - delta),
        });
        out.metric("rewards/delta", delta);
        Ok(())
    }

    fn save_state(&self) -> Vec<u8> {
        [self.mean, self.seen].map(f64::to_le_bytes).concat()
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), Fault> {
        let ([mean, seen], []) = state.as_chunks() else {
            let bytes = state.len();
            return Err(Fault::evaluation(format!("a state of {bytes} bytes instead of 16")));
        };
        (self.mean, self.seen) = (f64::from_le_bytes(*mean), f64::from_le_bytes(*seen));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::abi::make_objective;
    use uft_core::check::{self, Case};

    /// Thumbs up at this log-ratio, thumbs down at that.
    fn step(up: f32, down: f32) -> Case {
        Case::new().group(&[(Feedback::Binary(true), &[up - 9.0], &[-9.0])]).group(&[(
            Feedback::Binary(false),
            &[down - 9.0],
            &[-9.0],
        )])
    }

    #[test]
    fn is_a_sound_objective() {
        for params in ["{}", r#"{"beta": 2}"#] {
            check::objective::<Bco>(params).expect_passed();
        }
    }

    #[test]
    fn delta_is_the_mean_of_this_step_and_all_before() {
        let mut bco = make_objective::<Bco>(r#"{"beta": 0.5}"#).unwrap();
        let delta = |seen: check::Evaluated| seen.metric("rewards/delta").unwrap();
        assert_eq!(delta(step(3.0, -1.0).run(&mut bco).unwrap()), 0.5);
        assert_eq!(delta(step(-4.0, -2.0).run(&mut bco).unwrap()), -0.5);
        let held_out = Case { evaluation: true, ..step(100.0, 100.0) };
        assert_eq!(delta(held_out.run(&mut bco).unwrap()), -0.5);
    }

    #[test]
    fn by_hand() {
        // delta = 0.5: the rewards 1.5 and -0.5 are 1 above it and below it.
        let seen = step(3.0, -1.0).on::<Bco>(r#"{"beta": 0.5}"#).unwrap();
        let slope = -0.5 * math::sigmoid(-1.0) / 2.0;
        seen.expect(softplus(-1.0), &[slope, -slope]);
    }

    #[test]
    fn around_a_mean_of_0_it_is_the_cross_entropy_of_una_binary() {
        let seen = step(2.0, -2.0).on::<Bco>(r#"{"beta": 0.5}"#).unwrap();
        let (loss, slope) = math::Discrepancy::Bce.at(1.0, 1.0);
        seen.expect(loss, &[0.5 * slope / 2.0, -0.5 * slope / 2.0]);
    }

    #[test]
    fn another_state_is_refused() {
        let mut bco = make_objective::<Bco>("{}").unwrap();
        let fault = bco.load_state([1, 2, 3].as_slice().into()).unwrap_err();
        assert_eq!(fault.message.as_str(), "a state of 3 bytes instead of 16");
    }
}

//! my-plugin: what it is for, and the paper that it is from.
//!
//! `L = mean over responses of (sigmoid(r) - s)^2` with the implicit reward
//! `r = beta * (log pi(y|x) - log pi_ref(y|x))` and the feedback's value `s`: replace it by your own.

use uft_core::prelude::*;

struct MyPlugin {
    beta: f64,
}

impl Objective for MyPlugin {
    const NAME: &'static str = "my-plugin";
    const ABOUT: &'static str = "(sigmoid(r) - s)^2, r = beta*log(pi/pi_ref)";

    fn new(params: &mut Params) -> Self {
        Self {
            beta: params.number("beta", 0.1, Bound::Positive, "scale of the implicit reward"),
        }
    }

    fn needs(&self) -> Needs {
        Needs::REFERENCE
    }

    fn accepts(&self) -> Kinds {
        Kinds::DEMONSTRATION | Kinds::SCORE | Kinds::BINARY
    }

    // Only the loss: the gradient comes by itself. `mean_over_pairs` and `mean_over_groups` give the
    // closure a chosen and a rejected response, or all responses to a prompt.
    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let reward = |response: &Summed| response.log_ratio() * self.beta;
        out.mean_over_responses(batch, reward, |response| {
            (math::sigmoid(reward(response)) - response.value()).powi(2)
        });
        Ok(())
    }
}

uft_core::plugin! { objectives: [MyPlugin] }

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::{self, Case};

    #[test]
    fn is_a_sound_objective() {
        check::objective::<MyPlugin>("{}").expect_passed();
        check::objective::<MyPlugin>(r#"{"beta": 2}"#).expect_passed();
    }

    #[test]
    fn by_hand() {
        // Where policy and reference agree, sigmoid(0) = 1/2: the loss is (1/2 - s)^2 and its
        // derivative 2 (1/2 - s) / 4 * beta.
        let step = Case::new().group(&[(Feedback::Score(1.0), &[-1.0, -2.0], &[-1.0, -2.0])]);
        step.on::<MyPlugin>(r#"{"beta": 0.5}"#)
            .unwrap()
            .expect(0.25, &[-0.125, -0.125]);
    }
}

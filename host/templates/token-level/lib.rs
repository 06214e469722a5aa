//! my-plugin: what it is for, and the paper that it is from.
//!
//! `L = mean over tokens of -(1 - p)^gamma log p`, `p = pi(y_t|x, y_<t)`, the focal loss (arXiv
//! 1708.02002, eq. 4) of demonstrations: tokens that the model knows already count less. Replace it
//! by your own.

use uft_core::prelude::*;

struct MyPlugin {
    gamma: f64,
}

impl Objective for MyPlugin {
    const NAME: &'static str = "my-plugin";
    const ABOUT: &'static str =
        "-(1 - p)^gamma log p, the mean over tokens (arXiv 1708.02002, eq. 4)";

    fn new(params: &mut Params) -> Self {
        let about = "how much less a token counts that is likely already";
        Self {
            gamma: params.number("gamma", 2.0, Bound::Within(1.0, 10.0), about),
        }
    }

    fn needs(&self) -> Needs {
        Needs::TOKEN_COUNTS | Needs::TOKEN_LOGPS
    }

    fn accepts(&self) -> Kinds {
        Kinds::DEMONSTRATION
    }

    // Loss and gradient by hand, token by token. Totals are the whole step's (`batch.step`): this
    // batch may be a part of it.
    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let n = batch.step.tokens as f64;
        for segment in batch.segments() {
            for token in segment.range() {
                let logp = f64::from(batch.logps[token]);
                // 1 - p, exact where p is close to 1.
                let q = -logp.exp_m1();
                let weight = q.powf(self.gamma);
                let slope = self.gamma * q.powf(self.gamma - 1.0) * logp.exp() * logp - weight;
                out.loss(-weight * logp / n);
                out.token_gradients(segment)[token - segment.range().start] = (slope / n) as f32;
                out.metric("nll_loss", -logp);
            }
        }
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
        check::objective::<MyPlugin>(r#"{"gamma": 1}"#).expect_passed();
    }

    #[test]
    fn by_hand() {
        // With p = 1/2 and gamma = 1: 1/2 log 2, whose derivative by log p is (-log 2 - 1) / 2.
        let p = 0.5f32.ln();
        let step = Case::new().group(&[(Feedback::Demonstration, &[p], &[p])]);
        let log_2 = std::f64::consts::LN_2;
        step.on::<MyPlugin>(r#"{"gamma": 1}"#)
            .unwrap()
            .expect(0.5 * log_2, &[-0.5 * (1.0 + log_2)]);
    }
}

//! LD-DPO: DPO whose log-probs count what a response has beyond the other's length by `alpha` only
//! (arXiv 2409.06411).
//!
//! `L = mean over pairs of -log sigmoid(beta * (D_w - D_l))`, where of a pair whose shorter response has `m`
//! tokens `D = sum over t < m of d_t + alpha * sum over t >= m of d_t` and
//! `d_t = log pi(y_t|x, y_<t) - log pi_ref(y_t|x, y_<t)`. With `alpha = 1` this is DPO; the paper tunes alpha for
//! each model, so its default is in the middle. A response that is in several pairs of its group
//! collects the gradients of all of them, with each pair's own `m`.

use uft_core::math::{sigmoid, softplus};
use uft_core::prelude::*;

struct LdDpo {
    beta: f64,
    alpha: f64,
}

impl Objective for LdDpo {
    const NAME: &'static str = "ld-dpo";
    const ABOUT: &'static str = "-log sigmoid(beta*(D_w - D_l)), D = d of the shorter length \
        + alpha*d of the rest (LD-DPO, arXiv 2409.06411)";

    fn new(params: &mut Params) -> Self {
        let about = "how much tokens beyond the shorter response's length count";
        Self {
            beta: params.number("beta", 0.1, Bound::Positive, "scale of the implicit reward"),
            alpha: params.number("alpha", 0.5, Bound::Within(0.0, 1.0), about),
        }
    }

    fn needs(&self) -> Needs {
        Needs::REFERENCE | Needs::PAIRS | Needs::TOKEN_COUNTS | Needs::TOKEN_LOGPS
    }

    fn accepts(&self) -> Kinds {
        Kinds::PAIR
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        let n = batch.step.pairs as f64;
        for segment in batch.segments() {
            out.gradient(segment, 0.0);
        }
        for (chosen, rejected) in batch.pairs() {
            let shared = chosen.tokens.min(rejected.tokens) as usize;
            let [won, lost] =
                [chosen, rejected].map(|s| self.beta * self.log_ratio(batch, s, shared));
            out.loss(softplus(lost - won) / n);
            let slope = self.beta * sigmoid(lost - won) / n;
            for (segment, slope) in [(chosen, -slope), (rejected, slope)] {
                for (t, gradient) in out.token_gradients(segment).iter_mut().enumerate() {
                    *gradient += (self.weight(t, shared) * slope) as f32;
                }
            }
            out.pair_metrics(batch, (chosen, won), (rejected, lost));
        }
        Ok(())
    }
}

impl LdDpo {
    /// How much a response's token counts, by its place in the response.
    fn weight(&self, t: usize, shared: usize) -> f64 {
        if t < shared { 1.0 } else { self.alpha }
    }

    /// `D`, in nats.
    fn log_ratio(&self, batch: &Batch, segment: &Segment, shared: usize) -> f64 {
        let tokens = segment.range().enumerate();
        let ratio = |i: usize| f64::from(batch.logps[i]) - f64::from(batch.ref_logps[i]);
        tokens.map(|(t, i)| self.weight(t, shared) * ratio(i)).sum()
    }
}

uft_core::plugin! { objectives: [LdDpo] }

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::{self, Case};

    /// Log-ratios of 1, 2 and 4 per token against -1.
    fn pair() -> Case {
        Case::new().group(&[
            (Feedback::Chosen(None.into()), &[-1.0, -2.0, -3.0], &[-2.0, -4.0, -7.0]),
            (Feedback::Rejected(None.into()), &[-2.0], &[-1.0]),
        ])
    }

    #[test]
    fn is_a_sound_objective() {
        for params in ["{}", r#"{"beta": 2, "alpha": 0}"#, r#"{"alpha": 1}"#] {
            check::objective::<LdDpo>(params).expect_passed();
        }
    }

    #[test]
    fn the_longer_response_s_tail_counts_by_alpha() {
        for alpha in [0.0, 0.25, 1.0] {
            let seen = pair().on::<LdDpo>(&format!(r#"{{"alpha": {alpha}}}"#)).unwrap();
            let z = 0.1 * (1.0 + alpha * 6.0 + 1.0);
            let slope = -0.1 * sigmoid(-z);
            seen.expect(softplus(-z), &[slope, alpha * slope, alpha * slope, -slope]);
        }
    }

    #[test]
    fn each_pair_has_its_own_shorter_length() {
        let step = Case::new().group(&[
            (Feedback::Chosen(None.into()), &[-1.0, -1.0, -1.0], &[-1.0, -1.0, -1.0]),
            (Feedback::Rejected(None.into()), &[-2.0], &[-2.0]),
            (Feedback::Rejected(None.into()), &[-2.0, -2.0], &[-2.0, -2.0]),
        ]);
        let slope = 0.1 * 0.5 / 2.0;
        let seen = step.on::<LdDpo>("{}").unwrap();
        let chosen = [2.0, 1.5, 1.0].map(|weight| -weight * slope);
        seen.expect(
            std::f64::consts::LN_2,
            &[chosen[0], chosen[1], chosen[2], slope, slope, slope],
        );
    }

    #[test]
    fn parameters_are_checked() {
        let fault = pair().on::<LdDpo>(r#"{"alpha": 1.5}"#).unwrap_err();
        let says = "parameter `alpha` must be a number from 0 to 1, not 1.5";
        assert_eq!(fault.message.as_str(), says);
    }
}

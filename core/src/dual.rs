//! Objectives from their loss alone: the derivative comes by itself.
//!
//! A loss that reads of a response only its summed log-prob is written as a function over
//! [`Dual64`], a number that carries its derivative along (forward-mode differentiation, as in
//! Griewank and Walther, Evaluating Derivatives, chapter 3). [`Objective::evaluate`] hands it to one
//! of three methods of [`Evaluation`], by what the mean is over:
//!
//! ```
//! use uft_core::prelude::*;
//!
//! /// DPO (arXiv 2305.18290, eq. 7): `-log sigmoid(beta * (d_w - d_l))`.
//! struct Dpo { beta: f64 }
//!
//! impl Objective for Dpo {
//!     const NAME: &'static str = "dpo";
//!     const ABOUT: &'static str = "-log sigmoid(beta*(d_w - d_l))";
//!
//!     fn new(params: &mut Params) -> Self {
//!         Self { beta: params.number("beta", 0.1, Bound::Positive, "scale of the reward") }
//!     }
//!
//!     fn needs(&self) -> Needs { Needs::REFERENCE | Needs::PAIRS }
//!
//!     fn accepts(&self) -> Kinds { Kinds::PAIR }
//!
//!     fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
//!         let reward = |response: &Summed| response.log_ratio() * self.beta;
//!         out.mean_over_pairs(batch, reward, |chosen, rejected| {
//!             math::softplus(reward(rejected) - reward(chosen))
//!         });
//!         Ok(())
//!     }
//! }
//! uft_core::check::objective::<Dpo>("{}").expect_passed();
//! ```
//!
//! A number stands to the right of a dual one: `d * beta`, not `beta * d`. `x.re` is the plain
//! number, for what is not to be differentiated. The functions of [`math`](crate::math) take both.
//!
//! The three methods set the gradient of every token of the batch, so they are called once, and no
//! other gradient is written beside them. A loss of an item with K responses is evaluated K times.
//!
//! [`Objective::evaluate`]: crate::objective::Objective::evaluate

use crate::batch::{Batch, Segment};
use crate::objective::Evaluation;
use crate::sample::Kind;
pub use num_dual::{Dual64, DualNum};
use std::ops::Range;

/// A response as a loss sees it: its log-probs summed over its tokens, and its feedback.
#[derive(Clone, Copy, Debug)]
pub struct Summed<'a> {
    /// `log pi(y|x)` in nats; what a loss is differentiated by.
    pub logp: Dual64,
    ref_logp: Option<f64>,
    segment: &'a Segment,
}

impl<'a> Summed<'a> {
    fn new(batch: &Batch<'a>, segment: &'a Segment) -> Self {
        let reference = !batch.ref_logps.is_empty();
        Self {
            logp: Dual64::from_re(batch.logp(segment)),
            ref_logp: reference.then(|| batch.ref_logp(segment)),
            segment,
        }
    }

    /// `log pi_ref(y|x)` in nats.
    ///
    /// # Panics
    /// If the objective does not declare [`Needs::REFERENCE`](crate::needs::Needs::REFERENCE).
    pub fn ref_logp(&self) -> f64 {
        self.ref_logp.expect("the reference is read, so `needs` has to declare Needs::REFERENCE")
    }

    /// `log pi(y|x) - log pi_ref(y|x)` in nats; times beta this is the implicit reward (UNA, arXiv
    /// 2408.15339, eq. 6 with `f(x) = c = 0`).
    ///
    /// # Panics
    /// As [`Summed::ref_logp`].
    pub fn log_ratio(&self) -> Dual64 {
        self.logp - self.ref_logp()
    }

    /// Number of its tokens, at least 1.
    pub fn tokens(&self) -> f64 {
        f64::from(self.segment.tokens)
    }

    /// What was said of it.
    pub fn kind(&self) -> Kind {
        self.segment.kind
    }

    /// [`Feedback::value`](crate::sample::Feedback::value).
    pub fn value(&self) -> f64 {
        f64::from(self.segment.value)
    }

    /// Whether its feedback says that it is to become likelier: chosen, imitated, thumbs up, or a
    /// score above a half.
    pub fn is_desirable(&self) -> bool {
        match self.kind() {
            Kind::Chosen => true,
            Kind::Rejected => false,
            Kind::Demonstration | Kind::Score | Kind::Binary => self.value() > 0.5,
        }
    }
}

impl Evaluation<'_> {
    /// The mean of `loss` over the step's responses. Metrics: [`Evaluation::response_metrics`] of
    /// `reward`.
    pub fn mean_over_responses(
        &mut self,
        batch: &Batch,
        reward: impl Fn(&Summed) -> Dual64,
        loss: impl Fn(&Summed) -> Dual64,
    ) {
        let n = batch.step.segments as f64;
        for segment in batch.segments() {
            let (mut response, mut slope) = ([Summed::new(batch, segment)], [0.0]);
            let value = differentiate(&mut response, &mut slope, |one| loss(&one[0]));
            self.loss(value / n);
            self.gradient(segment, slope[0] / n);
            self.single(batch, &response[0], &reward);
        }
    }

    /// The mean of `loss(chosen, rejected)` over the step's pairs; a response that is in several
    /// pairs of its group collects the gradients of all of them. Metrics:
    /// [`Evaluation::pair_metrics`] of `reward`.
    pub fn mean_over_pairs(
        &mut self,
        batch: &Batch,
        reward: impl Fn(&Summed) -> Dual64,
        loss: impl Fn(&Summed, &Summed) -> Dual64,
    ) {
        let (n, segments) = (batch.step.pairs as f64, batch.segments());
        let responses: Vec<Summed> = segments.iter().map(|s| Summed::new(batch, s)).collect();
        let mut slopes = vec![0.0; segments.len()];
        for group in groups(segments) {
            let of = |kind| group.clone().filter(move |&i| segments[i].kind == kind);
            for chosen in of(Kind::Chosen) {
                for rejected in of(Kind::Rejected) {
                    let mut pair = [chosen, rejected].map(|i| responses[i]);
                    let mut slope = [0.0; 2];
                    let value =
                        differentiate(&mut pair, &mut slope, |pair| loss(&pair[0], &pair[1]));
                    self.loss(value / n);
                    slopes[chosen] += slope[0];
                    slopes[rejected] += slope[1];
                    let [won, lost] = pair.map(|response| reward(&response).re);
                    let [chosen, rejected] = [chosen, rejected].map(|i| &segments[i]);
                    self.pair_metrics(batch, (chosen, won), (rejected, lost));
                }
            }
        }
        for (segment, slope) in segments.iter().zip(slopes) {
            self.gradient(segment, slope / n);
        }
    }

    /// The mean over the step's prompts of `loss`, which gets all responses to one prompt. Metrics:
    /// [`Evaluation::response_metrics`] of `reward`.
    pub fn mean_over_groups(
        &mut self,
        batch: &Batch,
        reward: impl Fn(&Summed) -> Dual64,
        loss: impl Fn(&[Summed]) -> Dual64,
    ) {
        let (n, segments) = (batch.step.groups as f64, batch.segments());
        for group in groups(segments) {
            let segments = &segments[group];
            let mut responses: Vec<Summed> =
                segments.iter().map(|segment| Summed::new(batch, segment)).collect();
            let mut slopes = vec![0.0; segments.len()];
            let value = differentiate(&mut responses, &mut slopes, &loss);
            self.loss(value / n);
            for (response, slope) in responses.iter().zip(slopes) {
                self.gradient(response.segment, slope / n);
                self.single(batch, response, &reward);
            }
        }
    }

    fn single(&mut self, batch: &Batch, response: &Summed, reward: impl Fn(&Summed) -> Dual64) {
        let (reward, desirable) = (reward(response).re, response.is_desirable());
        self.response_metrics(batch, response.segment, reward, desirable);
    }
}

/// The loss of some responses; adds its derivative by the `logp` of each to `slopes`.
fn differentiate(
    responses: &mut [Summed],
    slopes: &mut [f64],
    loss: impl Fn(&[Summed]) -> Dual64,
) -> f64 {
    let mut value = f64::NAN;
    for k in 0..responses.len() {
        responses[k].logp.eps = 1.0;
        let at = loss(responses);
        responses[k].logp.eps = 0.0;
        slopes[k] += at.eps;
        value = at.re;
    }
    value
}

/// The groups of a batch, as ranges into its segments.
fn groups(segments: &[Segment]) -> impl Iterator<Item = Range<usize>> + '_ {
    let mut start = 0;
    segments.chunk_by(|a, b| a.group == b.group).map(move |group| {
        start += group.len();
        start - group.len()..start
    })
}

#[cfg(test)]
mod tests {
    use crate::check::{self, Case};
    use crate::prelude::*;

    const SCORE_BY_HAND: u8 = 0;
    const SCORE: u8 = 1;
    const DPO: u8 = 2;
    const INFO_NCA: u8 = 3;
    const UNDECLARED: u8 = 4;

    /// One loss of each sort; beta is a half.
    struct Example<const LOSS: u8>;

    impl<const LOSS: u8> Objective for Example<LOSS> {
        const NAME: &'static str = "example";
        const ABOUT: &'static str = "";

        fn new(_: &mut Params) -> Self {
            Self
        }

        fn needs(&self) -> Needs {
            match LOSS {
                DPO => Needs::REFERENCE | Needs::PAIRS,
                INFO_NCA => Needs::REFERENCE | Needs::GROUPS,
                UNDECLARED => Needs::NOTHING,
                _ => Needs::REFERENCE,
            }
        }

        fn accepts(&self) -> Kinds {
            if LOSS == DPO { Kinds::PAIR } else { Kinds::SCORE }
        }

        fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
            let reward = |response: &Summed| response.log_ratio() * 0.5;
            match LOSS {
                SCORE_BY_HAND => {
                    let n = batch.step.segments as f64;
                    for s in batch.segments() {
                        let (r, score) = (0.5 * batch.log_ratio(s), f64::from(s.value));
                        let (loss, slope) = math::Discrepancy::Mse.at(r, score);
                        out.loss(loss / n);
                        out.gradient(s, 0.5 * slope / n);
                        out.response_metrics(batch, s, r, score > 0.5);
                    }
                }
                DPO => out.mean_over_pairs(batch, reward, |chosen, rejected| {
                    math::softplus(reward(rejected) - reward(chosen))
                }),
                // -sum softmax(4 s)_k log softmax(r)_k (arXiv 2402.05369, eq. 8)
                INFO_NCA => out.mean_over_groups(batch, reward, |responses| {
                    let scores = responses.iter().map(|r| (4.0 * r.value()).exp()).sum::<f64>();
                    let largest =
                        responses.iter().map(|r| reward(r).re).fold(f64::NEG_INFINITY, f64::max);
                    let all = responses.iter().map(|r| (reward(r) - largest).exp()).sum::<Dual64>();
                    let log_all = all.ln() + largest;
                    let terms = responses
                        .iter()
                        .map(|r| (log_all - reward(r)) * ((4.0 * r.value()).exp() / scores));
                    terms.sum()
                }),
                _ => out.mean_over_responses(batch, reward, |response| {
                    (math::sigmoid(reward(response)) - response.value()).powi(2)
                }),
            }
            Ok(())
        }
    }

    #[test]
    fn losses_of_responses_pairs_and_groups_are_sound() {
        check::objective::<Example<SCORE>>("{}").expect_passed();
        check::objective::<Example<DPO>>("{}").expect_passed();
        check::objective::<Example<INFO_NCA>>("{}").expect_passed();
    }

    #[test]
    fn it_is_what_a_derivative_by_hand_gives() {
        let step = Case::new()
            .group(&[
                (Feedback::Score(0.75), &[-1.0, -0.5], &[-1.5, -1.0]),
                (Feedback::Score(0.25), &[-4.0], &[-1.0]),
            ])
            .group(&[(Feedback::Score(1.0), &[-2.0, -3.0], &[-2.0, -2.5])]);
        let by_hand = step.on::<Example<SCORE_BY_HAND>>("{}").unwrap();
        let seen = step.on::<Example<SCORE>>("{}").unwrap();
        let dlogp: Vec<f64> = by_hand.dlogp.iter().map(|g| f64::from(*g)).collect();
        seen.expect(by_hand.loss, &dlogp);
        assert_eq!(seen.metrics, by_hand.metrics);
    }

    #[test]
    fn a_response_in_two_pairs_collects_both_gradients_and_one_in_none_has_0() {
        let step = Case::new()
            .group(&[
                (Feedback::Chosen(None.into()), &[-1.0], &[-3.0]),
                (Feedback::Rejected(None.into()), &[-2.0], &[-1.0]),
                (Feedback::Rejected(None.into()), &[-1.0], &[-5.0]),
            ])
            .group(&[(Feedback::Chosen(None.into()), &[-1.0], &[-2.0])]);
        let slope = |z: f64| -0.5 * math::sigmoid(-z) / 2.0;
        let (first, second) = (slope(1.5), slope(-1.0));
        let loss = (math::softplus(-1.5) + math::softplus(1.0)) / 2.0;
        let seen = step.on::<Example<DPO>>("{}").unwrap();
        seen.expect(loss, &[first + second, -first, -second, 0.0]);
        assert_eq!(seen.metric("rewards/margins"), Some(0.25));
    }

    #[test]
    fn the_reference_is_there_only_if_it_is_declared() {
        let step = Case::new().group(&[(Feedback::Score(1.0), &[-1.0], &[-1.0])]);
        let fault = step.on::<Example<UNDECLARED>>("{}").unwrap_err();
        assert!(fault.message.contains("has to declare Needs::REFERENCE"), "{fault}");
    }
}

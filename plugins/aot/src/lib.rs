//! AOT: alignment by optimal transport (arXiv 2406.05882, section 3): not each chosen response against its own
//! rejected one, but the sorted chosen ones of a step against its sorted rejected ones, so that the
//! distribution of the one dominates that of the other.
//!
//! `L = mean over ranks k of -(1-e) log sigmoid(z_k) - e log sigmoid(-z_k)`, `z_k = beta * (upper_k - lower_k)`, where
//! `upper` and `lower` are, over the pairs of the optimizer step and sorted,
//!
//! | objective | upper | lower |
//! |---|---|---|
//! | `aot` | `log pi(y_w|x) - log pi(y_l|x)` | the same of the reference |
//! | `aot-unpaired` | `d_w` | `d_l`, with `d = log pi - log pi_ref` |
//!
//! TRL sorts a micro-batch; here it is the whole step, so that the loss does not depend on how a step
//! is split. With one pair in a step both are DPO, with `e = label_smoothing` cDPO. Equal values keep the
//! order of the step. The paper has no hyper-parameter beyond beta, which is that of its figure 2.

use std::marker::PhantomData;
use uft_core::batch::StepResponse;
use uft_core::math::{sigmoid, softplus};
use uft_core::prelude::*;

/// What is sorted.
trait Sides: Send + Sync + 'static {
    const NAME: &'static str;
    const ABOUT: &'static str;

    /// The upper and the lower value of a pair, in nats.
    fn of(chosen: &StepResponse, rejected: &StepResponse) -> [f64; 2];

    /// Both values' derivatives by the log-probs of the chosen and the rejected response.
    const SLOPES: [[f64; 2]; 2];
}

struct Paired;

impl Sides for Paired {
    const NAME: &'static str = "aot";
    const ABOUT: &'static str = "-log sigmoid(beta*(u_k - v_k)), u and v sorted: log pi_w - log pi_l \
        of policy and reference (AOT, arXiv 2406.05882, section 3)";

    fn of(chosen: &StepResponse, rejected: &StepResponse) -> [f64; 2] {
        let policy = chosen.logp - rejected.logp;
        [policy, policy - (chosen.log_ratio - rejected.log_ratio)]
    }

    const SLOPES: [[f64; 2]; 2] = [[1.0, -1.0], [0.0, 0.0]];
}

struct Unpaired;

impl Sides for Unpaired {
    const NAME: &'static str = "aot-unpaired";
    const ABOUT: &'static str = "-log sigmoid(beta*(u_k - v_k)), u and v sorted: d_w and d_l \
        (AOT, arXiv 2406.05882, section 3)";

    fn of(chosen: &StepResponse, rejected: &StepResponse) -> [f64; 2] {
        [chosen.log_ratio, rejected.log_ratio]
    }

    const SLOPES: [[f64; 2]; 2] = [[1.0, 0.0], [0.0, 1.0]];
}

struct Aot<S> {
    beta: f64,
    label_smoothing: f64,
    /// Loss and its derivative by the log-prob, of every response of the step.
    responses: Vec<(f64, f64)>,
    sides: PhantomData<S>,
}

impl<S: Sides> Objective for Aot<S> {
    const NAME: &'static str = S::NAME;
    const ABOUT: &'static str = S::ABOUT;

    fn new(params: &mut Params) -> Self {
        let about = "e: probability that a pair is the wrong way round";
        let probability = Bound::Within(0.0, 0.5);
        Self {
            beta: params.number("beta", 0.01, Bound::Positive, "scale of the implicit reward"),
            label_smoothing: params.number("label_smoothing", 0.0, probability, about),
            responses: Vec::new(),
            sides: PhantomData,
        }
    }

    fn needs(&self) -> Needs {
        Needs::REFERENCE | Needs::PAIRS | Needs::STEP_RESPONSES
    }

    fn accepts(&self) -> Kinds {
        Kinds::PAIR
    }

    fn begin_step(&mut self, step: &Step) -> Result<(), Fault> {
        let all = step.responses();
        let pairs = pairs(&all);
        let values = pairs.iter().map(|[chosen, rejected]| S::of(&all[*chosen], &all[*rejected]));
        let (upper, lower): (Vec<f64>, Vec<f64>) = values.map(|[u, l]| (u, l)).unzip();
        let n = pairs.len() as f64;
        self.responses = vec![(0.0, 0.0); all.len()];
        for (above, below) in sorted(&upper).into_iter().zip(sorted(&lower)) {
            let (loss, slope) = self.at(self.beta * (upper[above] - lower[below]));
            // The loss of a rank is told once, with the pair whose upper value has it.
            self.responses[pairs[above][0]].0 += loss / n;
            let by_value = self.beta * slope / n;
            for (pair, by_value, slopes) in
                [(above, by_value, S::SLOPES[0]), (below, -by_value, S::SLOPES[1])]
            {
                for (response, slope) in pairs[pair].into_iter().zip(slopes) {
                    self.responses[response].1 += by_value * slope;
                }
            }
        }
        Ok(())
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        for segment in batch.segments() {
            let (loss, slope) = self.responses[segment.in_step as usize];
            out.loss(loss);
            out.gradient(segment, slope);
        }
        for (chosen, rejected) in batch.pairs() {
            let [won, lost] = [chosen, rejected].map(|s| self.beta * batch.log_ratio(s));
            out.pair_metrics(batch, (chosen, won), (rejected, lost));
        }
        Ok(())
    }
}

impl<S> Aot<S> {
    /// Loss and its derivative by `z`.
    fn at(&self, z: f64) -> (f64, f64) {
        let e = self.label_smoothing;
        let loss = (1.0 - e) * softplus(-z) + e * softplus(z);
        (loss, e * sigmoid(z) - (1.0 - e) * sigmoid(-z))
    }
}

/// Every (chosen, rejected) of the same group, by their places in the step.
fn pairs(all: &[StepResponse]) -> Vec<[usize; 2]> {
    let mut start = 0;
    let groups = all.chunk_by(|a, b| a.group == b.group);
    let pairs = groups.flat_map(|group| {
        let first = start;
        start += group.len();
        let of = |kind| (first..first + group.len()).filter(move |i| group[i - first].kind == kind);
        of(Kind::Chosen)
            .flat_map(move |w| of(Kind::Rejected).map(move |l| [w, l]))
            .collect::<Vec<_>>()
    });
    pairs.collect()
}

/// The places of some values in rising order.
fn sorted(values: &[f64]) -> Vec<usize> {
    let mut places: Vec<usize> = (0..values.len()).collect();
    places.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    places
}

uft_core::plugin! { objectives: [Aot<Paired>, Aot<Unpaired>] }

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::{self, Case};

    const BETA: &str = r#"{"beta": 0.5}"#;

    /// Pairs of responses of one token: log-probs of policy and reference, chosen before rejected.
    fn step(pairs: &[[(f32, f32); 2]]) -> Case {
        pairs.iter().fold(Case::new(), |case, [(won, won_ref), (lost, lost_ref)]| {
            case.group(&[
                (Feedback::Chosen(None.into()), &[*won], &[*won_ref]),
                (Feedback::Rejected(None.into()), &[*lost], &[*lost_ref]),
            ])
        })
    }

    #[test]
    fn are_sound_objectives() {
        for params in ["{}", r#"{"beta": 2, "label_smoothing": 0.2}"#] {
            check::objective::<Aot<Paired>>(params).expect_passed();
            check::objective::<Aot<Unpaired>>(params).expect_passed();
        }
    }

    #[test]
    fn of_one_pair_both_are_dpo() {
        let pair = step(&[[(-1.0, -3.0), (-2.0, -1.0)]]);
        let slope = -0.5 * sigmoid(-1.5);
        pair.on::<Aot<Paired>>(BETA).unwrap().expect(softplus(-1.5), &[slope, -slope]);
        pair.on::<Aot<Unpaired>>(BETA).unwrap().expect(softplus(-1.5), &[slope, -slope]);
    }

    #[test]
    fn the_unpaired_one_compares_by_rank() {
        // d_w is 2 and -1, d_l is 1 and -3: -1 against -3 and 2 against 1.
        let two = step(&[[(-1.0, -3.0), (-1.0, -2.0)], [(-4.0, -3.0), (-5.0, -2.0)]]);
        let slope = |z: f64| -0.5 * sigmoid(-z) / 2.0;
        let (low, high) = (slope(1.0), slope(0.5));
        let seen = two.on::<Aot<Unpaired>>(BETA).unwrap();
        seen.expect((softplus(-1.0) + softplus(-0.5)) / 2.0, &[high, -high, low, -low]);
    }

    #[test]
    fn the_paired_one_sorts_margins_of_policy_and_reference() {
        // Margins of the policy: 0 and 3, of the reference: 1 and -2, matched 0 with -2 and 3 with 1.
        let two = step(&[[(-1.0, -1.0), (-1.0, -2.0)], [(-1.0, -4.0), (-4.0, -2.0)]]);
        let slope = -0.5 * sigmoid(-1.0) / 2.0;
        let seen = two.on::<Aot<Paired>>(BETA).unwrap();
        seen.expect(softplus(-1.0), &[slope, -slope, slope, -slope]);
    }

    #[test]
    fn parameters_are_checked() {
        let fault = step(&[]).on::<Aot<Paired>>(r#"{"label_smoothing": 1}"#).unwrap_err();
        let says = "parameter `label_smoothing` must be a number from 0 to 0.5, not 1";
        assert_eq!(fault.message.as_str(), says);
    }
}

//! What an objective sees: the log-probs of trained tokens, and segments that say what feedback
//! each response got.

use crate::sample::Kind;
use abi_stable::{
    StableAbi,
    std_types::{RSlice, RVec},
};

/// A response inside a batch: a range of trained tokens with its feedback.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq)]
pub struct Segment {
    /// Equal for the responses to one prompt, unique within the step.
    pub group: u32,
    /// Position of this segment among all of the objective's segments of the step; the index into
    /// [`Step::log_ratios`].
    pub in_step: u32,
    /// First of its tokens in [`Batch::logps`].
    pub start: u32,
    /// Number of its tokens, at least 1.
    pub tokens: u32,
    /// What was said of the response.
    pub kind: Kind,
    /// [`Feedback::value`](crate::sample::Feedback::value).
    pub value: f32,
}

impl Segment {
    /// The segment's tokens as a range into [`Batch::logps`].
    pub fn range(&self) -> std::ops::Range<usize> {
        self.start as usize..(self.start + self.tokens) as usize
    }
}

/// Totals of one objective over the whole optimizer step. An objective divides by these and never
/// by a micro-batch's counts, so that the gradient does not depend on how a step is split.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Optimizer step, from 0.
    pub number: u64,
    /// Optimizer steps planned in all.
    pub steps: u64,
    /// False in evaluation: state must not change.
    pub training: bool,
    /// Prompts with their responses.
    pub groups: u64,
    /// Responses.
    pub segments: u64,
    /// Pairs of a chosen and a rejected response of the same group.
    pub pairs: u64,
    /// Trained tokens.
    pub tokens: u64,
    /// Segments of each kind, in the order of [`Kind::ALL`].
    pub by_kind: [u64; 5],
    /// With [`Needs::STEP_LOG_RATIOS`](crate::needs::Needs::STEP_LOG_RATIOS): `log pi - log
    /// pi_ref` of every segment of the step, in nats; otherwise empty. With
    /// [`Needs::STEP_RESPONSES`](crate::needs::Needs::STEP_RESPONSES) what [`Step::responses`]
    /// reads follows.
    pub log_ratios: RSlice<'a, f64>,
    /// With [`Needs::MISMATCHED`](crate::needs::Needs::MISMATCHED): `log pi - log pi_ref` of
    /// every segment's prompt with a completion of the group before it; otherwise empty.
    pub mismatched: RSlice<'a, f64>,
}

impl Step<'_> {
    /// Every response of the step, by [`Segment::in_step`]; none without
    /// [`Needs::STEP_RESPONSES`](crate::needs::Needs::STEP_RESPONSES).
    pub fn responses(&self) -> Vec<StepResponse> {
        let n = self.segments as usize;
        let columns: Vec<&[f64]> = self.log_ratios.as_slice().chunks(n.max(1)).collect();
        let &[log_ratios, logps, kinds, groups] = columns.as_slice() else { return Vec::new() };
        let response = |i: usize| StepResponse {
            group: groups[i] as u32,
            kind: Kind::ALL[kinds[i] as usize],
            logp: logps[i],
            log_ratio: log_ratios[i],
        };
        (0..n).map(response).collect()
    }
}

/// A response of the step, whatever batch it is in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepResponse {
    /// [`Segment::group`].
    pub group: u32,
    /// [`Segment::kind`].
    pub kind: Kind,
    /// `log pi(y|x)` in nats.
    pub logp: f64,
    /// `log pi(y|x) - log pi_ref(y|x)` in nats.
    pub log_ratio: f64,
}

impl StepResponse {
    /// Numbers of a response in [`Step::log_ratios`], whose type is frozen.
    pub const COLUMNS: usize = 4;

    /// Puts a response of `n` at its place in [`Step::log_ratios`]: all log-ratios come first, then, if
    /// there is room for them, all log-probs, kinds and groups as numbers.
    pub fn put(&self, log_ratios: &mut [f64], n: usize, place: usize) {
        let numbers = [self.log_ratio, self.logp, f64::from(self.kind as u8), self.group.into()];
        for (column, number) in log_ratios.chunks_mut(n).zip(numbers) {
            column[place] = number;
        }
    }
}

/// The part of a step that one call of [`Objective::evaluate`](crate::objective::Objective) sees.
/// Groups are never split between batches.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The step that the batch is a part of.
    pub step: Step<'a>,
    /// See [`Batch::segments`].
    pub segment_list: RSlice<'a, Segment>,
    /// Log-probs of the policy for every trained token, segment after segment, in nats.
    pub logps: RSlice<'a, f32>,
    /// The same of the reference; empty if the objective does not need one.
    pub ref_logps: RSlice<'a, f32>,
}

impl<'a> Batch<'a> {
    /// The responses of this batch; those to one prompt are neighbours.
    pub fn segments(&self) -> &'a [Segment] {
        self.segment_list.as_slice()
    }

    /// `log pi(y|x)` of a response: the sum over its tokens, in nats.
    pub fn logp(&self, segment: &Segment) -> f64 {
        sum(&self.logps[segment.range()])
    }

    /// `log pi_ref(y|x)` of a response.
    pub fn ref_logp(&self, segment: &Segment) -> f64 {
        sum(&self.ref_logps[segment.range()])
    }

    /// `log pi(y|x) - log pi_ref(y|x)` of a response, in nats; times beta this is the implicit
    /// reward (UNA, arXiv 2408.15339, eq. 6 with `f(x) = c = 0`).
    pub fn log_ratio(&self, segment: &Segment) -> f64 {
        self.logp(segment) - self.ref_logp(segment)
    }

    /// Every pair of a chosen and a rejected response to the same prompt.
    pub fn pairs(&self) -> impl Iterator<Item = (&'a Segment, &'a Segment)> + use<'a> {
        pairs(self.segments())
    }
}

/// Every (chosen, rejected) pair of the same group; a group's segments are neighbours.
pub fn pairs(segments: &[Segment]) -> impl Iterator<Item = (&Segment, &Segment)> {
    segments.chunk_by(|a, b| a.group == b.group).flat_map(|group| {
        group.iter().filter(|s| s.kind == Kind::Chosen).flat_map(move |chosen| {
            let rejected = group.iter().filter(|s| s.kind == Kind::Rejected);
            rejected.map(move |rejected| (chosen, rejected))
        })
    })
}

fn sum(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v)).sum()
}

/// A named number, averaged by the host over batches and sources as `sum / count`.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq)]
pub struct Metric {
    /// As it appears in `metrics.jsonl`.
    pub name: abi_stable::std_types::RString,
    /// Sum of the observations.
    pub sum: f64,
    /// Number of the observations.
    pub count: f64,
}

/// What an evaluation gives back besides the gradient.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The batch's share of the step's loss.
    pub loss: f64,
    /// The batch's share of the step's metrics.
    pub metrics: RVec<Metric>,
}

#[cfg(test)]
mod tests {
    use crate::check::Case;
    use crate::needs::Needs;
    use crate::sample::{Feedback, Kind};

    #[test]
    fn the_responses_of_a_step_stand_behind_its_log_ratios() {
        let case = Case::new()
            .group(&[
                (Feedback::Rejected(None.into()), &[-2.0], &[-1.5]),
                (Feedback::Chosen(None.into()), &[-1.0, -0.5], &[-2.0, -1.0]),
            ])
            .group(&[(Feedback::Score(0.25), &[-4.0], &[-4.0])]);
        let step = case.step(Needs::STEP_RESPONSES.complete());
        let responses = step.responses();
        let seen: Vec<_> =
            responses.iter().map(|r| (r.group, r.kind, r.logp, r.log_ratio)).collect();
        let expected = [
            (0, Kind::Rejected, -2.0, -0.5),
            (0, Kind::Chosen, -1.5, 1.5),
            (1, Kind::Score, -4.0, 0.0),
        ];
        assert_eq!(seen, expected);
        assert_eq!(step.log_ratios[..3], case.log_ratios);
        // One that asks for less sees less.
        let step = case.step(Needs::STEP_LOG_RATIOS.complete());
        assert_eq!(step.log_ratios.as_slice(), case.log_ratios);
        assert!(step.responses().is_empty());
    }
}

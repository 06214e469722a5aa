//! One pass over rows: log-probs, objectives, and the gradient if it is a training step. Training,
//! evaluation, `grad` and `check` all go through here.

use super::metrics::Metrics;
use super::micro;
use super::plan::{At, Plan, Planned, Rows};
use super::reference::ReferenceLogps;
use super::reference_pass::{self, Wanted};
use super::statistics::{self, Mismatched, Statistics};
use crate::config::{Gain, Mixing};
use crate::data::{Example, Item, Source};
use crate::group::Group;
use crate::model::{Adapters, Gradients, Model, Packed};
use crate::{Error, Result};
use std::ops::Range;
use std::time::{Duration, Instant};
use uft_core::batch::{Batch, Segment};

/// What a pass computes with.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    pub model: &'a Model,
    pub policy: &'a Adapters,
    /// The reference's adapter; none is the base model.
    pub reference: Option<&'a Adapters>,
    pub micro_tokens: usize,
    /// The same for the reference's log-probs, which keep nothing for a way back.
    pub reference_tokens: usize,
    /// What is switched off.
    pub without: &'a [Gain],
    pub mixing: Mixing,
    pub at: At,
    /// Rows that meet in this step meet again in a later one, so what is computed of them together is worth
    /// keeping.
    pub steps_repeat: bool,
    /// Policy and reference are the same function, so every log-ratio must be exactly 0; anything
    /// else is a fault of ours and stops the run.
    pub identical: bool,
}

/// What a pass gives besides the gradient.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The weighted sum of the sources' losses.
    pub loss: f64,
    /// The gradient's norm, before clipping; 0 without a gradient.
    pub grad_norm: f64,
    pub metrics: Metrics,
    /// Rows that went through the policy: every prompt once, and the responses.
    pub tokens: u64,
    /// Trained tokens.
    pub trained: u64,
    /// Time for the objectives: building what they see, their calls, checking what comes back.
    pub objectives: Duration,
}

impl Pass<'_> {
    /// Goes over `items`, with reference log-probs from `known`, which gets those that it lacks; with
    /// `grads`, adds the gradient of the loss to it.
    ///
    /// # Errors
    /// If an objective fails, anything is not finite, or a signal arrives; `grads` is then of no use.
    pub fn run(
        &self,
        sources: &mut [Source],
        rows: Rows,
        items: &[Item],
        known: &mut ReferenceLogps,
        mut grads: Option<&mut Gradients>,
    ) -> Result<Outcome> {
        let enough = micro::enough(self.model.config().hidden, self.model.is_on_gpu());
        let mut plan = Plan::new(sources, rows, items, self.micro_tokens, enough, self.without);
        let mut mismatched = statistics::mismatched(sources, rows, &plan);
        self.reference_logps(sources, rows, &mut plan, &mut mismatched, known)?;
        let (statistics, mut early) =
            self.statistics(sources, rows, &plan, &mismatched, grads.is_some())?;
        let begun = Instant::now();
        for source in plan.sources() {
            let step = statistics.step(&plan, source, self.at);
            let Source { objective, name, .. } = &mut sources[source];
            let of_source = plan.segments_of(source);
            objective
                .begin_step(&step, &of_source)
                .map_err(|e| e.at(format!("source `{name}`")))?;
        }
        let mut outcome = Outcome {
            tokens: plan.rows(),
            trained: plan.totals.iter().map(|t| t.tokens).sum(),
            objectives: begun.elapsed(),
            ..Outcome::default()
        };
        // The one whose tape is held goes first.
        let first = early.as_ref().map(|early| early.batch);
        let others = (0..plan.micro_batches.len()).filter(|batch| Some(*batch) != first);
        for index in first.into_iter().chain(others) {
            let batch = &plan.micro_batches[index];
            let packed = || self.pack(&groups(sources, rows, &plan, batch));
            let (tape, logps) = match (&grads, early.take()) {
                (Some(_), Some(early)) => (Some(early.tape), None),
                (Some(_), None) => (Some(self.model.forward(packed(), self.policy)?), None),
                (None, _) => (None, Some(self.model.logps(&packed(), Some(self.policy))?)),
            };
            let logps = match (&tape, &logps) {
                (Some(tape), _) => tape.logps(),
                (None, logps) => logps.as_deref().unwrap_or_default(),
            };
            let begun = Instant::now();
            let dlogps =
                self.objectives(sources, rows, &plan, batch, logps, &statistics, &mut outcome)?;
            outcome.objectives += begun.elapsed();
            if let (Some(tape), Some(grads)) = (tape, grads.as_deref_mut()) {
                self.model.backward(tape, &dlogps, self.policy, grads)?;
                grads.take_norm(index as u32 + 1)?;
            }
        }
        if let Some(grads) = grads {
            let (norm, first) = grads.norm()?;
            if let Some(number) = first {
                let batch = &plan.micro_batches[number as usize - 1];
                let batch: Vec<Item> = batch.iter().map(|&g| plan.groups[g].item).collect();
                return Err(Error::non_finite(format!(
                    "the gradient is not finite after {}; is the learning rate or a weight too high?",
                    places(sources, rows, &batch)
                )));
            }
            outcome.grad_norm = norm;
        }
        Ok(outcome)
    }

    /// Lays groups out as a micro-batch.
    pub(super) fn pack(&self, groups: &[&Group]) -> Packed {
        match self.without.contains(&Gain::SharedPrompts) {
            true => Packed::with_prompt_copies(groups),
            false => Packed::new(groups),
        }
    }

    /// The reference log-probs of the plan's groups and of every source's mismatched ones, which get them: a
    /// row's own next to those with its prompt.
    fn reference_logps(
        &self,
        sources: &[Source],
        rows: Rows,
        plan: &mut Plan,
        mismatched: &mut [Mismatched],
        known: &mut ReferenceLogps,
    ) -> Result<()> {
        let (mut wanted, mut of) = (Vec::new(), Vec::new());
        let mut left: Vec<_> = mismatched.iter().map(|m| m.groups.iter()).collect();
        for (index, planned) in plan.groups.iter().enumerate() {
            let source = planned.item.source;
            if !sources[source].needs_reference() {
                continue;
            }
            let Example { group, origin } = &sources[source].rows(rows)[planned.item.row];
            wanted.push(Wanted { group, origin, again: true });
            of.push((source, Some(index)));
            for group in left[source].by_ref().take(planned.segments.len()) {
                wanted.push(Wanted { group, origin, again: self.steps_repeat });
                of.push((source, None));
            }
        }
        let found = reference_pass::logps(self, &wanted, known)?;
        for (logps, (source, own)) in found.into_iter().zip(of) {
            match own {
                Some(index) => plan.groups[index].ref_logps = Some(logps),
                None => mismatched[source].ref_logps.push(logps),
            }
        }
        Ok(())
    }

    /// Evaluates every objective of a micro-batch; the gradient comes back in the order of `logps`.
    fn objectives(
        &self,
        sources: &[Source],
        rows: Rows,
        plan: &Plan,
        batch: &[usize],
        logps: &[f32],
        statistics: &Statistics,
        outcome: &mut Outcome,
    ) -> Result<Vec<f32>> {
        finite(logps, "policy", sources, rows, plan, batch)?;
        let mut dlogps = vec![0.0; logps.len()];
        for (source_index, members, tokens) in stretches(plan, batch) {
            let source = &sources[source_index];
            let segments = segments(plan, members);
            let ref_logps = collect_ref_logps(source, plan, members);
            if self.identical && source.needs_reference() && logps[tokens.clone()] != ref_logps[..]
            {
                return Err(Error::other(format!(
                    "source `{}`: the adapter is new, yet policy and reference differ; remove the files in [train] \
                     reference_cache and try again; if it stays so, this is a bug of uft",
                    source.name
                )));
            }
            let view = Batch {
                step: statistics.step(plan, source_index, self.at),
                segment_list: segments.as_slice().into(),
                logps: logps[tokens.clone()].into(),
                ref_logps: ref_logps.as_slice().into(),
            };
            let dlogp = &mut dlogps[tokens];
            let evaluated = source.objective.evaluate(&view, dlogp).map_err(|e| {
                let places: Vec<String> = members
                    .iter()
                    .take(4)
                    .map(|&g| source.rows(rows)[plan.groups[g].item.row].origin.to_string())
                    .collect();
                e.at(format!("source `{}`, rows {}", source.name, places.join(", ")))
            })?;
            let scale = self.scale(sources, plan, source_index);
            dlogp.iter_mut().for_each(|g| *g *= scale as f32);
            outcome.loss += scale * evaluated.loss;
            outcome.metrics.add_loss(&source.name, evaluated.loss);
            for metric in &evaluated.metrics {
                outcome.metrics.add(&source.name, metric);
            }
        }
        Ok(dlogps)
    }

    /// Factor of a source's loss in the step's.
    fn scale(&self, sources: &[Source], plan: &Plan, index: usize) -> f64 {
        let source = &sources[index];
        source.weight
            * match self.mixing {
                Mixing::Sources => 1.0,
                Mixing::Items => {
                    let all: u64 = plan.sources().map(|s| plan.items(&sources[s], s)).sum();
                    plan.items(source, index) as f64 / all as f64
                }
            }
    }
}

/// The groups of a micro-batch in packing order.
pub(super) fn groups<'s>(
    sources: &'s [Source],
    rows: Rows,
    plan: &Plan,
    batch: &[usize],
) -> Vec<&'s Group> {
    let item = |&g: &usize| plan.groups[g].item;
    batch.iter().map(item).map(|i| &sources[i.source].rows(rows)[i.row].group).collect()
}

/// A micro-batch's stretches of equal source: the source, its groups, its tokens in the log-probs.
pub(super) fn stretches<'b>(
    plan: &Plan,
    batch: &'b [usize],
) -> impl Iterator<Item = (usize, &'b [usize], Range<usize>)> {
    let source = |g: usize| plan.groups[g].item.source;
    let mut start = 0;
    batch.chunk_by(move |&a, &b| source(a) == source(b)).map(move |members| {
        let tokens: usize = members.iter().map(|&g| plan.groups[g].tokens).sum();
        start += tokens;
        (source(members[0]), members, start - tokens..start)
    })
}

/// The segments of neighbouring groups, with `start` counted from the first group's first token.
pub(super) fn segments(plan: &Plan, members: &[usize]) -> Vec<Segment> {
    let mut start = 0;
    let mut out = Vec::new();
    for &g in members {
        let group = &plan.groups[g];
        out.extend(group.segments.iter().map(|s| Segment { start: s.start + start, ..*s }));
        start += group.tokens as u32;
    }
    out
}

/// Reference log-probs of neighbouring groups; empty if the objective reads none.
pub(super) fn collect_ref_logps(source: &Source, plan: &Plan, members: &[usize]) -> Vec<f32> {
    if !source.needs_reference() {
        return Vec::new();
    }
    let known = |&g: &usize| plan.groups[g].ref_logps.as_deref().expect("computed before");
    members.iter().flat_map(known).copied().collect()
}

/// The files and lines of some rows.
fn places(sources: &[Source], rows: Rows, items: &[Item]) -> String {
    let place = |i: &Item| sources[i.source].rows(rows)[i.row].origin.to_string();
    items.iter().map(place).collect::<Vec<_>>().join(", ")
}

/// Stops with the rows whose log-probs are not finite.
pub(super) fn finite(
    logps: &[f32],
    whose: &str,
    sources: &[Source],
    rows: Rows,
    plan: &Plan,
    batch: &[usize],
) -> Result<()> {
    if logps.iter().all(|p| p.is_finite()) {
        return Ok(());
    }
    let mut start = 0;
    let mut bad = Vec::new();
    for &g in batch {
        let Planned { item, tokens, .. } = &plan.groups[g];
        if logps[start..start + tokens].iter().any(|p| !p.is_finite()) {
            bad.push(sources[item.source].rows(rows)[item.row].origin.to_string());
        }
        start += tokens;
    }
    Err(not_finite(whose, &bad))
}

/// Log-probs of some rows that are no numbers.
pub(super) fn not_finite(whose: &str, places: &[String]) -> Error {
    Error::non_finite(format!(
        "log-probs of the {whose} are not finite in {}; is the model whole, is the learning rate too high?",
        places.join(", ")
    ))
}

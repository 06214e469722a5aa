//! What objectives need of the whole step before their first batch: the log-ratio of every response, and of
//! mismatched completions.
//!
//! Both take a forward pass of the policy. For one of the micro-batches it is the one that its way back needs
//! anyhow: it is done early, with the mismatched completions beside it, which share its prompts.

use super::mismatched;
use super::pass::{Pass, collect_ref_logps, finite, groups, segments, stretches};
use super::plan::{At, Plan, Rows};
use crate::config::Gain;
use crate::data::Source;
use crate::group::Group;
use crate::model::{Packed, Tape, packed::WithOthers};
use crate::{Error, Result};
use uft_core::Needs;
use uft_core::batch::{Step, StepResponse};

/// A forward pass of others beside a batch may take so many times the rows of a micro-batch: only one block's
/// activations are held of all of them.
pub const WIDEST: usize = 2;

/// Numbers over the whole step, by source (see [`Step`]).
pub struct Statistics {
    log_ratios: Vec<Vec<f64>>,
    mismatched: Vec<Vec<f64>>,
}

impl Statistics {
    pub fn step(&self, plan: &Plan, source: usize, at: At) -> Step<'_> {
        plan.totals[source].step(at, &self.log_ratios[source], &self.mismatched[source])
    }
}

/// A source's mismatched completions: one per response, in the order of the plan.
#[derive(Default)]
pub struct Mismatched {
    pub groups: Vec<Group>,
    pub ref_logps: Vec<Box<[f32]>>,
}

/// The forward pass of a micro-batch, done before its turn.
pub struct Early {
    /// Index among the micro-batches.
    pub batch: usize,
    pub tape: Tape,
}

/// One of a source's mismatched completions, next to the group of a micro-batch whose prompt it continues.
pub struct Beside {
    source: usize,
    /// In the source's.
    index: usize,
    /// Place in the micro-batch.
    group: usize,
}

impl Pass<'_> {
    /// The statistics of the step and, if it has a way back, the forward pass of one of its micro-batches.
    pub(super) fn statistics(
        &self,
        sources: &[Source],
        rows: Rows,
        plan: &Plan,
        mismatched: &[Mismatched],
        way_back: bool,
    ) -> Result<(Statistics, Option<Early>)> {
        let mut statistics = Statistics {
            log_ratios: (0..sources.len())
                .map(|index| {
                    let needs = |need| sources[index].objective.needs(need);
                    let columns = match needs(Needs::STEP_LOG_RATIOS) {
                        true if needs(Needs::STEP_RESPONSES) => StepResponse::COLUMNS,
                        true => 1,
                        false => 0,
                    };
                    vec![0.0; columns * plan.totals[index].segments as usize]
                })
                .collect(),
            mismatched: mismatched.iter().map(|m| vec![0.0; m.groups.len()]).collect(),
        };
        let wanted = |batch: &Vec<usize>, of: &[Vec<f64>]| {
            stretches(plan, batch).any(|(source, ..)| !of[source].is_empty())
        };
        let early = early(sources, plan).filter(|_| way_back);
        let room = WIDEST * self.micro_tokens;
        let beside = early.map_or_else(Vec::new, |batch| {
            let batch = &plan.micro_batches[batch];
            beside(sources, rows, plan, batch, mismatched, room, self.without)
        });

        for (index, of) in mismatched.iter().enumerate() {
            let apart: Vec<usize> = (0..of.groups.len())
                .filter(|i| !beside.iter().any(|b| (b.source, b.index) == (index, *i)))
                .collect();
            let ratios = mismatched::log_ratios(self, of, &apart)?;
            for (at, ratio) in apart.into_iter().zip(ratios) {
                statistics.mismatched[index][at] = ratio;
            }
        }
        for (index, batch) in plan.micro_batches.iter().enumerate() {
            if early != Some(index) && wanted(batch, &statistics.log_ratios) {
                let packed = self.pack(&groups(sources, rows, plan, batch));
                let logps = self.model.logps(&packed, Some(self.policy))?;
                statistics.add_log_ratios(sources, rows, plan, batch, &logps)?;
            }
        }
        let early = match early {
            None => None,
            Some(batch) => {
                let members = groups(sources, rows, plan, &plan.micro_batches[batch]);
                let (tape, of_others) = self.early(&members, mismatched, &beside)?;
                for (beside, ratio) in beside.iter().zip(of_others) {
                    statistics.mismatched[beside.source][beside.index] = ratio;
                }
                let members = &plan.micro_batches[batch];
                statistics.add_log_ratios(sources, rows, plan, members, tape.logps())?;
                Some(Early { batch, tape })
            }
        };
        statistics.check_mismatched(sources, rows, plan)?;
        Ok((statistics, early))
    }

    /// The forward pass of a micro-batch, and the log-ratios of what goes beside it.
    fn early(
        &self,
        members: &[&Group],
        mismatched: &[Mismatched],
        beside: &[Beside],
    ) -> Result<(Tape, Vec<f64>)> {
        if beside.is_empty() {
            let packed = self.pack(members);
            return Ok((self.model.forward(packed, self.policy)?, Vec::new()));
        }
        let batch = with_others(members, mismatched, beside);
        let (tape, logps) = self.model.forward_with_others(batch, self.policy)?;
        let mut rest = logps.as_slice();
        let ratios = beside.iter().map(|b| {
            let reference = &mismatched[b.source].ref_logps[b.index];
            let (own, after) = rest.split_at(reference.len());
            rest = after;
            mismatched::log_ratio(own, reference)
        });
        let ratios = ratios.collect();
        Ok((tape, ratios))
    }
}

/// Every source's mismatched completions, where its objective needs them.
pub fn mismatched(sources: &[Source], rows: Rows, plan: &Plan) -> Vec<Mismatched> {
    let of = |(index, source): (usize, &Source)| match source.objective.needs(Needs::MISMATCHED) {
        true => mismatched::of(source, index, rows, plan),
        false => Mismatched::default(),
    };
    sources.iter().enumerate().map(of).collect()
}

/// The micro-batch whose forward pass is done early: the first that statistics are wanted of.
pub fn early(sources: &[Source], plan: &Plan) -> Option<usize> {
    let wanted = |source: usize| sources[source].needs_statistics();
    let any = |batch: &Vec<usize>| stretches(plan, batch).any(|(source, ..)| wanted(source));
    plan.micro_batches.iter().position(any)
}

/// The mismatched completions that go beside a micro-batch: those that continue the prompt of one of its
/// groups, and read nothing of it that the group does not read (see [`Packed::with_others`]), while all together have at most `room` rows.
pub fn beside(
    sources: &[Source],
    rows: Rows,
    plan: &Plan,
    batch: &[usize],
    mismatched: &[Mismatched],
    room: usize,
    without: &[Gain],
) -> Vec<Beside> {
    if without.contains(&Gain::SharedPrompts) {
        return Vec::new();
    }
    let mut room = room.saturating_sub(batch.iter().map(|&g| plan.groups[g].rows).sum());
    let mut next = vec![0; sources.len()];
    let mut beside = Vec::new();
    for (planned, own) in plan.groups.iter().enumerate() {
        let (item, responses) = (own.item, own.segments.len());
        let source = item.source;
        if mismatched[source].groups.is_empty() {
            continue;
        }
        let of_group = next[source]..next[source] + responses;
        next[source] = of_group.end;
        let Some(group) = batch.iter().position(|&g| g == planned) else { continue };
        let own = &sources[source].rows(rows)[item.row].group;
        for index in of_group {
            let other = &mismatched[source].groups[index];
            let load = other.rows() - other.prompt.len();
            let joins = other.prompt == own.prompt && (own.reads_prompt() || !other.reads_prompt());
            if joins && load <= room {
                room -= load;
                beside.push(Beside { source, index, group });
            }
        }
    }
    // In the order of the batch, as their log-probs are.
    beside.sort_by_key(|b| b.group);
    beside
}

/// A micro-batch's groups laid out with what goes beside them.
pub fn with_others(members: &[&Group], mismatched: &[Mismatched], beside: &[Beside]) -> WithOthers {
    let other = |b: &Beside| (b.group, &mismatched[b.source].groups[b.index]);
    Packed::with_others(members, &beside.iter().map(other).collect::<Vec<_>>())
}

impl Statistics {
    /// The log-ratios of a micro-batch's responses, for the sources that need them.
    fn add_log_ratios(
        &mut self,
        sources: &[Source],
        rows: Rows,
        plan: &Plan,
        batch: &[usize],
        logps: &[f32],
    ) -> Result<()> {
        finite(logps, "policy", sources, rows, plan, batch)?;
        for (index, members, tokens) in stretches(plan, batch) {
            let ratios = &mut self.log_ratios[index];
            if ratios.is_empty() {
                continue;
            }
            let ref_logps = collect_ref_logps(&sources[index], plan, members);
            for segment in segments(plan, members) {
                let sum = |values: &[f32]| values.iter().map(|&v| f64::from(v)).sum::<f64>();
                let policy = sum(&logps[tokens.clone()][segment.range()]);
                let reference =
                    if ref_logps.is_empty() { 0.0 } else { sum(&ref_logps[segment.range()]) };
                let response = StepResponse {
                    group: segment.group,
                    kind: segment.kind,
                    logp: policy,
                    log_ratio: policy - reference,
                };
                let n = plan.totals[index].segments as usize;
                response.put(ratios, n, segment.in_step as usize);
            }
        }
        Ok(())
    }

    /// Stops with the row whose mismatched completion has log-probs that are no numbers.
    fn check_mismatched(&self, sources: &[Source], rows: Rows, plan: &Plan) -> Result<()> {
        for (index, ratios) in self.mismatched.iter().enumerate() {
            // One per response, in the order of the plan.
            let own = plan.groups.iter().filter(|g| g.item.source == index);
            let places = own.flat_map(|g| g.segments.iter().map(move |_| g.item.row));
            if let Some((_, row)) = ratios.iter().zip(places).find(|(r, _)| !r.is_finite()) {
                return Err(Error::non_finite(format!(
                    "log-probs of a mismatched completion to the prompt of {} are not finite; is the model whole, is \
                     the learning rate too high?",
                    sources[index].rows(rows)[row].origin
                )));
            }
        }
        Ok(())
    }
}

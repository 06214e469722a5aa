//! The plan of a pass: every segment numbered, every total known before the first log-prob.

use super::micro;
use crate::config::Gain;
use crate::data::{Example, Item, Source};
use uft_core::batch::{Segment, Step, pairs};
use uft_core::{Kind, Needs};

/// Which rows of the sources a pass goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    Train,
    HeldOut,
}

impl Source {
    pub fn rows(&self, rows: Rows) -> &[Example] {
        match rows {
            Rows::Train => &self.train,
            Rows::HeldOut => &self.held_out,
        }
    }
}

/// Totals of one source over the pass (see [`Step`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub groups: u64,
    pub segments: u64,
    pub pairs: u64,
    pub tokens: u64,
    pub by_kind: [u64; 5],
}

/// One group of the pass.
#[derive(Clone, Debug)]
pub struct Planned {
    pub item: Item,
    /// Rows in a packed batch where prompts are shared.
    pub rows: usize,
    /// Its segments; `start` counts from the group's first trained token.
    pub segments: Vec<Segment>,
    /// Trained tokens.
    pub tokens: usize,
    /// Reference log-probs of the trained tokens, once they are known.
    pub ref_logps: Option<Box<[f32]>>,
}

/// All groups of a pass, the totals of every source, and the micro-batches.
pub struct Plan {
    pub groups: Vec<Planned>,
    /// By source, for all sources of the run; zero where a source is not in the pass.
    pub totals: Vec<Totals>,
    /// Indices into `groups`, sorted by source so that a source's tokens are one stretch.
    pub micro_batches: Vec<Vec<usize>>,
}

impl Plan {
    /// `micro_tokens` as configured, `enough`: as [`micro::enough`].
    pub fn new(
        sources: &[Source],
        rows: Rows,
        items: &[Item],
        micro_tokens: usize,
        enough: usize,
        without: &[Gain],
    ) -> Self {
        let mut totals = vec![Totals::default(); sources.len()];
        let mut groups = Vec::with_capacity(items.len());
        for (index, &item) in items.iter().enumerate() {
            let Example { group, .. } = &sources[item.source].rows(rows)[item.row];
            let total = &mut totals[item.source];
            let (mut segments, mut start) = (Vec::new(), 0);
            for segment in group.segments() {
                let tokens = segment.tokens() as u32;
                let kind = segment.feedback.kind();
                segments.push(Segment {
                    group: index as u32,
                    in_step: total.segments as u32,
                    start,
                    tokens,
                    kind,
                    value: segment.feedback.value(),
                });
                total.segments += 1;
                total.tokens += u64::from(tokens);
                let place = Kind::ALL.iter().position(|k| *k == kind).expect("ALL has every kind");
                total.by_kind[place] += 1;
                start += tokens;
            }
            total.groups += 1;
            total.pairs += pairs(&segments).count() as u64;
            groups.push(Planned {
                item,
                rows: group.rows(),
                segments,
                tokens: start as usize,
                ref_logps: None,
            });
        }
        let copies = without.contains(&Gain::SharedPrompts);
        let load = |g: &Planned| match copies {
            true => sources[g.item.source].rows(rows)[g.item.row].group.rows_alone(),
            false => g.rows,
        };
        let loads: Vec<usize> = groups.iter().map(load).collect();
        let limit = micro::limit(sources, items, micro_tokens, enough);
        let mut micro_batches = micro::split(&loads, limit, without);
        for batch in &mut micro_batches {
            batch.sort_by_key(|&g| groups[g].item.source);
        }
        Self { groups, totals, micro_batches }
    }

    /// The sources that are in the pass.
    pub fn sources(&self) -> impl Iterator<Item = usize> {
        self.totals.iter().enumerate().filter(|(_, t)| t.segments > 0).map(|(source, _)| source)
    }

    /// Every segment of a source, in the order of its place in the step.
    pub fn segments_of(&self, source: usize) -> Vec<Segment> {
        let own = self.groups.iter().filter(|group| group.item.source == source);
        own.flat_map(|group| group.segments.iter().copied()).collect()
    }

    /// Items that a source's mean is over: pairs for objectives on pairs, responses otherwise.
    pub fn items(&self, source: &Source, index: usize) -> u64 {
        let totals = &self.totals[index];
        if source.objective.needs(Needs::PAIRS) { totals.pairs } else { totals.segments }
    }

    /// Rows of all groups, each prompt once.
    pub fn rows(&self) -> u64 {
        self.groups.iter().map(|g| g.rows as u64).sum()
    }
}

impl Totals {
    /// The step as an objective sees it.
    pub fn step<'a>(&self, at: At, log_ratios: &'a [f64], mismatched: &'a [f64]) -> Step<'a> {
        Step {
            number: at.number,
            steps: at.steps,
            training: at.training,
            groups: self.groups,
            segments: self.segments,
            pairs: self.pairs,
            tokens: self.tokens,
            by_kind: self.by_kind,
            log_ratios: log_ratios.into(),
            mismatched: mismatched.into(),
        }
    }
}

/// Where in the run a pass stands.
#[derive(Clone, Copy, Debug)]
pub struct At {
    pub number: u64,
    pub steps: u64,
    pub training: bool,
}

//! The responses of a step that one objective of a sum takes, renumbered as if there were no others.

use std::ops::Range;
use uft_core::Kinds;
use uft_core::batch::{Batch, Segment, Step, pairs};

/// The part of a step that has feedback of some kinds.
pub struct Selection {
    /// Place in the step → place among the selected ones.
    places: Vec<Option<u32>>,
    groups: u64,
    segments: u64,
    pairs: u64,
    tokens: u64,
    by_kind: [u64; 5],
    log_ratios: Vec<f64>,
    mismatched: Vec<f64>,
}

/// The part of a batch that is selected.
pub struct Chosen {
    pub segments: Vec<Segment>,
    pub logps: Vec<f32>,
    /// Empty if the batch has none.
    pub ref_logps: Vec<f32>,
    /// Where the tokens of each segment are in the whole batch.
    pub ranges: Vec<Range<usize>>,
}

impl Selection {
    /// Of a step with these segments, in the order of their place in it.
    pub fn new(step: &Step<'_>, segments: &[Segment], kinds: Kinds) -> Self {
        let taken = |s: &&Segment| kinds.contains(Kinds::of(s.kind));
        let own: Vec<Segment> = segments.iter().filter(taken).copied().collect();
        let mut places = vec![None; segments.len()];
        let mut by_kind = [0; 5];
        for (place, segment) in own.iter().enumerate() {
            places[segment.in_step as usize] = Some(place as u32);
            by_kind[segment.kind as usize] += 1;
        }
        // One number for each response, or several, one after the other.
        let statistics = |all: &[f64]| {
            let columns = all.chunks(segments.len().max(1));
            columns.flat_map(|column| own.iter().map(|s| column[s.in_step as usize])).collect()
        };
        Self {
            places,
            groups: own.chunk_by(|a, b| a.group == b.group).count() as u64,
            segments: own.len() as u64,
            pairs: pairs(&own).count() as u64,
            tokens: own.iter().map(|s| u64::from(s.tokens)).sum(),
            by_kind,
            log_ratios: statistics(step.log_ratios.as_slice()),
            mismatched: statistics(step.mismatched.as_slice()),
        }
    }

    /// Whether nothing is selected.
    pub fn is_empty(&self) -> bool {
        self.segments == 0
    }

    /// The step with the totals of what is selected.
    pub fn step<'a>(&'a self, step: &Step<'a>) -> Step<'a> {
        Step {
            groups: self.groups,
            segments: self.segments,
            pairs: self.pairs,
            tokens: self.tokens,
            by_kind: self.by_kind,
            log_ratios: self.log_ratios.as_slice().into(),
            mismatched: self.mismatched.as_slice().into(),
            ..*step
        }
    }

    /// What of a batch of the step is selected.
    pub fn of(&self, batch: &Batch<'_>) -> Chosen {
        let mut chosen =
            Chosen { segments: vec![], logps: vec![], ref_logps: vec![], ranges: vec![] };
        for segment in batch.segments() {
            let Some(place) = self.places[segment.in_step as usize] else { continue };
            let range = segment.range();
            let start = chosen.logps.len() as u32;
            chosen.segments.push(Segment { in_step: place, start, ..*segment });
            chosen.logps.extend_from_slice(&batch.logps[range.clone()]);
            if !batch.ref_logps.is_empty() {
                chosen.ref_logps.extend_from_slice(&batch.ref_logps[range.clone()]);
            }
            chosen.ranges.push(range);
        }
        chosen
    }
}

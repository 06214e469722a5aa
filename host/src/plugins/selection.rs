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

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::Kind;

    /// Two prompts with a pair each, and a demonstration; responses of 1, 2, 3, 4 and 5 tokens.
    fn segments() -> Vec<Segment> {
        use Kind::{Chosen, Demonstration, Rejected};
        let kinds = [(0, Chosen), (0, Rejected), (1, Demonstration), (2, Rejected), (2, Chosen)];
        let mut start = 0;
        let segment = |(place, (group, kind)): (usize, (u32, Kind))| {
            let tokens = place as u32 + 1;
            start += tokens;
            let start = start - tokens;
            Segment { group, in_step: place as u32, start, tokens, kind, value: 0.0 }
        };
        kinds.into_iter().enumerate().map(segment).collect()
    }

    #[test]
    fn what_is_selected_is_a_step_of_its_own() {
        let (segments, ratios, mismatched) = (segments(), [0.0, 1.0, 2.0, 3.0, 4.0], [5.0; 5]);
        let step = Step {
            number: 3,
            steps: 9,
            training: true,
            groups: 3,
            segments: 5,
            pairs: 2,
            tokens: 15,
            by_kind: [1, 0, 0, 2, 2],
            log_ratios: ratios[..].into(),
            mismatched: mismatched[..].into(),
        };
        let chosen = Selection::new(&step, &segments, Kinds::DEMONSTRATION | Kinds::CHOSEN);
        let seen = chosen.step(&step);
        assert_eq!((seen.number, seen.steps, seen.training), (3, 9, true));
        assert_eq!((seen.groups, seen.segments, seen.pairs, seen.tokens), (3, 3, 0, 9));
        assert_eq!(seen.by_kind, [1, 0, 0, 2, 0]);
        assert_eq!(seen.log_ratios.as_slice(), [0.0, 2.0, 4.0]);
        assert_eq!(seen.mismatched.as_slice(), [5.0; 3]);
        // Several numbers for each response, one after the other.
        let columns = [0.0, 1.0, 2.0, 3.0, 4.0, 10.0, 11.0, 12.0, 13.0, 14.0];
        let more = Step { log_ratios: columns[..].into(), ..step };
        let chosen_of_more = Selection::new(&more, &segments, Kinds::CHOSEN);
        assert_eq!(chosen_of_more.step(&more).log_ratios.as_slice(), [0.0, 4.0, 10.0, 14.0]);
        let pairs = Selection::new(&step, &segments, Kinds::PAIR);
        assert_eq!((pairs.step(&step).pairs, pairs.step(&step).groups), (2, 2));
        assert!(!pairs.is_empty() && Selection::new(&step, &segments, Kinds::SCORE).is_empty());

        // A batch of the last two prompts, in the other order.
        let part: Vec<Segment> = [3, 4, 2].into_iter().map(|i: usize| segments[i]).collect();
        let mut start = 0;
        let moved = part.iter().map(|s| {
            start += s.tokens;
            Segment { start: start - s.tokens, ..*s }
        });
        let moved: Vec<Segment> = moved.collect();
        let logps: Vec<f32> = (0..12).map(|t| t as f32).collect();
        let batch = Batch {
            step,
            segment_list: moved.as_slice().into(),
            logps: logps.as_slice().into(),
            ref_logps: (&[][..]).into(),
        };
        let own = chosen.of(&batch);
        let places: Vec<(u32, u32)> = own.segments.iter().map(|s| (s.in_step, s.start)).collect();
        assert_eq!(places, [(2, 0), (1, 5)]);
        assert_eq!(own.logps, [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]);
        assert_eq!(own.ranges, [4..9, 9..12]);
        assert!(own.ref_logps.is_empty());
    }
}

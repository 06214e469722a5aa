//! Mismatched completions: every prompt with the completions of the group before it, rotated over the
//! whole step (KTO, arXiv 2402.01306; TRL's `KTOTrainer` rotates in the same direction, but within a
//! micro-batch, and so depends on how a step is split).

use super::micro;
use super::pass::Pass;
use super::plan::{Plan, Rows};
use super::statistics::Mismatched;
use crate::Result;
use crate::data::Source;
use crate::group::{Branch, Group, Segment};
use uft_core::Feedback;

/// One group per response of the source in the pass: its prompt, and a completion of the group before.
pub fn of(source: &Source, index: usize, rows: Rows, plan: &Plan) -> Mismatched {
    let examples = source.rows(rows);
    let members: Vec<usize> =
        plan.groups.iter().filter(|g| g.item.source == index).map(|g| g.item.row).collect();
    let own: Vec<_> = members.iter().map(|&row| responses(&examples[row].group)).collect();
    // A row alone in its step takes the completions of the row before it in the data.
    let row_before = |row: usize| (row + examples.len() - 1) % examples.len();
    let alone: Vec<_> =
        members.iter().map(|&row| responses(&examples[row_before(row)].group)).collect();
    // A small data set may have the same row at neighbouring places: its own completion is no mismatch.
    let before = |g: usize| {
        let mut earlier = (1..own.len()).map(|back| (g + own.len() - back) % own.len());
        let other = earlier.find(|&i| members[i] != members[g]);
        other.map_or(&alone[g], |i| &own[i])
    };
    let mismatched = own.iter().enumerate().flat_map(|(g, group)| {
        let others = before(g);
        group.iter().enumerate().map(|(i, (prompt, _))| (prompt, &others[i % others.len()].1))
    });
    let groups = mismatched
        .map(|(prompt, completion)| {
            let trained = vec![0..completion.len()];
            // The feedback is not looked at: only the log-ratio is.
            let segments = vec![Segment { feedback: Feedback::Demonstration, trained }];
            let branches = vec![Branch { tokens: completion.clone(), segments }];
            Group { prompt: prompt.clone(), branches }
        })
        .collect();
    Mismatched { groups, ref_logps: Vec::new() }
}

/// Every response of a group as the tokens before it and its own.
fn responses(group: &Group) -> Vec<(Vec<u32>, Vec<u32>)> {
    let of_branch = |branch: &Branch| -> Vec<(Vec<u32>, Vec<u32>)> {
        let split = |segment: &Segment| {
            let before = &branch.tokens[..segment.trained[0].start];
            let completion =
                segment.trained.iter().flat_map(|r| &branch.tokens[r.clone()]).copied();
            ([&group.prompt, before].concat(), completion.collect())
        };
        branch.segments.iter().map(split).collect()
    };
    group.branches.iter().flat_map(of_branch).collect()
}

/// `log pi - log pi_ref` of some of the completions, in nats; no gradient.
///
/// # Errors
/// If a signal arrives.
pub fn log_ratios(pass: &Pass, of: &Mismatched, some: &[usize]) -> Result<Vec<f64>> {
    let groups: Vec<&Group> = some.iter().map(|&i| &of.groups[i]).collect();
    let loads: Vec<usize> = groups.iter().map(|group| group.rows()).collect();
    let mut ratios = vec![0.0; groups.len()];
    for batch in micro::split(&loads, pass.micro_tokens, pass.without) {
        let packed = pass.pack(&batch.iter().map(|&g| groups[g]).collect::<Vec<_>>());
        let policy = pass.model.logps(&packed, Some(pass.policy))?;
        let mut rest = policy.as_slice();
        for g in batch {
            let reference = &of.ref_logps[some[g]];
            let (own, after) = rest.split_at(reference.len());
            rest = after;
            ratios[g] = log_ratio(own, reference);
        }
    }
    Ok(ratios)
}

/// `log pi - log pi_ref` of a completion's tokens together.
pub fn log_ratio(policy: &[f32], reference: &[f32]) -> f64 {
    policy.iter().zip(reference).map(|(p, r)| f64::from(*p) - f64::from(*r)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_is_split_from_what_comes_before_it() {
        let segment = |range| Segment { feedback: Feedback::Binary(true), trained: vec![range] };
        let group = Group {
            prompt: vec![1, 2],
            branches: vec![Branch {
                tokens: vec![3, 4, 5, 6],
                segments: vec![segment(0..1), segment(2..4)],
            }],
        };
        assert_eq!(responses(&group), [(vec![1, 2], vec![3]), (vec![1, 2, 3, 4], vec![5, 6])]);
    }
}

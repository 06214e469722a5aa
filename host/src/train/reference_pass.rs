//! The reference pass: log-probs of the groups of a step under the reference, read where they are known and
//! computed where they are not.

use super::micro;
use super::pass::{Pass, not_finite};
use super::reference::ReferenceLogps;
use crate::Result;
use crate::config::Gain;
use crate::group::{Group, Origin};
use crate::model::Logps;

/// A group whose log-probs are wanted.
pub struct Wanted<'g> {
    pub group: &'g Group,
    /// Where it comes from, for messages.
    pub origin: &'g Origin,
    /// Whether it will be wanted again, and is worth keeping.
    pub again: bool,
}

/// The log-probs of every group's trained tokens. Neighbours with the same prompt have it computed once.
///
/// # Errors
/// If they cannot be read or kept, are not finite, or a signal arrives.
pub fn logps(
    pass: &Pass,
    wanted: &[Wanted],
    known: &mut ReferenceLogps,
) -> Result<Vec<Box<[f32]>>> {
    let mut found: Vec<Option<Box<[f32]>>> =
        wanted.iter().map(|w| known.get(w.group)).collect::<Result<_>>()?;
    let lacking: Vec<usize> = (0..wanted.len()).filter(|&w| found[w].is_none()).collect();
    let bundles = bundles(pass, wanted, &lacking);
    let loads: Vec<usize> = bundles.iter().map(|(rows, _)| *rows).collect();
    let mut receive = |members: &[usize], logps: Logps| -> Result<()> {
        let logps = logps.wait()?;
        let (mut rest, mut keep, mut bad) = (logps.as_slice(), Vec::new(), Vec::new());
        for &index in members.iter().flat_map(|&bundle| &bundles[bundle].1) {
            let Wanted { group, origin, again } = wanted[index];
            let (own, after) = rest.split_at(group.segments().map(|s| s.tokens()).sum());
            rest = after;
            if own.iter().any(|p| !p.is_finite()) {
                bad.push(origin.to_string());
            }
            if again {
                keep.push((group, own));
            }
            found[index] = Some(own.into());
        }
        if !bad.is_empty() {
            return Err(not_finite("reference", &bad));
        }
        known.insert(&keep)
    };
    // A GPU has the next micro-batch before the numbers of one are waited for.
    let mut under_way: Option<(Vec<usize>, Logps)> = None;
    for members in micro::split(&loads, pass.reference_tokens, pass.without) {
        let groups: Vec<Group> =
            members.iter().map(|&bundle| joined(wanted, &bundles[bundle].1)).collect();
        let packed = pass.pack(&groups.iter().collect::<Vec<_>>());
        let logps = pass.model.logps_later(&packed, pass.reference)?;
        if let Some((members, logps)) = under_way.replace((members, logps)) {
            receive(&members, logps)?;
        }
    }
    if let Some((members, logps)) = under_way {
        receive(&members, logps)?;
    }
    Ok(found.into_iter().map(|logps| logps.expect("what was lacking is computed")).collect())
}

/// Neighbours with the same prompt, together no larger than one of the pass's micro-batches: their rows, and which they are.
fn bundles(pass: &Pass, wanted: &[Wanted], lacking: &[usize]) -> Vec<(usize, Vec<usize>)> {
    let copies = pass.without.contains(&Gain::SharedPrompts);
    let mut bundles: Vec<(usize, Vec<usize>)> = Vec::new();
    for &index in lacking {
        let group = wanted[index].group;
        let rows = if copies { group.rows_alone() } else { group.rows() };
        let joining = rows - group.prompt.len();
        match bundles.last_mut() {
            Some((all, members))
                if !copies
                    && wanted[members[0]].group.prompt == group.prompt
                    && *all + joining <= pass.reference_tokens =>
            {
                *all += joining;
                members.push(index);
            }
            _ => bundles.push((rows, vec![index])),
        }
    }
    bundles
}

/// One group of all the branches.
fn joined(wanted: &[Wanted], members: &[usize]) -> Group {
    let groups = members.iter().map(|&index| wanted[index].group);
    Group {
        prompt: wanted[members[0]].group.prompt.clone(),
        branches: groups.flat_map(|group| group.branches.iter().cloned()).collect(),
    }
}

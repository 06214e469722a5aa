//! What holds for every objective, whatever its formula.

use super::case::{Case, Evaluated};
use super::{Make, Outcome};
use crate::abi::ObjectiveObject;
use crate::batch::Segment;
use crate::fault::{Fault, FaultKind};
use crate::needs::{Kinds, Needs};
use crate::sample::Kind;

/// Known needs and kinds that fit each other.
pub(super) fn declarations(make: Make) -> Result<(Needs, Kinds, String), String> {
    let objective = make().map_err(|fault| fault.to_string())?;
    let (needs, accepts) = (objective.needs(), objective.accepts());
    let known = Kind::ALL.iter().fold(0, |bits, kind| bits | Kinds::of(*kind).0);
    if needs.unknown() != 0 || accepts.0 & !known != 0 {
        return Err(format!("unknown bits in needs {:#x} or accepts {:#x}", needs.0, accepts.0));
    }
    if accepts.0 == 0 {
        return Err("it accepts no feedback".into());
    }
    if needs.contains(Needs::PAIRS) && !accepts.contains(Kinds::PAIR) {
        return Err("it needs pairs but does not accept chosen and rejected responses".into());
    }
    let needed = if needs.0 == 0 { "nothing".into() } else { needs.names().join(", ") };
    Ok((needs, accepts, format!("needs {needed}; accepts {}", accepts.names().join(", "))))
}

/// Runs a case on a fresh objective.
pub(super) fn fresh(make: Make, case: &Case) -> Result<Evaluated, String> {
    let mut objective = make().map_err(|fault| fault.to_string())?;
    case.run(&mut objective).map_err(|fault| {
        let reads = fault.kind == FaultKind::Panic && !objective.needs().contains(Needs::REFERENCE);
        let hint = if reads { " (does it use the reference without needing it?)" } else { "" };
        format!("{}: {fault}{hint}", case.name)
    })
}

/// Loss, every gradient and every metric are there and finite.
pub(super) fn finite(make: Make, cases: &[Case]) -> Outcome {
    for case in cases {
        check_finite(case, &fresh(make, case)?).map_err(|why| format!("{}: {why}", case.name))?;
    }
    Ok(format!("{} steps", cases.len()))
}

pub(super) fn check_finite(case: &Case, seen: &Evaluated) -> Result<(), String> {
    if !seen.loss.is_finite() {
        return Err(format!("the loss is {}", seen.loss));
    }
    for (i, segment) in case.segments.iter().enumerate() {
        let bad = seen.dlogp[segment.range()].iter().position(|g| !g.is_finite());
        if let Some(token) = bad {
            let value = seen.dlogp[segment.start as usize + token];
            let kind = segment.kind.name();
            let hint = if value.is_nan() { " or was never set" } else { "" };
            return Err(format!(
                "the gradient of token {token} of response {i} ({kind}) is {value}{hint}"
            ));
        }
    }
    match seen.metrics.iter().find(|m| !m.sum.is_finite() || m.count.is_nan() || m.count <= 0.0) {
        Some(m) => Err(format!("the metric `{}` is {} / {}", m.name, m.sum, m.count)),
        None => Ok(()),
    }
}

/// The same step gives the same bits, on one objective and on two.
pub(super) fn deterministic(make: Make, cases: &[Case]) -> Outcome {
    for case in cases {
        let mut objective = make().map_err(|fault| fault.to_string())?;
        let first = case.run(&mut objective).map_err(|fault| fault.to_string())?;
        let all: Vec<usize> = (0..case.groups()).collect();
        let second = case.evaluate(&objective, &all).map_err(|fault| fault.to_string())?;
        if !same_bits(&first, &second) {
            return Err(format!("{}: a second evaluation of it differs", case.name));
        }
        if !same_bits(&first, &fresh(make, case)?) {
            return Err(format!("{}: a second objective evaluates it differently", case.name));
        }
    }
    Ok(format!("{} steps, three times each", cases.len()))
}

fn same_bits(a: &Evaluated, b: &Evaluated) -> bool {
    let bits = |e: &Evaluated| e.dlogp.iter().map(|g| g.to_bits()).collect::<Vec<_>>();
    a.loss.to_bits() == b.loss.to_bits() && bits(a) == bits(b) && a.metrics == b.metrics
}

/// However a step's groups are spread over batches and over processes, loss and gradient are the same.
pub(super) fn split(make: Make, cases: &[Case]) -> Outcome {
    for case in cases {
        let whole = fresh(make, case)?;
        let n = case.groups();
        let groups: Vec<usize> = (0..n).collect();
        let reversed: Vec<usize> = (0..n).rev().collect();
        let rank = |r| groups.iter().copied().filter(|g| g % RANKS == r).collect();
        let ranks: Vec<Vec<usize>> = (0..RANKS).map(rank).collect();
        let ways: [(&str, Vec<Vec<&[usize]>>); 4] = [
            ("two batches", vec![vec![&groups[..n / 2], &groups[n / 2..]]]),
            ("a batch per group", vec![groups.chunks(1).collect()]),
            ("another order of its groups", vec![vec![&reversed]]),
            ("four ranks", ranks.iter().map(|own| own.chunks(2).collect()).collect()),
        ];
        for (words, processes) in ways {
            let parts = in_parts(make, case, &processes)?;
            let apart = (parts.loss - whole.loss).abs() > 1e-9 * whole.loss.abs().max(1e-3);
            if apart || !close(&parts.dlogp, &whole.dlogp) {
                return Err(format!(
                    "{}: the loss is {:.9e} in one batch but {:.9e} in {words}, or its gradient \
                     differs; divide by the totals of `batch.step`",
                    case.name, whole.loss, parts.loss
                ));
            }
        }
    }
    Ok(format!("{} steps: in halves, group by group, in another order, on four ranks", cases.len()))
}

/// Processes that share a step.
const RANKS: usize = 4;

/// The sum over batches of several processes, each with an objective of its own that begins the step.
fn in_parts(make: Make, case: &Case, processes: &[Vec<&[usize]>]) -> Result<Evaluated, String> {
    let mut sum =
        Evaluated { loss: 0.0, dlogp: vec![f32::NAN; case.logps.len()], metrics: Vec::new() };
    let mut run = |objective: &mut ObjectiveObject, batches: &[&[usize]]| {
        case.begin(objective)?;
        for groups in batches {
            let part = case.evaluate(objective, groups)?;
            sum.loss += part.loss;
            let written = sum.dlogp.iter_mut().zip(part.dlogp).filter(|(_, p)| !p.is_nan());
            written.for_each(|(sum, part)| *sum = part);
        }
        Ok(())
    };
    for batches in processes {
        let mut objective = make().map_err(|fault| fault.to_string())?;
        run(&mut objective, batches).map_err(|fault: Fault| format!("{}: {fault}", case.name))?;
    }
    Ok(sum)
}

fn close(a: &[f32], b: &[f32]) -> bool {
    let largest = b.iter().fold(0.0f32, |max, g| max.max(g.abs()));
    a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs() + 1e-7 * largest)
}

/// Token counts and single tokens matter only where that is declared.
pub(super) fn declared_use(make: Make, needs: Needs, cases: &[Case]) -> Outcome {
    let mut tried = Vec::new();
    let mut unchanged = |words, need: Needs, change: fn(&Case) -> Case| {
        if needs.contains(need) {
            return Ok(());
        }
        tried.push(words);
        for case in cases {
            let (before, after) = (fresh(make, case)?, fresh(make, &change(case))?);
            if (before.loss - after.loss).abs() > 1e-9 * before.loss.abs().max(1e-3) {
                let name = need.names().join(", ");
                return Err(format!("{}: {words} matter, but it does not need {name}", case.name));
            }
        }
        Ok(())
    };
    unchanged("token counts", Needs::TOKEN_COUNTS, longer)?;
    unchanged("single tokens", Needs::TOKEN_LOGPS, rearranged)?;
    Ok(if tried.is_empty() { "everything is declared".into() } else { tried.join(", ") })
}

/// The same log-probs of every response, with one more token.
fn longer(case: &Case) -> Case {
    let mut longer =
        Case { mismatched: case.mismatched.clone(), name: case.name.clone(), ..Case::new() };
    for segment in &case.segments {
        let start = longer.logps.len() as u32;
        longer.logps.extend_from_slice(&case.logps[segment.range()]);
        longer.ref_logps.extend_from_slice(&case.ref_logps[segment.range()]);
        longer.logps.push(0.0);
        longer.ref_logps.push(0.0);
        longer.segments.push(Segment { start, tokens: segment.tokens + 1, ..*segment });
    }
    longer.refresh();
    longer
}

/// The same log-probs of every response, otherwise spread over its tokens.
fn rearranged(case: &Case) -> Case {
    let mut case = case.clone();
    for segment in case.segments.iter().filter(|s| s.tokens > 1) {
        case.logps[segment.range().start] -= 0.5;
        case.logps[segment.range().end - 1] += 0.5;
    }
    case
}

/// What a checkpoint restores, and that neither evaluation nor a batch changes it.
pub(super) fn state(make: Make, needs: Needs, cases: &[Case]) -> Outcome {
    let numbered = |i: usize| Case { number: i as u64, ..cases[i].clone() };
    let (first, second, third) = (numbered(0), numbered(1), numbered(2));
    let held_out = Case { evaluation: true, ..numbered(3) };
    let run = |make: Make| {
        let mut objective = make()?;
        first.run(&mut objective)?;
        second.begin(&mut objective)?;
        let before = objective.save_state().into_result()?;
        let all: Vec<usize> = (0..second.groups()).collect();
        second.evaluate(&objective, &all)?;
        let saved = objective.save_state().into_result()?;
        held_out.run(&mut objective)?;
        let after = objective.save_state().into_result()?;
        let went_on = third.run(&mut objective)?;

        let mut without = make()?;
        first.run(&mut without)?;
        second.run(&mut without)?;
        let without = third.run(&mut without)?;
        let mut resumed = make()?;
        resumed.load_state(saved.as_slice().into()).into_result()?;
        let resumed = third.run(&mut resumed)?;
        Ok::<_, Fault>((before, saved, after, went_on, without, resumed))
    };
    let (before, saved, after, went_on, without, resumed) = run(make).map_err(|f| f.to_string())?;
    let stateful = needs.contains(Needs::STATE);
    if before != saved {
        return Err("evaluating a batch changes the saved state".into());
    }
    if saved != after || !same_bits(&went_on, &without) {
        return Err("a step with `training = false` changes the state".into());
    }
    if saved.is_empty() == stateful {
        return Err(match stateful {
            true => "it needs saved state but save_state gives nothing".into(),
            false => "save_state gives something, but it does not need saved state".into(),
        });
    }
    if !same_bits(&resumed, &went_on) {
        return Err(match stateful {
            true => "after load_state the next step differs".into(),
            false => "a step depends on earlier ones, but it does not need saved state".into(),
        });
    }
    Ok(if stateful { format!("{} bytes, restored", saved.len()) } else { "none".into() })
}

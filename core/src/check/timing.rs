//! How long a call takes.

use super::steps::Maker;
use super::{Make, Outcome};
use crate::batch::Batch;
use crate::needs::Needs;
use std::time::{Duration, Instant};

const TOKENS: usize = 65_536;
const CALLS: usize = 9;

/// The median time of evaluating a step of [`TOKENS`] tokens through the border. It is told and not
/// judged: a machine may be busy with something else.
pub(super) fn timing(make: Make, needs: Needs, maker: &Maker) -> Outcome {
    let case = maker.large_step(TOKENS);
    let mut objective = make().map_err(|fault| fault.to_string())?;
    case.begin(&mut objective).map_err(|fault| fault.to_string())?;
    let ref_logps = if needs.contains(Needs::REFERENCE) { &case.ref_logps[..] } else { &[] };
    let batch = Batch {
        step: case.step(needs),
        segment_list: case.segments.as_slice().into(),
        logps: case.logps.as_slice().into(),
        ref_logps: ref_logps.into(),
    };
    let mut dlogp = vec![f32::NAN; case.logps.len()];
    let mut times = [Duration::ZERO; CALLS];
    for time in &mut times {
        let start = Instant::now();
        let outcome = objective.evaluate(&batch, dlogp.as_mut_slice().into());
        *time = start.elapsed();
        outcome.into_result().map_err(|fault| format!("{}: {fault}", case.name))?;
    }
    times.sort_unstable();
    let (tokens, segments) = (case.logps.len(), case.segments.len());
    Ok(format!("{:.1?} for {tokens} tokens of {segments} responses", times[CALLS / 2]))
}

//! The objective of a source: a plugin's, or a weighted sum of several over the same rows.

use super::objective::Objective;
use super::{Registry, selection::Selection};
use crate::config::{Number, ObjectiveRef, Term};
use crate::{Error, Result};
use uft_core::batch::{Batch, Metric, Outcome, Segment, Step};
use uft_core::{Kinds, Needs};

/// The objective of a source.
pub struct Sum {
    /// The plugins' names.
    pub name: String,
    /// What any of them needs.
    pub needs: Needs,
    /// What any of them accepts: each sees the responses of the kinds that it takes.
    pub accepts: Kinds,
    parts: Vec<Part>,
}

struct Part {
    weight: Number,
    objective: Objective,
    /// Of the step that was begun.
    step: At,
}

/// What a part remembers of the step that was begun.
#[derive(Default)]
struct At {
    weight: f64,
    /// None: the part sees everything.
    selection: Option<Selection>,
}

impl Sum {
    /// Makes the objectives that the configuration names.
    ///
    /// # Errors
    /// As [`Registry::objective`].
    pub fn new(registry: &mut Registry, objective: &ObjectiveRef) -> Result<Self> {
        let mut parts = Vec::new();
        for Term { weight, plugin } in &objective.terms {
            let objective = registry.objective(plugin)?;
            parts.push(Part { weight: *weight, objective, step: At::default() });
        }
        let names: Vec<&str> = parts.iter().map(|p| p.objective.name.as_str()).collect();
        let union =
            |bits: fn(&Objective) -> u64| parts.iter().fold(0, |all, p| all | bits(&p.objective));
        Ok(Self {
            name: names.join(" + "),
            needs: Needs(union(|o| o.needs.0)),
            accepts: Kinds(union(|o| o.accepts.0)),
            parts,
        })
    }

    /// Each plugin's name and the feedback that it accepts.
    pub fn parts(&self) -> impl Iterator<Item = (&str, Kinds)> {
        self.parts.iter().map(|part| (part.objective.name.as_str(), part.objective.accepts))
    }

    pub fn needs(&self, need: Needs) -> bool {
        self.needs.contains(need)
    }

    /// Begins a step that consists of `segments`, in the order of their place in it.
    ///
    /// # Errors
    /// If a plugin fails, or refuses a parameter's value at this step.
    pub fn begin_step(&mut self, step: &Step<'_>, segments: &[Segment]) -> Result<()> {
        for Part { weight, objective, step: at } in &mut self.parts {
            objective.at(step.number, step.steps)?;
            at.weight = weight.at(step.number, step.steps);
            let everything = segments.iter().all(|s| objective.accepts.contains(Kinds::of(s.kind)));
            at.selection = (!everything).then(|| Selection::new(step, segments, objective.accepts));
            // As for a source that is not in the step: there is nothing to begin.
            if !at.selection.as_ref().is_some_and(Selection::is_empty) {
                objective.begin_step(&at.view(step, objective.needs))?;
            }
        }
        Ok(())
    }

    /// Adds up loss, gradient and metrics of the parts. `dlogp` has the length of `batch.logps`.
    ///
    /// # Errors
    /// If a plugin fails, or leaves a gradient or its loss unwritten, infinite or NaN.
    pub fn evaluate(&self, batch: &Batch<'_>, dlogp: &mut [f32]) -> Result<Outcome> {
        if let [Part { objective, weight: Number::Fixed(1.0), .. }] = self.parts.as_slice() {
            let mut outcome = objective.evaluate(batch, dlogp)?;
            outcome.metrics.extend(objective.scheduled());
            return Ok(outcome);
        }
        let mut sum = Outcome { loss: 0.0, metrics: Vec::new().into() };
        dlogp.fill(0.0);
        for (index, Part { objective, step: at, .. }) in self.parts.iter().enumerate() {
            let step = at.view(&batch.step, objective.needs);
            let chosen = at.selection.as_ref().map(|s| s.of(batch));
            let (segments, logps, ref_logps) = match &chosen {
                Some(own) => (&own.segments[..], &own.logps[..], &own.ref_logps[..]),
                None => (batch.segments(), batch.logps.as_slice(), batch.ref_logps.as_slice()),
            };
            if segments.is_empty() {
                continue;
            }
            let reference = objective.needs(Needs::REFERENCE);
            let view = Batch {
                step,
                segment_list: segments.into(),
                logps: logps.into(),
                ref_logps: if reference { ref_logps.into() } else { (&[][..]).into() },
            };
            let mut own = vec![f32::NAN; logps.len()];
            let outcome = objective.evaluate(&view, &mut own)?;
            sum.loss += at.weight * outcome.loss;
            let add = |(to, from): (&mut f32, f32)| *to += (at.weight * f64::from(from)) as f32;
            match &chosen {
                Some(chosen) => {
                    for (range, segment) in chosen.ranges.iter().zip(segments) {
                        let from = own[segment.range()].iter().copied();
                        dlogp[range.clone()].iter_mut().zip(from).for_each(add);
                    }
                }
                None => dlogp.iter_mut().zip(own).for_each(add),
            }
            // The first one's metrics have their usual names.
            let of = &objective.name;
            let name = |name: &str| if index == 0 { name.into() } else { format!("{of}/{name}") };
            let renamed =
                outcome.metrics.iter().map(|m| Metric { name: name(&m.name).into(), ..m.clone() });
            sum.metrics.extend(renamed);
            sum.metrics.extend(objective.scheduled());
            if self.parts.len() > 1 {
                // A share of the step's loss, once for all of its batches.
                let share = segments.len() as f64 / step.segments as f64;
                let loss = format!("{of}/loss").as_str().into();
                sum.metrics.push(Metric { name: loss, sum: outcome.loss, count: share });
            }
        }
        Ok(sum)
    }

    /// The state of every plugin.
    ///
    /// # Errors
    /// If a plugin fails.
    pub fn save_state(&self) -> Result<Vec<u8>> {
        match self.parts.as_slice() {
            [only] => only.objective.save_state(),
            parts => {
                let mut all = Vec::new();
                for part in parts {
                    let state = part.objective.save_state()?;
                    all.extend((state.len() as u64).to_le_bytes());
                    all.extend(state);
                }
                Ok(all)
            }
        }
    }

    /// Takes back what [`save_state`](Sum::save_state) gave.
    ///
    /// # Errors
    /// If a plugin fails, or the bytes are not such a state.
    pub fn load_state(&mut self, mut state: &[u8]) -> Result<()> {
        if let [only] = self.parts.as_mut_slice() {
            return only.objective.load_state(state);
        }
        let broken = || Error::other(format!("the saved state of `{}` is cut short", self.name));
        let mut states = Vec::new();
        for _ in &self.parts {
            let (length, rest) = state.split_first_chunk().ok_or_else(broken)?;
            let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| broken())?;
            let (own, rest) = rest.split_at_checked(length).ok_or_else(broken)?;
            states.push(own);
            state = rest;
        }
        for (part, own) in self.parts.iter_mut().zip(states) {
            part.objective.load_state(own)?;
        }
        Ok(())
    }
}

impl At {
    /// The step as a part sees it: with what it needs, and no more.
    fn view<'a>(&'a self, step: &Step<'a>, needs: Needs) -> Step<'a> {
        let mut view = match &self.selection {
            Some(selection) => selection.step(step),
            None => *step,
        };
        if !needs.contains(Needs::STEP_LOG_RATIOS) {
            view.log_ratios = (&[][..]).into();
        } else if !needs.contains(Needs::STEP_RESPONSES) {
            view.log_ratios = view.log_ratios.slice(..view.segments as usize);
        }
        if !needs.contains(Needs::MISMATCHED) {
            view.mismatched = (&[][..]).into();
        }
        view
    }
}

//! Optimizer steps made by hand, with everything that a host would prepare.

use crate::abi::{ObjectiveObject, make_objective};
use crate::batch::{Batch, Metric, Segment, Step, StepResponse, pairs};
use crate::fault::Fault;
use crate::needs::Needs;
use crate::objective::Objective;
use crate::sample::Feedback;

/// One optimizer step of an objective: its groups, with log-probs of policy and reference.
#[derive(Clone, Debug, Default)]
pub struct Case {
    /// What reports call it.
    pub name: String,
    /// See [`Step::number`].
    pub number: u64,
    /// Whether the step is one of evaluation instead of training.
    pub evaluation: bool,
    /// Group after group, positions into `logps`.
    pub segments: Vec<Segment>,
    /// Log-probs of the policy, segment after segment, in nats.
    pub logps: Vec<f32>,
    /// The same of the reference.
    pub ref_logps: Vec<f32>,
    /// See [`Step::log_ratios`]; [`Case::refresh`] computes them from the log-probs.
    pub log_ratios: Vec<f64>,
    /// The same with what [`Step::responses`] reads behind them.
    pub responses: Vec<f64>,
    /// See [`Step::mismatched`].
    pub mismatched: Vec<f64>,
}

/// What an evaluation gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluated {
    /// The step's loss.
    pub loss: f64,
    /// In the order of [`Case::logps`]; NaN where nothing was written.
    pub dlogp: Vec<f32>,
    /// In the order of their first observation.
    pub metrics: Vec<Metric>,
}

impl Evaluated {
    /// Whether the loss and the gradient of every token are these, up to `1e-6` of the largest.
    ///
    /// # Panics
    /// If they are not, with both.
    #[track_caller]
    pub fn expect(&self, loss: f64, dlogp: &[f64]) {
        let largest = dlogp.iter().fold(loss.abs(), |max, g| max.max(g.abs()));
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-6 * largest;
        let same = near(self.loss, loss)
            && self.dlogp.len() == dlogp.len()
            && self.dlogp.iter().zip(dlogp).all(|(a, b)| near(f64::from(*a), *b));
        assert!(same, "loss {} and gradient {:?}, not {loss} and {dlogp:?}", self.loss, self.dlogp);
    }

    /// The mean of a metric.
    pub fn metric(&self, name: &str) -> Option<f64> {
        self.metrics.iter().find(|m| m.name == name).map(|m| m.sum / m.count)
    }
}

impl Case {
    /// A step without groups.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a prompt with its responses, each a feedback with the log-probs of policy and reference
    /// per token; builder style.
    ///
    /// # Panics
    /// If a response has no tokens, or another number of them in the reference.
    pub fn group(mut self, responses: &[(Feedback, &[f32], &[f32])]) -> Self {
        let group = self.segments.last().map_or(0, |s| s.group + 1);
        for (feedback, logps, ref_logps) in responses {
            assert!(!logps.is_empty() && logps.len() == ref_logps.len(), "tokens of a response");
            self.segments.push(Segment {
                group,
                in_step: self.segments.len() as u32,
                start: self.logps.len() as u32,
                tokens: logps.len() as u32,
                kind: feedback.kind(),
                value: feedback.value(),
            });
            self.logps.extend_from_slice(logps);
            self.ref_logps.extend_from_slice(ref_logps);
        }
        self.refresh();
        self
    }

    /// Sets [`Step::mismatched`]; builder style.
    pub fn mismatched(mut self, log_ratios: &[f64]) -> Self {
        self.mismatched = log_ratios.to_vec();
        self
    }

    /// Computes [`Case::log_ratios`] and [`Case::responses`] from the log-probs.
    pub fn refresh(&mut self) {
        let sum = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>();
        let response = |s: &Segment| {
            let logp = sum(&self.logps[s.range()]);
            let log_ratio = logp - sum(&self.ref_logps[s.range()]);
            StepResponse { group: s.group, kind: s.kind, logp, log_ratio }
        };
        let n = self.segments.len();
        let mut columns = vec![0.0; StepResponse::COLUMNS * n];
        for (place, segment) in self.segments.iter().enumerate() {
            response(segment).put(&mut columns, n, place);
        }
        self.log_ratios = columns[..n].to_vec();
        self.responses = columns;
    }

    /// Number of groups.
    pub fn groups(&self) -> usize {
        self.segments.chunk_by(|a, b| a.group == b.group).count()
    }

    /// Begins the step.
    ///
    /// # Errors
    /// What the objective says.
    pub fn begin(&self, objective: &mut ObjectiveObject) -> Result<(), Fault> {
        objective.begin_step(&self.step(objective.needs())).into_result()
    }

    /// Begins the step and evaluates it in one batch.
    ///
    /// # Errors
    /// What the objective says.
    pub fn run(&self, objective: &mut ObjectiveObject) -> Result<Evaluated, Fault> {
        self.begin(objective)?;
        let groups: Vec<usize> = (0..self.groups()).collect();
        self.evaluate(objective, &groups)
    }

    /// Runs the step on a new objective of a type, with parameters given as a JSON object.
    ///
    /// # Errors
    /// What the objective says, of its parameters or of the step.
    pub fn on<T: Objective>(&self, params: &str) -> Result<Evaluated, Fault> {
        self.run(&mut make_objective::<T>(params).into_result()?)
    }

    /// Evaluates some groups in one batch, in the given order. Gradients of the others are NaN.
    ///
    /// # Errors
    /// What the objective says.
    pub fn evaluate(
        &self,
        objective: &ObjectiveObject,
        groups: &[usize],
    ) -> Result<Evaluated, Fault> {
        let needs = objective.needs();
        let all: Vec<&[Segment]> = self.segments.chunk_by(|a, b| a.group == b.group).collect();
        let chosen: Vec<&Segment> = groups.iter().flat_map(|g| all[*g]).collect();
        let (mut segments, mut logps, mut ref_logps) = (Vec::new(), Vec::new(), Vec::new());
        for segment in &chosen {
            segments.push(Segment { start: logps.len() as u32, ..**segment });
            logps.extend_from_slice(&self.logps[segment.range()]);
            if needs.contains(Needs::REFERENCE) {
                ref_logps.extend_from_slice(&self.ref_logps[segment.range()]);
            }
        }
        let batch = Batch {
            step: self.step(needs),
            segment_list: segments.as_slice().into(),
            logps: logps.as_slice().into(),
            ref_logps: ref_logps.as_slice().into(),
        };
        let mut written = vec![f32::NAN; logps.len()];
        let outcome = objective.evaluate(&batch, written.as_mut_slice().into()).into_result()?;
        let mut dlogp = vec![f32::NAN; self.logps.len()];
        for (from, to) in segments.iter().zip(&chosen) {
            dlogp[to.range()].copy_from_slice(&written[from.range()]);
        }
        Ok(Evaluated { loss: outcome.loss, dlogp, metrics: outcome.metrics.into_vec() })
    }

    /// The step as the host describes it to an objective with these needs.
    pub(crate) fn step(&self, needs: Needs) -> Step<'_> {
        let mut by_kind = [0; 5];
        self.segments.iter().for_each(|s| by_kind[s.kind as usize] += 1);
        let mismatched = if needs.contains(Needs::MISMATCHED) { &self.mismatched[..] } else { &[] };
        let log_ratios = if needs.contains(Needs::STEP_RESPONSES) {
            &self.responses[..]
        } else if needs.contains(Needs::STEP_LOG_RATIOS) {
            &self.log_ratios[..]
        } else {
            &[]
        };
        Step {
            number: self.number,
            steps: 10,
            training: !self.evaluation,
            groups: self.groups() as u64,
            segments: self.segments.len() as u64,
            pairs: pairs(&self.segments).count() as u64,
            tokens: self.logps.len() as u64,
            by_kind,
            log_ratios: log_ratios.into(),
            mismatched: mismatched.into(),
        }
    }
}

//! The trait of an objective and what it fills in.

use crate::batch::{Batch, Metric, Outcome, Segment, Step};
use crate::fault::Fault;
use crate::needs::{Kinds, Needs};
use crate::params::Params;

/// A training objective: a function of the log-probs of responses and of their feedback.
///
/// The engine back-propagates `dlogp[t] = d loss / d logp[t]`, which [`Evaluation`] collects, so
/// an objective never sees logits or tensors.
pub trait Objective: Sized + Send + Sync + 'static {
    /// The name in `objective = { plugin = "…" }`.
    const NAME: &'static str;
    /// One line: the formula and where it is from.
    const ABOUT: &'static str;

    /// Reads the parameters. Wrong values are collected by [`Params`] and reported after.
    fn new(params: &mut Params) -> Self;

    /// What the host must prepare; nothing by default.
    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    /// The feedback kinds that this objective is defined for.
    fn accepts(&self) -> Kinds;

    /// Called once per optimizer step before its batches: the place to update state.
    fn begin_step(&mut self, _step: &Step) -> Result<(), Fault> {
        Ok(())
    }

    /// Adds the batch's share of the step's loss to `out` and writes the gradient of every token.
    /// Pure: the same batch gives the same result.
    ///
    /// # Errors
    /// If loss or gradient cannot be computed on this batch.
    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault>;

    /// State to keep in a checkpoint (see [`Needs::STATE`]).
    fn save_state(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes back what [`save_state`](Objective::save_state) gave.
    ///
    /// # Errors
    /// If the bytes are not such a state.
    fn load_state(&mut self, state: &[u8]) -> Result<(), Fault> {
        match state {
            [] => Ok(()),
            _ => Err(Fault::evaluation(format!("`{}` keeps no state", Self::NAME))),
        }
    }
}

/// Collects loss, gradient and metrics of one batch.
pub struct Evaluation<'a> {
    loss: f64,
    /// `d loss / d logp` per token, in the order of [`Batch::logps`].
    dlogp: &'a mut [f32],
    metrics: Vec<Metric>,
}

impl<'a> Evaluation<'a> {
    /// Over a slice for the gradient, as long as [`Batch::logps`].
    pub fn new(dlogp: &'a mut [f32]) -> Self {
        Self { loss: 0.0, dlogp, metrics: Vec::new() }
    }

    /// Adds to the loss.
    pub fn loss(&mut self, loss: f64) {
        self.loss += loss;
    }

    /// Sets `d loss / d log pi(y|x)` of a response: the same value for each of its tokens.
    pub fn gradient(&mut self, segment: &Segment, dlogp: f64) {
        self.dlogp[segment.range()].fill(dlogp as f32);
    }

    /// Adds to what [`gradient`](Evaluation::gradient) set, for responses that are in several pairs.
    pub fn add_gradient(&mut self, segment: &Segment, dlogp: f64) {
        for value in &mut self.dlogp[segment.range()] {
            *value += dlogp as f32;
        }
    }

    /// The gradients of a response's tokens, to be written one by one.
    pub fn token_gradients(&mut self, segment: &Segment) -> &mut [f32] {
        &mut self.dlogp[segment.range()]
    }

    /// Adds one observation to the mean of a metric.
    pub fn metric(&mut self, name: &str, value: f64) {
        self.metric_over(name, value, 1.0);
    }

    /// Adds `count` observations that sum to `sum` to the mean of a metric.
    pub fn metric_over(&mut self, name: &str, sum: f64, count: f64) {
        match self.metrics.iter_mut().find(|m| m.name.as_str() == name) {
            Some(metric) => {
                metric.sum += sum;
                metric.count += count;
            }
            None => self.metrics.push(Metric { name: name.into(), sum, count }),
        }
    }

    /// The metrics of a single response under TRL's names: `rewards/chosen` and `logps/chosen`
    /// for a desirable one, `…/rejected` otherwise, and `rewards/accuracies`: whether the reward's
    /// sign agrees, which `rewards/<kind>/accuracy` says of this kind of feedback alone.
    pub fn response_metrics(&mut self, batch: &Batch, s: &Segment, reward: f64, desirable: bool) {
        self.side_metrics(batch, s, reward, desirable);
        self.accuracy(s.kind.name(), if desirable { reward } else { -reward });
    }

    /// The metrics of a pair under TRL's names, `rewards/pair/margins` and
    /// `rewards/pair/accuracy`.
    pub fn pair_metrics(
        &mut self,
        batch: &Batch,
        (chosen, chosen_reward): (&Segment, f64),
        (rejected, rejected_reward): (&Segment, f64),
    ) {
        self.side_metrics(batch, chosen, chosen_reward, true);
        self.side_metrics(batch, rejected, rejected_reward, false);
        let margin = chosen_reward - rejected_reward;
        self.metric("rewards/margins", margin);
        self.metric("rewards/pair/margins", margin);
        self.accuracy("pair", margin);
    }

    fn accuracy(&mut self, kind: &str, margin: f64) {
        // At step 0 every reward is exactly 0 and says nothing: half right.
        let right = if margin == 0.0 { 0.5 } else { f64::from(margin > 0.0) };
        self.metric("rewards/accuracies", right);
        self.metric(&format!("rewards/{kind}/accuracy"), right);
    }

    fn side_metrics(&mut self, batch: &Batch, segment: &Segment, reward: f64, desirable: bool) {
        let side = if desirable { "chosen" } else { "rejected" };
        self.metric(&format!("rewards/{side}"), reward);
        self.metric(&format!("logps/{side}"), batch.logp(segment));
    }

    /// What crosses the border besides the gradient.
    pub fn finish(self) -> Outcome {
        Outcome { loss: self.loss, metrics: self.metrics.into() }
    }
}

//! Optimizer steps made by hand or at random, with everything that a host would prepare.

use crate::abi::{ObjectiveObject, make_objective};
use crate::batch::{Batch, Metric, Segment, Step, pairs};
use crate::fault::Fault;
use crate::needs::{Kinds, Needs};
use crate::objective::Objective;
use crate::sample::{Feedback, Kind};
use abi_stable::std_types::ROption;

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

    /// Computes [`Case::log_ratios`] from the log-probs.
    pub fn refresh(&mut self) {
        let sum = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>();
        let ratio = |s: &Segment| sum(&self.logps[s.range()]) - sum(&self.ref_logps[s.range()]);
        self.log_ratios = self.segments.iter().map(ratio).collect();
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

    fn step(&self, needs: Needs) -> Step<'_> {
        let mut by_kind = [0; 5];
        self.segments.iter().for_each(|s| by_kind[s.kind as usize] += 1);
        let given = |need, values: &'_ [f64]| if needs.contains(need) { values.len() } else { 0 };
        let ratios = given(Needs::STEP_LOG_RATIOS, &self.log_ratios);
        let mismatched = given(Needs::MISMATCHED, &self.mismatched);
        Step {
            number: self.number,
            steps: 10,
            training: !self.evaluation,
            groups: self.groups() as u64,
            segments: self.segments.len() as u64,
            pairs: pairs(&self.segments).count() as u64,
            tokens: self.logps.len() as u64,
            by_kind,
            log_ratios: self.log_ratios[..ratios].into(),
            mismatched: self.mismatched[..mismatched].into(),
        }
    }
}

/// Makes cases that an objective declares to understand.
pub(super) struct Maker {
    /// The kinds of a group's responses, one entry per sort of group that is accepted.
    families: Vec<Vec<Kind>>,
    /// Fewest responses of a group.
    at_least: u64,
}

/// A response of an extreme case: which of the step's responses it is → tokens, log-prob of the
/// policy and of the reference per token.
type Shape = fn(usize) -> (usize, f32, f32);

/// Cases that real training meets at its edges. The log-probs are exact in f32, and stay so when
/// they are moved by a difference quotient's step.
const EXTREMES: [(&str, Shape); 7] = [
    ("policy = reference", |i| (i + 1, -1.5, -1.5)),
    ("log-ratio +1e4", |_| (8, -1.0, -1251.0)),
    ("log-ratio -1e4", |_| (8, -1251.0, -1.0)),
    ("log-ratios of +1e4 and -1e4", |i| {
        if i.is_multiple_of(2) { (8, -1251.0, -1.0) } else { (8, -1.0, -1251.0) }
    }),
    ("one token each", |i| (1, -2.0 - i as f32, -3.0)),
    ("32,768 tokens", |i| if i == 0 { (32_768, -0.5, -0.75) } else { (3, -0.5, -0.75) }),
    ("a certain policy", |_| (4, 0.0, -0.25)),
];

impl Maker {
    pub(super) fn new(needs: Needs, accepts: Kinds) -> Self {
        let kinds = Kind::ALL.into_iter().filter(|k| accepts.contains(Kinds::of(*k)));
        let mut families: Vec<Vec<Kind>> = kinds.map(|k| vec![k]).collect();
        if needs.contains(Needs::PAIRS) {
            families.clear();
        }
        if accepts.contains(Kinds::PAIR) {
            families.push(vec![Kind::Chosen, Kind::Rejected]);
        }
        Self { families, at_least: if needs.contains(Needs::GROUPS) { 2 } else { 1 } }
    }

    /// Steps with log-probs close to the reference and far from it, in turn.
    pub(super) fn random_steps(&self) -> Vec<Case> {
        (1..=6).map(|seed| self.random(seed, [0.25, 4.0][seed as usize % 2])).collect()
    }

    /// Every one of [`EXTREMES`] with feedback of both sorts, with good alone and with bad alone.
    pub(super) fn extreme_steps(&self) -> Vec<Case> {
        let sorts = [(None, ""), (Some(true), ", all good"), (Some(false), ", all bad")];
        let steps = EXTREMES.into_iter().flat_map(|(name, shape)| {
            sorts.map(|(good, words)| self.extreme(&format!("{name}{words}"), shape, good))
        });
        steps.collect()
    }

    /// Four groups of every sort; log-ratios of a token within `spread`.
    fn random(&self, seed: u64, spread: f64) -> Case {
        let mut rng = Rng(seed);
        let mut case = Case { name: format!("random step {seed}"), ..Case::new() };
        for family in std::iter::repeat_n(&self.families, 4).flatten() {
            let mut responses = Vec::new();
            for kind in family {
                let fewest = self.at_least.div_ceil(family.len() as u64);
                for _ in 0..fewest + rng.below(3) {
                    let value = rng.below(17) as f32 / 16.0;
                    let tokens = 1 + rng.below(6);
                    let ref_logps: Vec<f32> = (0..tokens).map(|_| rng.exact(-8.0, -4.0)).collect();
                    let logps = ref_logps.iter().map(|r| r + rng.exact(-spread, spread)).collect();
                    responses.push((feedback(*kind, value), logps, ref_logps));
                }
            }
            case = case.group(&borrowed(&responses));
        }
        // Both signs of their mean have to occur.
        let mean = if seed.is_multiple_of(2) { 2.0 } else { -2.0 };
        let mismatched = (0..case.segments.len()).map(|_| mean + f64::from(rng.exact(-4.0, 4.0)));
        case.mismatched = mismatched.collect();
        case
    }

    /// All feedback as good or as bad as it can be, or both in turn.
    fn extreme(&self, name: &str, shape: Shape, good: Option<bool>) -> Case {
        let mut case = Case { name: name.to_owned(), ..Case::new() };
        for family in std::iter::repeat_n(&self.families, 2).flatten() {
            let mut responses = Vec::new();
            for kind in family {
                for _ in 0..self.at_least.div_ceil(family.len() as u64) {
                    let i = case.segments.len() + responses.len();
                    let (tokens, logp, ref_logp) = shape(i);
                    let value = f32::from(good.unwrap_or(i.is_multiple_of(2)));
                    let feedback = feedback(*kind, value);
                    responses.push((feedback, vec![logp; tokens], vec![ref_logp; tokens]));
                }
            }
            case = case.group(&borrowed(&responses));
        }
        case.mismatched = case.log_ratios.iter().rev().copied().collect();
        case
    }
}

type OwnedResponse = (Feedback, Vec<f32>, Vec<f32>);

fn borrowed(responses: &[OwnedResponse]) -> Vec<(Feedback, &[f32], &[f32])> {
    responses.iter().map(|(f, l, r)| (*f, l.as_slice(), r.as_slice())).collect()
}

fn feedback(kind: Kind, value: f32) -> Feedback {
    match kind {
        Kind::Demonstration => Feedback::Demonstration,
        Kind::Score => Feedback::Score(value),
        Kind::Binary => Feedback::Binary(value > 0.5),
        Kind::Chosen => Feedback::Chosen(ROption::RSome(value)),
        Kind::Rejected => Feedback::Rejected(ROption::RSome(value)),
    }
}

/// `splitmix64`: the same numbers on every machine.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// `0..n`.
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A multiple of 2^-10 in `low..high`.
    fn exact(&mut self, low: f64, high: f64) -> f32 {
        let (low, high) = ((low * 1024.0) as i64, (high * 1024.0) as i64);
        (low + self.below((high - low) as u64) as i64) as f32 / 1024.0
    }
}

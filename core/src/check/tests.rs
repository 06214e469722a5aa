//! Objectives with one planted fault each: every check has to bite, and only where it should.

use super::*;
use crate::prelude::*;
use std::sync::atomic::{AtomicU64, Ordering};

const SOUND: u8 = 0;
const WRONG_SIGN: u8 = 1;
const WRONG_SCALE: u8 = 2;
const LAST_TOKEN_UNWRITTEN: u8 = 3;
const ADDED_TO_NOTHING: u8 = 4;
const NAN_AT_EXTREMES: u8 = 5;
const BATCH_NORMALISED: u8 = 6;
const RANDOM: u8 = 7;
const ORDER: u8 = 8;
const UNDECLARED_REFERENCE: u8 = 9;
const UNDECLARED_COUNTS: u8 = 10;
const UNDECLARED_TOKENS: u8 = 11;
const UNKNOWN_NEED: u8 = 12;
const ACCEPTS_NOTHING: u8 = 13;
const PAIRS_OF_WHAT: u8 = 14;
const NAN_METRIC: u8 = 15;
const PANIC: u8 = 16;
const KINK: u8 = 17;
const KINK_WRONG: u8 = 18;
const BALANCED: u8 = 19;

static CALLS: AtomicU64 = AtomicU64::new(0);

/// `mean of -log sigmoid(±beta * d)`, apart from its fault.
struct Planted<const FAULT: u8>;

impl<const FAULT: u8> Objective for Planted<FAULT> {
    const NAME: &'static str = "planted";
    const ABOUT: &'static str = "";

    fn new(_: &mut Params) -> Self {
        Self
    }

    fn needs(&self) -> Needs {
        match FAULT {
            UNDECLARED_REFERENCE => Needs::NOTHING,
            UNKNOWN_NEED => Needs(1 << 40),
            PAIRS_OF_WHAT => Needs::PAIRS,
            _ => Needs::REFERENCE,
        }
    }

    fn accepts(&self) -> Kinds {
        if FAULT == ACCEPTS_NOTHING { Kinds(0) } else { Kinds::BINARY | Kinds::SCORE }
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        assert!(FAULT != PANIC, "on purpose");
        let n = match FAULT {
            BATCH_NORMALISED => batch.segments().len() as f64,
            UNDECLARED_COUNTS => batch.step.tokens as f64,
            _ => batch.step.segments as f64,
        };
        for (i, s) in batch.segments().iter().enumerate() {
            let sign = if s.value > 0.5 { 1.0 } else { -1.0 };
            let mut d = sign * 0.1 * batch.log_ratio(s);
            if FAULT == UNDECLARED_TOKENS {
                d += sign * 0.1 * f64::from(batch.logps[s.range()][0]);
            }
            let (loss, slope) = match FAULT {
                NAN_AT_EXTREMES => {
                    let p = 1.0 / (1.0 + (-d).exp());
                    (-p.ln(), p - 1.0)
                }
                KINK | KINK_WRONG if d == 0.0 => (1.0, if FAULT == KINK { -0.3 } else { 0.5 }),
                KINK | KINK_WRONG => ((1.0 - d).min(1.0), if d > 0.0 { -1.0 } else { 0.0 }),
                _ => (math::softplus(-d), -math::sigmoid(-d)),
            };
            let weight = match FAULT {
                BALANCED => {
                    let [scores, thumbs] = [1, 2].map(|kind| batch.step.by_kind[kind] as f64);
                    if s.kind == Kind::Score { scores / thumbs } else { thumbs / scores }
                }
                RANDOM => 1.0 + CALLS.fetch_add(1, Ordering::Relaxed) as f64 * 1e-9,
                ORDER => 1.0 + i as f64,
                _ => 1.0,
            };
            out.loss(weight * loss / n);
            let slope = weight * slope * sign * 0.1 / n;
            match FAULT {
                WRONG_SIGN => out.gradient(s, -slope),
                WRONG_SCALE => out.gradient(s, 1.001 * slope),
                LAST_TOKEN_UNWRITTEN => {
                    out.token_gradients(s)[..s.tokens as usize - 1].fill(slope as f32);
                }
                ADDED_TO_NOTHING => out.add_gradient(s, slope),
                UNDECLARED_TOKENS => {
                    out.gradient(s, slope);
                    out.token_gradients(s)[0] *= 2.0;
                }
                _ => out.gradient(s, slope),
            }
            if FAULT == NAN_METRIC {
                out.metric("ratio", f64::NAN);
            }
        }
        Ok(())
    }
}

/// The names of the failed checks and what the first of them says.
fn failures(report: &Report) -> (Vec<&'static str>, String) {
    let failed = report.checks.iter().filter(|check| check.outcome.is_err());
    let names = failed.clone().map(|check| check.name).collect();
    (names, failed.clone().next().map_or(String::new(), |c| c.outcome.clone().unwrap_err()))
}

#[track_caller]
fn bites<T: Objective>(checks: &[&str], says: &str) {
    let report = objective::<T>("{}");
    let (names, why) = failures(&report);
    assert_eq!(names, checks, "{report}");
    assert!(why.contains(says), "{why}");
    assert!(!report.passed() && report.to_string().contains("FAIL"));
}

/// The checks of numbers that are not there.
const FINITE: [&str; 3] =
    ["finite on random steps", "finite at extremes", "finite on degenerate steps"];

#[test]
fn a_sound_objective_passes() {
    let report = objective::<Planted<SOUND>>("{}");
    report.expect_passed();
    let names: Vec<&str> = report.checks.iter().map(|check| check.name).collect();
    let all = [
        "declarations",
        "finite on random steps",
        "finite at extremes",
        "finite on degenerate steps",
        "gradient",
        "deterministic",
        "independent of the split",
        "uses only what it declares",
        "state",
        "time per call",
    ];
    assert_eq!(names, all);
    assert!(report.to_string().contains(" for 65536 tokens of 256 responses"), "{report}");
}

#[test]
fn wrong_gradients_are_found() {
    bites::<Planted<WRONG_SIGN>>(&["gradient"], "by central differences");
    bites::<Planted<WRONG_SCALE>>(&["gradient"], "by central differences");
}

#[test]
fn missing_and_infinite_numbers_are_found() {
    bites::<Planted<LAST_TOKEN_UNWRITTEN>>(&FINITE, "is NaN or was never set");
    bites::<Planted<ADDED_TO_NOTHING>>(&FINITE, "is NaN or was never set");
    bites::<Planted<NAN_METRIC>>(&FINITE, "the metric `ratio` is NaN");
    bites::<Planted<NAN_AT_EXTREMES>>(&["finite at extremes"], "the loss is inf");
}

#[test]
fn a_missing_kind_is_tried() {
    let report = objective::<Planted<BALANCED>>("{}");
    let (names, why) = failures(&report);
    assert_eq!(names, ["finite on degenerate steps"], "{report}");
    assert!(why.starts_with("score responses alone: the loss is "), "{why}");
}

#[test]
fn what_depends_on_more_than_the_step_is_found() {
    bites::<Planted<BATCH_NORMALISED>>(&["independent of the split"], "in two batches");
    bites::<Planted<ORDER>>(&["independent of the split"], "`batch.step`");
    let report = objective::<Planted<RANDOM>>("{}");
    assert!(failures(&report).0.contains(&"deterministic"), "{report}");
}

#[test]
fn undeclared_use_is_found() {
    let report = objective::<Planted<UNDECLARED_REFERENCE>>("{}");
    assert!(failures(&report).1.contains("does it use the reference"), "{report}");
    bites::<Planted<UNDECLARED_COUNTS>>(&["uses only what it declares"], "token counts matter");
    bites::<Planted<UNDECLARED_TOKENS>>(&["uses only what it declares"], "single tokens matter");
}

#[test]
fn unsound_declarations_end_the_check() {
    bites::<Planted<UNKNOWN_NEED>>(&["declarations"], "unknown bits in needs 0x10000000000");
    bites::<Planted<ACCEPTS_NOTHING>>(&["declarations"], "accepts no feedback");
    bites::<Planted<PAIRS_OF_WHAT>>(&["declarations"], "needs pairs");
    let report = objective::<Planted<SOUND>>(r#"{"gamma": 1}"#);
    assert!(failures(&report).1.contains("unknown parameter `gamma`"), "{report}");
}

#[test]
fn a_panic_is_a_failed_check() {
    bites::<Planted<PANIC>>(&FINITE, "`planted` panicked: on purpose");
}

#[test]
fn at_a_kink_any_slope_between_its_sides_is_right() {
    objective::<Planted<KINK>>("{}").expect_passed();
    bites::<Planted<KINK_WRONG>>(&["gradient"], "policy = reference");
}

const FORGETFUL: u8 = 0;
const SECRET: u8 = 1;
const LEARNS_IN_EVALUATION: u8 = 2;
const BATCHES_COUNT: u8 = 3;
const HONEST: u8 = 4;
const THROUGH_THE_MEAN: u8 = 5;
const ONCE_PER_PROCESS: u8 = 6;

/// `(d - 2 * running mean of the steps' log-ratios)^2`, apart from its fault.
struct Stateful<const FAULT: u8> {
    mean: f64,
    batches: AtomicU64,
}

impl<const FAULT: u8> Objective for Stateful<FAULT> {
    const NAME: &'static str = "stateful";
    const ABOUT: &'static str = "";

    fn new(_: &mut Params) -> Self {
        Self { mean: 0.0, batches: AtomicU64::new(0) }
    }

    fn needs(&self) -> Needs {
        let needs = Needs::REFERENCE | Needs::STEP_LOG_RATIOS;
        if FAULT == SECRET || FAULT == THROUGH_THE_MEAN { needs } else { needs | Needs::STATE }
    }

    fn accepts(&self) -> Kinds {
        Kinds::DEMONSTRATION
    }

    fn begin_step(&mut self, step: &Step) -> Result<(), Fault> {
        if FAULT == ONCE_PER_PROCESS {
            self.batches.store(0, Ordering::Relaxed);
        }
        let mean = step.log_ratios.iter().sum::<f64>() / step.segments as f64;
        if FAULT == THROUGH_THE_MEAN {
            self.mean = mean;
        } else if step.training || FAULT == LEARNS_IN_EVALUATION {
            self.mean = 0.9 * self.mean + 0.1 * mean;
        }
        Ok(())
    }

    fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
        if self.batches.fetch_add(1, Ordering::Relaxed) == 0 && FAULT == ONCE_PER_PROCESS {
            out.loss(1.0);
        }
        let n = batch.step.segments as f64;
        for segment in batch.segments() {
            let d = batch.log_ratio(segment);
            let apart = d - 2.0 * self.mean;
            out.loss(apart * apart / n);
            // What comes through the mean, summed over the step, is 4 mean / n.
            let through = if FAULT == THROUGH_THE_MEAN { 2.0 * d } else { 2.0 * apart };
            out.gradient(segment, through / n);
        }
        Ok(())
    }

    fn save_state(&self) -> Vec<u8> {
        match FAULT {
            SECRET | THROUGH_THE_MEAN => Vec::new(),
            BATCHES_COUNT => {
                let count = self.batches.load(Ordering::Relaxed) as f64;
                [self.mean.to_le_bytes(), count.to_le_bytes()].concat()
            }
            _ => self.mean.to_le_bytes().to_vec(),
        }
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), Fault> {
        if let Some(mean) = state.first_chunk()
            && FAULT != FORGETFUL
        {
            self.mean = f64::from_le_bytes(*mean);
        }
        Ok(())
    }
}

#[test]
fn state_is_saved_restored_and_left_alone() {
    objective::<Stateful<HONEST>>("{}").expect_passed();
    bites::<Stateful<FORGETFUL>>(&["state"], "after load_state the next step differs");
    bites::<Stateful<SECRET>>(&["state"], "depends on earlier ones");
    bites::<Stateful<LEARNS_IN_EVALUATION>>(&["state"], "`training = false`");
    bites::<Stateful<BATCHES_COUNT>>(&["state"], "evaluating a batch changes");
}

#[test]
fn what_every_process_adds_once_is_found() {
    let report = objective::<Stateful<ONCE_PER_PROCESS>>("{}");
    assert_eq!(failures(&report).0, ["deterministic", "independent of the split"], "{report}");
    assert!(report.to_string().contains(" in four ranks, or its gradient"), "{report}");
}

struct OddAdapter<const FAULT: u8>;

impl<const FAULT: u8> FeedbackAdapter for OddAdapter<FAULT> {
    const NAME: &'static str = "odd";
    const ABOUT: &'static str = "";

    fn new(_: &mut Params) -> Self {
        Self
    }

    fn offers(&self) -> Kinds {
        if FAULT == ACCEPTS_NOTHING { Kinds(0) } else { Kinds::SCORE }
    }

    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault> {
        let calls = CALLS.fetch_add(1, Ordering::Relaxed);
        assert!(FAULT != PANIC || record.text("response").is_ok(), "on purpose");
        let name = if FAULT == RANDOM { format!("{calls}") } else { "prompt".into() };
        let prompt = record.text(&name)?;
        let score = if FAULT == WRONG_SCALE { 7.0 } else { 0.5 };
        let answer = Content::text("answer");
        Ok(vec![Sample::new(Content::text(prompt)).response(answer, Feedback::Score(score))])
    }
}

#[test]
fn adapters_are_checked_on_odd_records_and_on_their_own() {
    let report = adapter::<OddAdapter<SOUND>>("{}", &[r#"{"prompt": "a"}"#]);
    report.expect_passed();
    assert!(report.to_string().contains("ok    its records: 1 of them, 1 samples"), "{report}");
    let report = adapter::<OddAdapter<SOUND>>("{}", &[r#"{"text": "a"}"#]);
    assert_eq!(failures(&report).0, ["its records"], "{report}");
    for (report, check, says) in [
        (adapter::<OddAdapter<PANIC>>("{}", &[]), "odd records", "panicked: on purpose"),
        (adapter::<OddAdapter<RANDOM>>("{}", &[]), "odd records", "understands it differently"),
        (adapter::<OddAdapter<WRONG_SCALE>>("{}", &[]), "odd records", "gives a score of 7"),
        (adapter::<OddAdapter<ACCEPTS_NOTHING>>("{}", &[]), "declarations", "offers no feedback"),
        (adapter::<OddAdapter<SOUND>>(r#"{"a": 1}"#, &[]), "declarations", "unknown parameter"),
    ] {
        let (names, why) = failures(&report);
        assert_eq!(names, [check], "{report}");
        assert!(why.contains(says), "{why}");
    }
}

#[test]
fn a_statistic_of_the_step_may_be_differentiated_through() {
    let report = objective::<Stateful<THROUGH_THE_MEAN>>("{}");
    report.expect_passed();
    assert!(report.to_string().contains("through the step's log-ratios too"), "{report}");
}

#[test]
fn a_case_by_hand_knows_its_totals() {
    let case = Case::new()
        .group(&[
            (Feedback::Binary(true), &[-1.0, -2.0], &[-1.5, -2.0]),
            (Feedback::Binary(false), &[-1.0], &[-0.25]),
        ])
        .group(&[(Feedback::Score(1.0), &[-3.0], &[-3.0])]);
    assert_eq!((case.groups(), case.log_ratios.as_slice()), (2, &[0.5, -0.75, 0.0][..]));
    let mut sound = make_objective::<Planted<SOUND>>("{}").into_result().unwrap();
    let seen = case.run(&mut sound).unwrap();
    let expected = [0.05, 0.075, 0.0].map(|x: f64| math::softplus(-x)).iter().sum::<f64>() / 3.0;
    assert!((seen.loss - expected).abs() < 1e-15);
    assert_eq!(seen.dlogp[3], -0.05 / 3.0);
    let part = case.evaluate(&sound, &[1]).unwrap();
    assert!(part.dlogp[..3].iter().all(|g| g.is_nan()) && part.dlogp[3] == seen.dlogp[3]);
}

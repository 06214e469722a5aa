//! The test kit for authors of plugins: is an objective what its trait says it is?
//!
//! [`objective`] tries a Rust type, in the author's own `cargo test`; [`check_objective`] whatever
//! makes objectives, such as a loaded library (`uft plugin check`). Both build steps that fit what
//! the objective declares, random, extreme and degenerate ones, and compare its gradient with
//! central differences of its loss. [`Case`] is a step made by hand, for expected numbers.
//! [`adapter`] and [`check_adapter`] are the same for feedback adapters; [`adapt`] runs one on a
//! record.
//!
//! ```
//! # use uft_core::prelude::*;
//! # struct Mine;
//! # impl Objective for Mine {
//! #     const NAME: &'static str = "mine";
//! #     const ABOUT: &'static str = "";
//! #     fn new(_: &mut Params) -> Self { Self }
//! #     fn accepts(&self) -> Kinds { Kinds::DEMONSTRATION }
//! #     fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
//! #         for segment in batch.segments() {
//! #             out.loss(-batch.logp(segment) / batch.step.segments as f64);
//! #             out.gradient(segment, -1.0 / batch.step.segments as f64);
//! #         }
//! #         Ok(())
//! #     }
//! # }
//! uft_core::check::objective::<Mine>("{}").expect_passed();
//! ```

mod adapter;
mod case;
mod gradient;
mod properties;
mod steps;
#[cfg(test)]
mod tests;
mod timing;

pub use adapter::{MakeAdapter, check_adapter};
pub use case::{Case, Evaluated};

use crate::abi::{AdapterObject, ObjectiveObject, make_adapter, make_objective};
use crate::adapter::FeedbackAdapter;
use crate::fault::Fault;
use crate::objective::Objective;
use crate::sample::Sample;
use std::fmt;
use steps::Maker;

/// Makes the objective anew; called for every evaluation that must not see an earlier one.
pub type Make<'a> = &'a mut dyn FnMut() -> Result<ObjectiveObject, Fault>;

/// One property that was checked.
#[derive(Clone, Debug)]
pub struct Check {
    /// What was checked.
    pub name: &'static str,
    /// What was seen, or what is wrong.
    pub outcome: Result<String, String>,
}

/// What was found out about an objective or an adapter. Displays as one line per check.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its name.
    pub name: String,
    /// What was checked, in order.
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether every check passed.
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.outcome.is_ok())
    }

    /// Adds a check and says whether it passed.
    fn add(&mut self, name: &'static str, outcome: Outcome) -> bool {
        let passed = outcome.is_ok();
        self.checks.push(Check { name, outcome });
        passed
    }

    /// # Panics
    /// With the whole report if a check failed.
    #[track_caller]
    pub fn expect_passed(&self) {
        assert!(self.passed(), "{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)?;
        for Check { name, outcome } in &self.checks {
            match outcome {
                Ok(seen) => write!(f, "\n  ok    {name}: {seen}")?,
                Err(wrong) => write!(f, "\n  FAIL  {name}: {wrong}")?,
            }
        }
        Ok(())
    }
}

/// Checks an objective type with parameters given as a JSON object.
pub fn objective<T: Objective>(params: &str) -> Report {
    check_objective(T::NAME, &mut || make_objective::<T>(params).into_result())
}

/// Checks the objectives that `make` gives. A panic inside one is a failed check.
pub fn check_objective(name: &str, make: Make) -> Report {
    let mut report = Report { name: name.to_owned(), checks: Vec::new() };
    let declared = properties::declarations(make);
    report.add("declarations", declared.clone().map(|(_, _, seen)| seen));
    // Without sound declarations there is nothing to try.
    let Ok((needs, accepts, _)) = declared else { return report };
    let maker = Maker::new(needs, accepts);
    let random = maker.random_steps();
    let (mut edges, degenerate) = (maker.extreme_steps(), maker.degenerate_steps());
    let there = report.add("finite on random steps", properties::finite(make, &random));
    report.add("finite at extremes", properties::finite(make, &edges));
    report.add("finite on degenerate steps", properties::finite(make, &degenerate));
    edges.extend(degenerate);
    // Numbers that are not there cannot be compared.
    if there {
        report.add("gradient", gradient::gradient(make, needs, &random, &edges));
        report.add("deterministic", properties::deterministic(make, &random));
        report.add("independent of the split", properties::split(make, &random));
        report.add("uses only what it declares", properties::declared_use(make, needs, &random));
        report.add("state", properties::state(make, needs, &random));
        report.add("time per call", timing::timing(make, needs, &maker));
    }
    report
}

/// Checks an adapter type with parameters given as a JSON object, on odd records and on some that it
/// is meant for, each a JSON object.
pub fn adapter<T: FeedbackAdapter>(params: &str, records: &[&str]) -> Report {
    check_adapter(T::NAME, &mut || make_adapter::<T>(params).into_result(), records)
}

/// Makes an adapter from its parameters and runs it on one record, both JSON objects.
///
/// # Errors
/// The first fault.
pub fn adapt<T: FeedbackAdapter>(params: &str, record: &str) -> Result<Vec<Sample>, Fault> {
    let adapter: AdapterObject = make_adapter::<T>(params).into_result()?;
    adapter.adapt(record.into()).into_result().map(Vec::from)
}

/// What was seen, or what is wrong.
type Outcome = Result<String, String>;

//! What the `uft` host and its plugins both speak.
//!
//! A plugin is a shared library that exports **objectives** (feedback and log-probs in, loss and
//! its gradient out) or **feedback adapters** (a JSON record in, samples out), or both. Its author
//! implements [`Objective`] or [`FeedbackAdapter`] for a plain struct and names it in [`plugin!`];
//! everything about the stable ABI, panics included, is behind that macro.
//!
//! ```
//! use uft_core::prelude::*;
//!
//! /// `-log pi(y|x)` per response: maximum likelihood without a reference.
//! struct Likelihood { scale: f64 }
//!
//! impl Objective for Likelihood {
//!     const NAME: &'static str = "likelihood";
//!     const ABOUT: &'static str = "-scale * log pi(y|x), the mean over responses";
//!
//!     fn new(params: &mut Params) -> Self {
//!         Self { scale: params.number("scale", 1.0, Bound::Positive, "factor of the loss") }
//!     }
//!
//!     fn accepts(&self) -> Kinds { Kinds::DEMONSTRATION }
//!
//!     fn evaluate(&self, batch: &Batch, out: &mut Evaluation) -> Result<(), Fault> {
//!         let n = batch.step.segments as f64;
//!         for segment in batch.segments() {
//!             out.loss(-self.scale * batch.logp(segment) / n);
//!             out.gradient(segment, -self.scale / n);
//!         }
//!         Ok(())
//!     }
//! }
//! # fn main() {}
//! ```
//!
//! An objective that reads only summed log-probs need not write its gradient: see [`dual`]. [`check`]
//! tries whatever is written, as `uft plugin check` does.
//!
//! The crate does no input or output. `abi_stable` is used here and nowhere else in the tree.

#![warn(missing_docs)]
// abi_stable's derives produce type names and impls that these two lints dislike.
#![allow(non_camel_case_types, non_local_definitions)]

pub mod abi;
pub mod adapter;
pub mod batch;
pub mod c;
pub mod check;
pub mod content;
pub mod dual;
pub mod export;
pub mod extension;
pub mod fault;
pub mod guard;
pub mod math;
mod mismatch;
pub mod needs;
pub mod objective;
pub mod params;
pub mod record;
pub mod sample;

/// Everything that a plugin's source usually needs.
pub mod prelude {
    pub use crate::adapter::FeedbackAdapter;
    pub use crate::batch::{Batch, Segment, Step};
    pub use crate::content::Chat;
    pub use crate::dual::{Dual64, DualNum, Summed};
    pub use crate::fault::Fault;
    pub use crate::math;
    pub use crate::needs::{Kinds, Needs};
    pub use crate::objective::{Evaluation, Objective};
    pub use crate::params::{Bound, Params};
    pub use crate::plugin;
    pub use crate::record::Record;
    pub use crate::sample::{Content, Feedback, Kind, Message, Response, Sample, Turns};
}

pub use prelude::*;

//! The trait of a feedback adapter.

use crate::fault::Fault;
use crate::needs::Kinds;
use crate::params::Params;
use crate::record::Record;
use crate::sample::Sample;

/// Turns a data record into samples.
///
/// Every adapter understands the parameter `columns = { field = "name in the record" }` without
/// doing anything for it: records are renamed before they arrive.
pub trait FeedbackAdapter: Sized + Send + Sync + 'static {
    /// The name in `adapter = "…"`.
    const NAME: &'static str;
    /// One line: which records it understands.
    const ABOUT: &'static str;

    /// Reads the parameters. Wrong values are collected by [`Params`] and reported after.
    fn new(params: &mut Params) -> Self;

    /// The feedback kinds that its samples carry.
    fn offers(&self) -> Kinds;

    /// The samples of one record; usually one.
    ///
    /// # Errors
    /// If the record cannot be understood: what is missing or wrong, in one line.
    fn adapt(&self, record: &Record) -> Result<Vec<Sample>, Fault>;
}

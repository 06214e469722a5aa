//! A feedback adapter of a plugin, with its samples checked.

use super::environment::kept;
use super::{BUG, fault};
use crate::{Error, Result};
use uft_core::abi::AdapterObject;
use uft_core::{Kinds, Sample};

/// A feedback adapter of a plugin.
pub struct Adapter {
    pub name: String,
    object: AdapterObject,
}

impl Adapter {
    pub(super) fn new(name: &str, object: AdapterObject) -> Self {
        Self { name: name.to_owned(), object }
    }

    /// The plugin's object, for the check.
    pub fn into_object(self) -> AdapterObject {
        self.object
    }

    /// The feedback kinds of its samples.
    pub fn offers(&self) -> Kinds {
        self.object.offers()
    }

    /// The samples of one record, given as a line of JSON.
    ///
    /// # Errors
    /// If the record cannot be understood, or the plugin panicked or gave a sample that cannot be.
    pub fn adapt(&self, record: &str) -> Result<Vec<Sample>> {
        let samples = kept(&self.name, || self.object.adapt(record.into())).into_result();
        let samples = samples.map_err(|f| fault(&self.name, &f))?;
        for sample in &samples {
            sample.check(self.offers()).map_err(|what| {
                Error::plugin(format!("plugin `{}` gave {what}; {BUG}", self.name))
            })?;
        }
        Ok(samples.into_iter().collect())
    }
}

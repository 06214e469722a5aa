//! An objective of a plugin, with everything checked that comes back from it.

use super::{BUG, fault};
use crate::{Error, Result};
use uft_core::abi::ObjectiveObject;
use uft_core::batch::{Batch, Outcome, Step};
use uft_core::{Kinds, Needs};

/// An objective of a plugin.
pub struct Objective {
    pub name: String,
    pub needs: Needs,
    pub accepts: Kinds,
    object: ObjectiveObject,
}

impl Objective {
    /// # Errors
    /// If it needs something that this host has no word for, or accepts no feedback.
    pub fn new(name: &str, object: ObjectiveObject) -> Result<Self> {
        let needs = object.needs();
        if needs.unknown() != 0 {
            return Err(Error::plugin(format!(
                "plugin `{name}`: it needs something that this host does not know (bits {:#x}); use a newer host",
                needs.unknown()
            )));
        }
        let accepts = object.accepts();
        if accepts.names().is_empty() {
            return Err(Error::plugin(format!("plugin `{name}`: it accepts no feedback; {BUG}")));
        }
        Ok(Self { name: name.to_owned(), needs, accepts, object })
    }

    pub fn needs(&self, need: Needs) -> bool {
        self.needs.contains(need)
    }

    /// The plugin's object, for the gradient check.
    pub fn into_object(self) -> ObjectiveObject {
        self.object
    }

    /// # Errors
    /// If the plugin fails.
    pub fn begin_step(&mut self, step: &Step<'_>) -> Result<()> {
        self.object.begin_step(step).into_result().map_err(|f| fault(&self.name, &f))
    }

    /// Loss, metrics and the gradient `dlogp[t]`, which has the length of `batch.logps`.
    ///
    /// # Errors
    /// If the plugin fails, or leaves a gradient or the loss unwritten, infinite or NaN.
    pub fn evaluate(&self, batch: &Batch<'_>, dlogp: &mut [f32]) -> Result<Outcome> {
        // What the plugin does not write stays NaN and is found.
        dlogp.fill(f32::NAN);
        let outcome = self.object.evaluate(batch, (&mut *dlogp).into()).into_result();
        let outcome = outcome.map_err(|f| fault(&self.name, &f))?;
        let bad = dlogp.iter().filter(|g| !g.is_finite()).count();
        if bad > 0 {
            let inputs =
                batch.logps.iter().chain(batch.ref_logps.iter()).filter(|p| !p.is_finite()).count();
            return Err(match inputs {
                0 => Error::plugin(format!(
                    "plugin `{0}`: the gradient of {bad} of {1} tokens is unwritten or not finite, though every \
                     log-prob is finite; {BUG} (`uft plugins check` shows more)",
                    self.name,
                    dlogp.len()
                )),
                n => Error::non_finite(format!(
                    "{n} log-probs are not finite before plugin `{}` ran",
                    self.name
                )),
            });
        }
        if !outcome.loss.is_finite() {
            return Err(Error::non_finite(format!(
                "plugin `{0}`: the loss is {1}, though its gradient is finite; check its parameters, and \
                 the plugin itself with `uft plugins check {0}`",
                self.name, outcome.loss
            )));
        }
        Ok(outcome)
    }

    /// # Errors
    /// If the plugin fails.
    pub fn save_state(&self) -> Result<Vec<u8>> {
        let state = self.object.save_state().into_result();
        Ok(state.map_err(|f| fault(&self.name, &f))?.into_iter().collect())
    }

    /// Takes back what [`save_state`](Objective::save_state) gave.
    ///
    /// # Errors
    /// If the plugin fails.
    pub fn load_state(&mut self, state: &[u8]) -> Result<()> {
        self.object.load_state(state.into()).into_result().map_err(|f| fault(&self.name, &f))
    }
}

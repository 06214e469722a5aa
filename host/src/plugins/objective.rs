//! An objective of a plugin, with everything checked that comes back from it.

use super::environment::kept;
use super::library::Module;
use super::{BUG, fault};
use crate::config::{PluginRef, Ramp};
use crate::{Error, Result};
use uft_core::abi::ObjectiveObject;
use uft_core::batch::{Batch, Metric, Outcome, Step};
use uft_core::{Kinds, Needs};

/// An objective of a plugin.
pub struct Objective {
    pub name: String,
    pub needs: Needs,
    pub accepts: Kinds,
    object: ObjectiveObject,
    module: Module,
    plugin: PluginRef,
    /// Parameters that change from step to step, and what they are now.
    ramps: Vec<(String, Ramp, f64)>,
}

impl Objective {
    /// Makes an objective from its place in the configuration. Where a parameter follows a schedule, both
    /// of its ends are tried.
    ///
    /// # Errors
    /// If the plugin refuses its parameters, needs something that this host has no word for, or accepts
    /// no feedback.
    pub fn new(module: Module, plugin: &PluginRef) -> Result<Self> {
        let name = plugin.plugin.as_str();
        let mut ramps = Vec::new();
        for (key, value) in &plugin.params {
            let ramp = Ramp::of(value);
            let ramp =
                ramp.map_err(|why| Error::config(format!("plugin `{name}`, {key}: {why}")))?;
            ramps.extend(ramp.map(|ramp| (key.clone(), ramp, ramp.to)));
        }
        let object = make(module, plugin, &ramps)?;
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
        let (name, plugin) = (name.to_owned(), plugin.clone());
        let mut objective = Self { name, needs, accepts, object, module, plugin, ramps };
        let starts = objective.ramps.iter().map(|(_, ramp, _)| ramp.from).collect();
        objective.set(starts)?;
        Ok(objective)
    }

    /// Gives the parameters that follow a schedule their values at optimizer step `step` (from 0) of
    /// `steps`. The objective is made anew with them and keeps its state.
    ///
    /// # Errors
    /// If the plugin refuses a value, or then needs or accepts something else.
    pub fn at(&mut self, step: u64, steps: u64) -> Result<()> {
        self.set(self.ramps.iter().map(|(_, ramp, _)| ramp.at(step, steps)).collect())
    }

    fn set(&mut self, values: Vec<f64>) -> Result<()> {
        if self.ramps.iter().map(|(.., now)| *now).eq(values.iter().copied()) {
            return Ok(());
        }
        let state = if self.needs(Needs::STATE) { Some(self.save_state()?) } else { None };
        self.ramps.iter_mut().zip(values).for_each(|((.., now), value)| *now = value);
        let object = make(self.module, &self.plugin, &self.ramps)?;
        if (object.needs(), object.accepts()) != (self.needs, self.accepts) {
            let keys: Vec<&str> = self.ramps.iter().map(|(key, ..)| key.as_str()).collect();
            return Err(Error::config(format!(
                "plugin `{}`: what it needs or accepts depends on {}, which then cannot follow a schedule",
                self.name,
                keys.join(", ")
            )));
        }
        let before = std::mem::replace(&mut self.object, object);
        kept(&self.name, || drop(before));
        match state {
            Some(state) => self.load_state(&state),
            None => Ok(()),
        }
    }

    /// The values of the parameters that follow a schedule, as metrics.
    pub fn scheduled(&self) -> impl Iterator<Item = Metric> {
        self.ramps.iter().map(|(key, _, now)| Metric {
            name: format!("{}/{key}", self.name).as_str().into(),
            sum: *now,
            count: 1.0,
        })
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
        kept(&self.name, || self.object.begin_step(step))
            .into_result()
            .map_err(|f| fault(&self.name, &f))
    }

    /// Loss, metrics and the gradient `dlogp[t]`, which has the length of `batch.logps`.
    ///
    /// # Errors
    /// If the plugin fails, or leaves a gradient or the loss unwritten, infinite or NaN.
    pub fn evaluate(&self, batch: &Batch<'_>, dlogp: &mut [f32]) -> Result<Outcome> {
        // What the plugin does not write stays NaN and is found.
        dlogp.fill(f32::NAN);
        let outcome = kept(&self.name, || self.object.evaluate(batch, (&mut *dlogp).into()));
        let outcome = outcome.into_result().map_err(|f| fault(&self.name, &f))?;
        let bad = dlogp.iter().filter(|g| !g.is_finite()).count();
        if bad > 0 {
            let inputs =
                batch.logps.iter().chain(batch.ref_logps.iter()).filter(|p| !p.is_finite()).count();
            return Err(match inputs {
                0 => Error::plugin(format!(
                    "plugin `{0}`: the gradient of {bad} of {1} tokens is unwritten or not finite, though every \
                     log-prob is finite; {BUG} (`uft plugin check` shows more)",
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
                 the plugin itself with `uft plugin check {0}`",
                self.name, outcome.loss
            )));
        }
        Ok(outcome)
    }

    /// # Errors
    /// If the plugin fails.
    pub fn save_state(&self) -> Result<Vec<u8>> {
        let state = kept(&self.name, || self.object.save_state()).into_result();
        Ok(state.map_err(|f| fault(&self.name, &f))?.into_iter().collect())
    }

    /// Takes back what [`save_state`](Objective::save_state) gave.
    ///
    /// # Errors
    /// If the plugin fails.
    pub fn load_state(&mut self, state: &[u8]) -> Result<()> {
        kept(&self.name, || self.object.load_state(state.into()))
            .into_result()
            .map_err(|f| fault(&self.name, &f))
    }
}

/// Makes the plugin's object, with the scheduled parameters' values of now.
fn make(
    module: Module,
    plugin: &PluginRef,
    ramps: &[(String, Ramp, f64)],
) -> Result<ObjectiveObject> {
    let mut plugin = plugin.clone();
    for (key, _, now) in ramps {
        plugin.params.insert(key.clone(), (*now).into());
    }
    let name = plugin.plugin.as_str();
    module.objective(name, &plugin.params_json())
}

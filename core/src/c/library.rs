//! The table of a library: read once, checked, and copied.

use super::declarations::*;
use super::objective::{Functions, Objective};
use super::param::Param;
use super::{Entry, read};
use crate::abi::{self, ObjectiveObject, Role, no_such_entry};
use crate::fault::Fault;
use crate::needs::{Kinds, Needs};
use std::mem::offset_of;

/// Most objectives of a library and most parameters of an objective: a larger number is a mistake.
const MOST: u64 = 1024;
/// Sizes of revision 1: with its last field.
const PLUGIN: usize = offset_of!(UftPlugin, objective_count) + size_of::<u64>();
const OBJECTIVE: usize = offset_of!(UftObjective, load_state) + size_of::<usize>();

/// The objectives of a library in C.
#[derive(Debug)]
pub struct Library {
    objectives: Vec<Objective>,
}

impl Library {
    /// Reads what stands behind a library's [`SYMBOL`](super::SYMBOL).
    ///
    /// # Safety
    /// `entry` is the function of that name in a library that is never unloaded, and what it points to
    /// is what it says.
    ///
    /// # Errors
    /// What is wrong with the table, in one line.
    pub unsafe fn open(entry: Entry) -> Result<Self, String> {
        // SAFETY: the caller's promise; so for every pointer below.
        let table = unsafe { entry() };
        if table.is_null() {
            return Err("its table is NULL".into());
        }
        // SAFETY: the first number is there in every revision.
        let revision = unsafe { table.cast::<u32>().read_unaligned() };
        if revision != UFT_C_REVISION {
            return Err(format!(
                "it speaks revision {revision} of the interface in C, this host speaks {UFT_C_REVISION}"
            ));
        }
        let at = offset_of!(UftPlugin, size);
        // SAFETY: as above.
        let table =
            unsafe { read::sized(table, at, PLUGIN) }.map_err(|e| format!("its table {e}"))?;
        let count = table.objective_count;
        if table.objectives.is_null() {
            return Err("its table's `objectives` is NULL".into());
        }
        if count == 0 || count > MOST {
            return Err(format!("its table has {count} objectives, not from 1 to {MOST}"));
        }
        let objective = |index: usize| {
            // SAFETY: as above.
            let read = unsafe { objective(table.objectives.add(index).read_unaligned()) };
            read.map_err(|why| format!("objective {index} of its table: {why}"))
        };
        let objectives = (0..count as usize).map(objective).collect::<Result<_, _>>()?;
        Ok(Self { objectives })
    }

    /// Everything that the library exports.
    pub fn entries(&self) -> Vec<abi::Entry> {
        let entry = |objective: &Objective| abi::Entry {
            role: Role::Objective,
            name: objective.name.as_str().into(),
            about: objective.about.as_str().into(),
            params: abi::documented(|params| {
                objective.params.iter().for_each(|param| drop(param.read(params)));
            }),
        };
        self.objectives.iter().map(entry).collect()
    }

    /// An objective by name, from its parameters as a JSON object.
    ///
    /// # Errors
    /// If the library has none of that name, or refuses the parameters.
    pub fn objective(&'static self, name: &str, params: &str) -> Result<ObjectiveObject, Fault> {
        match self.objectives.iter().find(|objective| objective.name == name) {
            Some(objective) => objective.make(params),
            None => Err(no_such_entry(name.into())),
        }
    }
}

/// An objective of the table.
///
/// # Safety
/// As [`Library::open`].
unsafe fn objective(from: *const UftObjective) -> Result<Objective, String> {
    // SAFETY: the caller's promise; so for every pointer below.
    let table = unsafe { read::sized(from, offset_of!(UftObjective, size), OBJECTIVE) }
        .map_err(|why| format!("it {why}"))?;
    // SAFETY: as above.
    let text = |what: &str, from| match unsafe { read::text(from) } {
        Ok(text) if text.trim().is_empty() => Err(format!("`{what}` is empty")),
        text => text.map_err(|why| format!("`{what}` {why}")),
    };
    let name = text("name", table.name)?;
    let of = |why: String| format!("`{name}`: {why}");
    let about = text("about", table.about).map_err(of)?;
    let count = u64::from(table.param_count);
    if count > MOST {
        return Err(of(format!("it has {count} parameters, more than {MOST}")));
    }
    if count > 0 && table.params.is_null() {
        return Err(of(format!("it has {count} parameters, but `params` is NULL")));
    }
    let mut params = Vec::<Param>::new();
    for index in 0..count as usize {
        // SAFETY: as above.
        let param = unsafe { Param::new(&table.params.add(index).read_unaligned()) };
        let param = param.map_err(|why| of(format!("parameter {index}: {why}")))?;
        if params.iter().any(|other| other.name == param.name) {
            return Err(of(format!("it has two parameters `{}`", param.name)));
        }
        params.push(param);
    }
    let needs = Needs(table.needs).complete();
    let (Some(create), Some(evaluate)) = (table.create, table.evaluate) else {
        return Err(of("`create` or `evaluate` is NULL".into()));
    };
    let state = table.save_state.zip(table.load_state);
    if state.is_some() != needs.contains(Needs::STATE) {
        return Err(of(
            "with UFT_NEEDS_STATE it has to have `save_state` and `load_state`, without it neither"
                .into(),
        ));
    }
    let (destroy, begin_step) = (table.destroy, table.begin_step);
    let functions = Functions { create, destroy, begin_step, evaluate, state };
    Ok(Objective { name, about, needs, accepts: Kinds(table.accepts), params, functions })
}

//! Plugins: loaded by name or path, never by scanning; every fault is one line that names them.

mod adapter;
pub mod elf;
mod environment;
pub mod library;
pub mod objective;
mod selection;
mod sum;
pub mod table;

use crate::config::PluginRef;
use crate::{Error, Result};
pub use adapter::Adapter;
use library::Library;
pub use objective::Objective;
use std::path::{Path, PathBuf};
pub use sum::Sum;
use uft_core::Fault;
use uft_core::abi::{Entry, Role};
use uft_core::fault::FaultKind;

/// The loaded libraries and what they export.
#[derive(Default)]
pub struct Registry {
    dirs: Vec<PathBuf>,
    libraries: Vec<Library>,
}

impl Registry {
    /// A registry that searches these folders before the executable's own.
    pub fn new(dirs: impl IntoIterator<Item = PathBuf>) -> Self {
        Self { dirs: dirs.into_iter().collect(), libraries: Vec::new() }
    }

    /// Loads a library by name or path; one that is loaded already stays as it is.
    ///
    /// # Errors
    /// If it cannot be found or loaded, or exports a name that another library has.
    pub fn load(&mut self, name: &str) -> Result<&Library> {
        let path = library::find(name, &self.dirs)?;
        let path = path.canonicalize().unwrap_or(path);
        if let Some(index) = self.libraries.iter().position(|l| l.path == path) {
            return Ok(&self.libraries[index]);
        }
        let library = Library::open(&path)?;
        for (index, entry) in library.entries.iter().enumerate() {
            let others =
                self.libraries.iter().flat_map(|l| l.entries.iter().map(move |e| (&l.path, e)));
            let same = |e: &Entry| e.role == entry.role && e.name == entry.name;
            let twice = || format!("{} `{}`", role_name(entry.role), entry.name);
            if let Some((other, _)) = others.into_iter().find(|(_, e)| same(e)) {
                return Err(Error::plugin(format!(
                    "plugin {}: the {} is exported by {} too; load only one of them",
                    path.display(),
                    twice(),
                    other.display()
                )));
            }
            if library.entries[..index].iter().any(same) {
                return Err(Error::plugin(format!(
                    "plugin {}: it exports the {} twice; {BUG}",
                    path.display(),
                    twice()
                )));
            }
        }
        self.libraries.push(library);
        Ok(self.libraries.last().expect("just pushed"))
    }

    /// Every loaded entry with its library.
    pub fn entries(&self) -> impl Iterator<Item = (&Library, &Entry)> {
        self.libraries.iter().flat_map(|l| l.entries.iter().map(move |e| (l, e)))
    }

    /// The files of the loaded libraries.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.libraries.iter().map(|l| l.path.as_path())
    }

    /// The library that exports an entry; the entry's name is loaded as a library if none does.
    fn provider(&mut self, role: Role, name: &str) -> Result<&Library> {
        let has = |l: &Library| l.entries.iter().any(|e| e.role == role && e.name.as_str() == name);
        if !self.libraries.iter().any(has) {
            let library = self.load(name)?;
            if !has(library) {
                let there: Vec<String> = library
                    .entries
                    .iter()
                    .map(|e| format!("{} `{}`", role_name(e.role), e.name))
                    .collect();
                return Err(Error::plugin(format!(
                    "plugin {} exports no {} `{name}`; it has: {}",
                    library.path.display(),
                    role_name(role),
                    there.join(", ")
                )));
            }
        }
        Ok(self.libraries.iter().find(|l| has(l)).expect("found or loaded above"))
    }

    /// Makes an objective from its place in the configuration.
    ///
    /// # Errors
    /// If the plugin cannot be loaded, refuses its parameters, or needs what this host lacks.
    pub fn objective(&mut self, plugin: &PluginRef) -> Result<Objective> {
        let name = plugin.plugin.as_str();
        let module = self.provider(Role::Objective, name)?.module;
        Objective::new(module, plugin)
    }

    /// Makes a feedback adapter from its place in the configuration.
    ///
    /// # Errors
    /// If the plugin cannot be loaded or refuses its parameters.
    pub fn adapter(&mut self, plugin: &PluginRef) -> Result<Adapter> {
        let name = plugin.plugin.as_str();
        let module = self.provider(Role::Adapter, name)?.module;
        Ok(Adapter::new(name, module.adapter(name, &plugin.params_json())?))
    }
}

/// A role in words.
pub fn role_name(role: Role) -> &'static str {
    match role {
        Role::Objective => "objective",
        Role::Adapter => "adapter",
    }
}

/// A plugin's fault as an error of the host, in one line whatever the plugin wrote.
fn fault(name: &str, fault: &Fault) -> Error {
    let words: Vec<&str> = fault.message.split_whitespace().collect();
    let said = words.join(" ");
    match fault.kind {
        // A wrong parameter is the user's, at a key of the configuration.
        FaultKind::Parameter => Error::config(format!("plugin `{name}`: {said}")),
        FaultKind::Record => Error::data(format!("plugin `{name}`: {said}")),
        FaultKind::Evaluation => Error::plugin(format!("plugin `{name}`: {said}")),
        FaultKind::Panic => Error::plugin(format!("plugin {said}; {BUG}")),
    }
}

/// What to do about a plugin that breaks its side of the contract.
const BUG: &str = "this is a bug of the plugin, report it to its author";

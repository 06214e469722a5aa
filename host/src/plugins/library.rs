//! One plugin library: found by name or path, checked, loaded, kept for the life of the process.

use super::environment::kept;
use super::{elf, fault};
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use uft_core::abi::{self, AdapterObject, Entry, ObjectiveObject, PluginModule_Ref, no_such_entry};
use uft_core::c;
use uft_core::extension::Extension;

/// A loaded plugin library.
pub struct Library {
    pub path: PathBuf,
    pub module: Module,
    pub entries: Vec<Entry>,
}

/// What a library exports, by what it is written in.
#[derive(Clone, Copy)]
pub enum Module {
    Rust(PluginModule_Ref),
    C(&'static c::Library),
}

/// The file for a plugin's name in one folder: `una-score` → `libuna_score.so`.
pub fn file_name(name: &str) -> String {
    let prefix = std::env::consts::DLL_PREFIX;
    let suffix = std::env::consts::DLL_SUFFIX;
    format!("{prefix}{}{suffix}", name.replace('-', "_"))
}

/// Whether `load` or `plugin` gives a path and not a name.
pub fn is_path(name: &str) -> bool {
    name.contains('/') || name.ends_with(std::env::consts::DLL_SUFFIX)
}

/// Finds a library: a path as it is; a name in the configured folders, then in `deps` beside the
/// executable and in its own folder; the name of a bundled plugin in a library of another name there.
/// Cargo keeps `deps` current; what lies beside the executable in a
/// target directory may be of an earlier build.
///
/// # Errors
/// With the folders searched and what to do.
pub fn find(name: &str, dirs: &[PathBuf]) -> Result<PathBuf> {
    if is_path(name) {
        let path = PathBuf::from(name);
        return match path.is_file() {
            true => Ok(path),
            false => Err(Error::plugin(format!(
                "plugin `{name}`: no such file; build the plugin or correct the path"
            ))),
        };
    }
    let mut folders = dirs.to_vec();
    if let Some(own) = std::env::current_exe().ok().as_deref().and_then(Path::parent) {
        folders.extend([own.join("deps"), own.to_owned()]);
    }
    let file = file_name(name);
    let bundled = bundled::library_of(name).map(file_name);
    let there = |file: &String| folders.iter().map(|f| f.join(file)).find(|path| path.is_file());
    there(&file).or_else(|| bundled.as_ref().and_then(there)).ok_or_else(|| {
        let searched: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
        Error::plugin(format!(
            "plugin `{name}`: no {file} in {}; build it, add its folder to [plugins] dirs, or give its path",
            searched.join(", ")
        ))
    })
}

impl Library {
    /// Its name, from its file's.
    pub fn name(&self) -> String {
        let file = self.path.file_stem().unwrap_or_default().to_string_lossy();
        file.strip_prefix(std::env::consts::DLL_PREFIX).unwrap_or(&file).replace('_', "-")
    }

    /// What it has behind the generic door; in C there is none.
    pub fn query(&self, name: &str, revision: u32) -> Option<Extension> {
        match self.module {
            Module::Rust(module) => {
                let file = self.path.to_string_lossy();
                kept(&file, || module.query()(name.into(), revision)).into()
            }
            Module::C(_) => None,
        }
    }

    /// Loads a library. It is never unloaded: its code stands behind every object it made.
    ///
    /// # Errors
    /// If the file is no whole shared library, no uft plugin, or of another ABI revision; one line
    /// that names the file and what to do.
    pub fn open(path: &Path) -> Result<Self> {
        let fail = |why: String| Error::plugin(format!("plugin {}: {why}", path.display()));
        let file = path.to_string_lossy();
        let bytes = std::fs::read(path).map_err(|e| fail(format!("cannot be read: {e}")))?;
        elf::check(&bytes).map_err(fail)?;
        drop(bytes);

        // SAFETY: loading runs the library's initialisers; a plugin is code that the user named.
        let library = kept(&file, || unsafe { libloading::Library::new(path) }).map_err(|e| {
            fail(format!("the loader refuses it ({}); build it on this machine", cause(&e)))
        })?;
        let library: &'static libloading::Library = Box::leak(Box::new(library));
        let not_ours = |_| {
            fail("it is a shared library, but not a uft plugin; a plugin exports its objectives and adapters with `uft_core::plugin!`, one in C the function `uft_c_plugin`".into())
        };
        // SAFETY: the symbol has this type in every library that exports it; the name is used by
        // nothing else.
        if let Ok(table) = unsafe { library.get::<c::Entry>(c::SYMBOL) } {
            // SAFETY: the library stays; for the rest its author stands.
            let read = kept(&file, || unsafe { c::Library::open(*table) });
            let module = Module::C(Box::leak(Box::new(read.map_err(|why| {
                fail(format!(
                    "{why}; build it with this host's uft_plugin.h, or report it to its author"
                ))
            })?)));
            return Ok(Self { path: path.to_owned(), module, entries: module.entries(&file) });
        }
        // SAFETY: as above, in every library that `plugin!` exported.
        let revision = unsafe { library.get::<extern "C" fn() -> u32>(abi::REVISION_SYMBOL) }
            .map_err(not_ours)?;
        let revision = kept(&file, || revision());
        if revision != abi::ABI_REVISION {
            return Err(fail(format!(
                "it speaks ABI revision {revision}, this host speaks {}; rebuild it against this uft-core",
                abi::ABI_REVISION
            )));
        }
        // SAFETY: as above; the header is checked by `open` before anything behind it is used.
        let header =
            unsafe { library.get::<abi::Header>(abi::ROOT_SYMBOL.as_bytes()) }.map_err(not_ours)?;
        let module = kept(&file, || abi::open(*header)).map_err(|(line, full)| {
            log::debug!("{}: {full}", path.display());
            fail(format!("{line}; rebuild it against this uft-core"))
        })?;
        let module = Module::Rust(module);
        Ok(Self { path: path.to_owned(), module, entries: module.entries(&file) })
    }
}

impl Module {
    fn entries(self, file: &str) -> Vec<Entry> {
        match self {
            Module::Rust(module) => kept(file, || (module.entries())().into_iter().collect()),
            Module::C(library) => library.entries(),
        }
    }

    /// An objective by name, from its parameters as a JSON object.
    ///
    /// # Errors
    /// If there is none of that name, or the parameters are refused.
    pub fn objective(self, name: &str, params: &str) -> Result<ObjectiveObject> {
        let made = kept(name, || match self {
            Module::Rust(module) => (module.objective())(name.into(), params.into()).into_result(),
            Module::C(library) => library.objective(name, params),
        });
        made.map_err(|f| fault(name, &f))
    }

    /// An adapter by name, likewise. There are none in C.
    ///
    /// # Errors
    /// As [`Module::objective`].
    pub fn adapter(self, name: &str, params: &str) -> Result<AdapterObject> {
        let made = kept(name, || match self {
            Module::Rust(module) => (module.adapter())(name.into(), params.into()).into_result(),
            Module::C(_) => Err(no_such_entry(name.into())),
        });
        made.map_err(|f| fault(name, &f))
    }
}

/// libloading's own message hides what the loader said.
fn cause(error: &libloading::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => source.to_string(),
        None => error.to_string(),
    }
}

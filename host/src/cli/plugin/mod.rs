//! `uft plugin new`, `uft plugin list` and `uft plugin check`.

mod new;

use super::print;
use crate::config::{PluginRef, overrides};
use crate::plugins::{Registry, role_name, table};
use crate::{Error, Result};
use clap::{Args, Subcommand};
use std::fmt::Write;
use std::path::PathBuf;
use uft_core::abi::Role;
use uft_core::params::nearest;
use uft_core::{Fault, check};

#[derive(Subcommand)]
pub enum PluginCommand {
    /// Make the crate of a new plugin, which builds, passes its tests and trains as it is
    New(new::NewArgs),
    /// Show what plugins export, with every parameter
    List(ListArgs),
    /// Check objectives (gradient against finite differences, extremes, split of the step, state,
    /// time) and adapters (odd records)
    Check(CheckArgs),
}

#[derive(Args)]
pub struct PluginsArgs {
    /// Libraries by name or path; the bundled ones by default
    plugins: Vec<String>,
    /// Folders to search for plugins
    #[arg(long = "plugin-dir", value_name = "DIR")]
    plugin_dirs: Vec<PathBuf>,
}

#[derive(Args)]
pub struct ListArgs {
    #[command(flatten)]
    plugins: PluginsArgs,
    /// Print the page plugins/README.md instead, which is of the bundled plugins
    #[arg(long, conflicts_with_all = ["plugins", "plugin_dirs"])]
    markdown: bool,
}

#[derive(Args)]
pub struct CheckArgs {
    #[command(flatten)]
    plugins: PluginsArgs,
    /// Check this entry alone, of all that the libraries export
    #[arg(long, value_name = "NAME")]
    entry: Option<String>,
    /// A parameter of the entry, as in the configuration: beta=0.5, loss=bce
    #[arg(long = "param", value_name = "KEY=VALUE")]
    params: Vec<String>,
    /// JSONL file with records that the adapter has to understand
    #[arg(long, value_name = "FILE")]
    records: Option<PathBuf>,
}

pub fn run(command: &PluginCommand) -> Result<()> {
    match command {
        PluginCommand::New(args) => new::run(args),
        PluginCommand::List(args) if args.markdown => print(&table::page()?),
        PluginCommand::List(args) => list(&args.plugins.load()?),
        PluginCommand::Check(args) => args.run(),
    }
}

impl PluginsArgs {
    fn load(&self) -> Result<Registry> {
        let mut registry = Registry::new(self.plugin_dirs.iter().cloned());
        let bundled = bundled::LIBRARIES.map(|library| library.name.to_owned());
        let names = if self.plugins.is_empty() { &bundled[..] } else { &self.plugins };
        for name in names {
            registry.load(name)?;
        }
        Ok(registry)
    }
}

fn list(registry: &Registry) -> Result<()> {
    let mut out = String::new();
    for (library, entry) in registry.entries() {
        let (role, path) = (role_name(entry.role), library.path.display());
        let _ = writeln!(out, "{} ({role}, {path})\n  {}", entry.name, entry.about);
        for param in &entry.params {
            let _ = writeln!(
                out,
                "    {} = {}  # {}: {}",
                param.name, param.default, param.kind, param.about
            );
        }
        out.push('\n');
    }
    print(&out)
}

impl CheckArgs {
    fn run(&self) -> Result<()> {
        let mut registry = self.plugins.load()?;
        let entries = self.entries(&registry)?;
        let params = self.params()?;
        if !params.is_empty() && entries.len() > 1 {
            return Err(Error::config(format!(
                "--param is for one entry, and there are {}; choose with --entry: {}",
                entries.len(),
                names(&entries)
            )));
        }
        let records = match &self.records {
            Some(file) => std::fs::read_to_string(file)
                .map_err(|e| Error::data(format!("{}: cannot be read: {e}", file.display())))?,
            None => String::new(),
        };
        if self.records.is_some() && (entries.len() > 1 || entries[0].0 != Role::Adapter) {
            return Err(Error::config(format!(
                "--records is for one adapter; choose it with --entry, of: {}",
                names(&entries)
            )));
        }
        let records: Vec<&str> = records.lines().filter(|line| !line.trim().is_empty()).collect();
        let mut failed = Vec::new();
        for (role, name) in &entries {
            let plugin = PluginRef { plugin: name.clone(), params: params.clone() };
            let report = match role {
                Role::Objective => {
                    let mut make = || registry.objective(&plugin).map(|o| o.into_object());
                    check::check_objective(name, &mut || make().map_err(fault))
                }
                Role::Adapter => {
                    let mut make = || registry.adapter(&plugin).map(|a| a.into_object());
                    check::check_adapter(name, &mut || make().map_err(fault), &records)
                }
            };
            print(&format!("{report}\n"))?;
            if !report.passed() {
                failed.push(format!("{} `{name}`", role_name(*role)));
            }
        }
        match failed.as_slice() {
            [] => Ok(()),
            _ => Err(Error::plugin(format!("the check failed for: {}", failed.join(", ")))),
        }
    }

    /// What is to be checked.
    fn entries(&self, registry: &Registry) -> Result<Vec<(Role, String)>> {
        let all: Vec<_> = registry.entries().map(|(_, e)| (e.role, e.name.to_string())).collect();
        let wanted = |name: &str| self.entry.as_deref().is_none_or(|only| only == name);
        let chosen: Vec<_> = all.iter().filter(|(_, name)| wanted(name)).cloned().collect();
        match &self.entry {
            Some(entry) if chosen.is_empty() => {
                let known: Vec<&str> = all.iter().map(|(_, name)| name.as_str()).collect();
                let near = nearest(entry, &known);
                Err(Error::config(format!("--entry: no library exports `{entry}`{near}")))
            }
            _ if chosen.is_empty() => {
                Err(Error::config("nothing to check: these libraries export nothing"))
            }
            _ => Ok(chosen),
        }
    }

    fn params(&self) -> Result<toml::Table> {
        let mut params = toml::Table::new();
        for assignment in &self.params {
            let (key, value) = assignment.split_once('=').ok_or_else(|| {
                Error::config(format!("--param {assignment}: expected key=value"))
            })?;
            params.insert(key.trim().to_owned(), overrides::parse(value.trim()));
        }
        Ok(params)
    }
}

fn names(entries: &[(Role, String)]) -> String {
    entries.iter().map(|(_, name)| name.as_str()).collect::<Vec<_>>().join(", ")
}

fn fault(error: Error) -> Fault {
    Fault::evaluation(error.message)
}

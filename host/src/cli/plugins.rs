//! `uft plugins list` and `uft plugins check`.

use super::print;
use crate::config::PluginRef;
use crate::plugins::{Registry, role_name, table};
use crate::{Error, Result};
use clap::{Args, Subcommand};
use std::fmt::Write;
use std::path::PathBuf;
use uft_core::abi::Role;
use uft_core::check;

#[derive(Subcommand)]
pub enum PluginsCommand {
    /// Show what plugins export, with every parameter
    List(ListArgs),
    /// Check every objective: gradient against finite differences, extremes, split of the step
    Check(PluginsArgs),
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

pub fn run(command: &PluginsCommand) -> Result<()> {
    match command {
        PluginsCommand::List(args) if args.markdown => print(&table::page()?),
        PluginsCommand::List(args) => list(&args.plugins.load()?),
        PluginsCommand::Check(args) => check_all(args.load()?),
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

fn check_all(mut registry: Registry) -> Result<()> {
    let names: Vec<String> = registry
        .entries()
        .filter(|(_, entry)| entry.role == Role::Objective)
        .map(|(_, entry)| entry.name.to_string())
        .collect();
    if names.is_empty() {
        return Err(Error::config("nothing to check: these libraries export no objective"));
    }
    let mut failed = Vec::new();
    for name in &names {
        let plugin = PluginRef { plugin: name.clone(), params: toml::Table::new() };
        let mut make = || registry.objective(&plugin).map(|o| o.into_object());
        let report = check::check_objective(name, &mut || {
            make().map_err(|e| uft_core::Fault::evaluation(e.message))
        });
        print(&format!("{report}\n"))?;
        if !report.passed() {
            failed.push(name.as_str());
        }
    }
    let adapters = registry.entries().filter(|(_, entry)| entry.role == Role::Adapter).count();
    if names.is_empty() {
        print(&format!("no objective to check; {adapters} feedback adapters have no gradient\n"))?;
    }
    match failed.as_slice() {
        [] => Ok(()),
        _ => Err(Error::plugin(format!("the check failed for: {}", failed.join(", ")))),
    }
}

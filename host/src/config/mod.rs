//! A run's configuration: one TOML file, with overrides from the command line.

pub mod docs;
pub mod overrides;
pub mod ramp;
pub mod schema;
pub mod section;
pub mod validate;
pub mod values;

pub use ramp::{Number, ObjectiveRef, Ramp, Term};
pub use schema::Config;
pub use values::*;

use crate::{Error, Result};
use std::path::Path;
use uft_core::params::nearest;

impl Config {
    /// Reads a run's TOML file, applies `key=value` overrides and checks what can be checked
    /// without looking at other files.
    ///
    /// # Errors
    /// The first thing that is wrong, with file, line and key.
    pub fn load(path: &Path, set: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::config(format!("{}: cannot be read: {e}", path.display())))?;
        Self::parse(&text, set).map_err(|e| e.at(path.display()))
    }

    /// [`Config::load`] from a text; places in errors are `line N`.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, set: &[String]) -> Result<Self> {
        // TOML's own types first: they end at 64 bits with a sign, as checkpoints write them.
        let mut table: toml::Table = toml::from_str(text).map_err(|e| explain(&e, text))?;
        let config: Config = if set.is_empty() {
            toml::from_str(text).map_err(|e| explain(&e, text))?
        } else {
            for assignment in set {
                overrides::apply(&mut table, assignment)?;
            }
            // Through text again: errors then show the offending line. Its number is the file's only
            // if the file alone has the mistake.
            let merged = toml::to_string(&table).expect("a TOML table is TOML");
            toml::from_str(&merged).map_err(|e| match toml::from_str::<Config>(text) {
                Err(own) => explain(&own, text),
                Ok(_) => explain(&e, &merged).at("with --set, the file as merged"),
            })?
        };
        validate::check(&config)?;
        Ok(config)
    }
}

/// One line for a TOML error: the line of the file, what is wrong, and the nearest known key.
fn explain(error: &toml::de::Error, text: &str) -> Error {
    let message = error.message().replace('\n', " ");
    let message = match message.strip_prefix("unknown field `").and_then(|m| m.split_once('`')) {
        Some((unknown, expected)) => {
            let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
            format!("unknown key `{unknown}`{}", nearest(unknown, &known))
        }
        None => match message.strip_prefix("unknown variant `").and_then(|m| m.split_once('`')) {
            // The message lists the right words.
            Some((unknown, expected)) => {
                let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
                match nearest(unknown, &known) {
                    suggestion if suggestion.contains("did you mean") => message + &suggestion,
                    _ => message,
                }
            }
            None => message,
        },
    };
    let Some(span) = error.span() else { return Error::config(message) };
    let before = &text[..span.start.min(text.len())];
    let line = before.matches('\n').count() + 1;
    let source = text.lines().nth(line - 1).unwrap_or("").trim();
    Error::config(format!("line {line} (`{source}`): {message}"))
}

#[cfg(test)]
mod tests;

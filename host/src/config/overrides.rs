//! `--set key=value`: `train.lr=1e-4`, `data[rated].weight=2` (an element by its name),
//! `stage[0].steps=5` (by its position).

use crate::{Error, Result};
use toml::{Table, Value};

/// Most parts of a key; a plugin's parameters lie three deep and more.
const DEEPEST: usize = 16;

/// Applies one `key=value` to the parsed file.
///
/// # Errors
/// If it has no `=`, or the key goes through something that is not a table.
pub fn apply(table: &mut Table, assignment: &str) -> Result<()> {
    let wrong = |why: &str| Error::config(format!("--set {assignment}: {why}"));
    let (key, value) = assignment.split_once('=').ok_or_else(|| wrong("expected key=value"))?;
    let parts: Vec<&str> = key.trim().split('.').collect();
    let (last, path) = parts.split_last().expect("split gives at least one part");
    if parts.iter().any(|part| part.is_empty()) {
        return Err(wrong("an empty part in the key"));
    }
    if parts.len() > DEEPEST {
        return Err(wrong(&format!("a key of more than {DEEPEST} parts")));
    }
    let mut here = table;
    for part in path {
        here = step(here, part).map_err(|why| wrong(&why))?;
    }
    here.insert((*last).to_owned(), parse(value.trim()));
    Ok(())
}

/// Goes one part down: into a table (made if absent), or into a list's element `name[element]`.
fn step<'t>(table: &'t mut Table, part: &str) -> std::result::Result<&'t mut Table, String> {
    let (name, element) = part.split_once('[').map_or((part, None), |(n, e)| (n, Some(e)));
    let new = || if element.is_some() { Value::Array(vec![]) } else { Value::Table(Table::new()) };
    match (table.entry(name.to_owned()).or_insert_with(new), element) {
        (Value::Table(inner), None) => Ok(inner),
        (Value::Array(list), Some(element)) => {
            let element = element.trim_end_matches(']');
            find(list, element).ok_or_else(|| format!("`{name}` has no element `{element}`"))
        }
        (Value::Array(_), None) => {
            Err(format!("`{name}` is a list: write {name}[NAME] or {name}[0]"))
        }
        (Value::Table(_), Some(_)) => {
            Err(format!("`{name}` is one section, not a list: write {name}.KEY"))
        }
        _ => Err(format!("`{name}` is not a section")),
    }
}

/// An element by its `name` key or by its position.
fn find<'t>(list: &'t mut [Value], element: &str) -> Option<&'t mut Table> {
    let named = |v: &Value| v.get("name").and_then(Value::as_str) == Some(element);
    let index = list.iter().position(named).or_else(|| element.parse().ok())?;
    list.get_mut(index)?.as_table_mut()
}

/// The value as TOML if it is TOML, otherwise as a text.
pub fn parse(value: &str) -> Value {
    toml::from_str::<Table>(&format!("v = {value}"))
        .ok()
        .and_then(|mut table| table.remove("v"))
        .unwrap_or_else(|| Value::String(value.to_owned()))
}

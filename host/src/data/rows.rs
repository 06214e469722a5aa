//! JSONL files as lines with their place.

use crate::group::Origin;
use crate::{Error, Result};
use std::ops::Range;
use std::sync::Arc;

/// One record of a data file, uninterpreted.
pub struct Row {
    pub origin: Origin,
    /// The whole file, in memory once for all of its rows.
    file: Arc<String>,
    /// Where in it the record stands.
    range: Range<usize>,
}

impl Row {
    /// The record as it stands in its file.
    pub fn text(&self) -> &str {
        &self.file[self.range.clone()]
    }
}

/// The records of some JSONL files in order. Empty lines are no records.
///
/// # Errors
/// If a file cannot be read, is not UTF-8 (with the line), or all files together hold no record.
pub fn read(files: &[String]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for file in files {
        let bytes =
            std::fs::read(file).map_err(|e| Error::data(format!("{file}: cannot be read: {e}")))?;
        let text = String::from_utf8(bytes).map_err(|e| {
            let good = &e.as_bytes()[..e.utf8_error().valid_up_to()];
            let line = good.iter().filter(|b| **b == b'\n').count() + 1;
            Error::data(format!(
                "{file}:{line}: not UTF-8 text; data files are JSON Lines in UTF-8"
            ))
        })?;
        let name: Arc<str> = file.as_str().into();
        // A byte order mark is no part of the first record.
        let mut start = if text.starts_with('\u{feff}') { '\u{feff}'.len_utf8() } else { 0 };
        let file = Arc::new(text);
        for (index, line) in file[start..].split_inclusive('\n').enumerate() {
            let range = start..start + line.trim_end().len();
            start += line.len();
            if !range.is_empty() {
                let origin = Origin { file: name.clone(), line: index + 1 };
                rows.push(Row { origin, file: file.clone(), range });
            }
        }
    }
    if rows.is_empty() && !files.is_empty() {
        return Err(Error::data(format!("{}: no records", files.join(", "))));
    }
    Ok(rows)
}

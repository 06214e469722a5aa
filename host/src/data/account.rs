//! Every row accounted for: how many were used, and why the others were not.

use crate::group::Origin;
use std::fmt::Write;

/// Most places that are listed for one reason.
const SHOWN: usize = 5;

/// Rows of one source: used ones, and the others by reason.
#[derive(Clone, Debug, Default)]
pub struct Account {
    pub rows: usize,
    pub used: usize,
    /// Reason → how many, with the first few places and what was wrong there.
    pub refused: Vec<(&'static str, usize, Vec<String>)>,
}

impl Account {
    pub fn refuse(&mut self, reason: &'static str, origin: &Origin, detail: &str) {
        let entry = match self.refused.iter_mut().position(|(r, ..)| *r == reason) {
            Some(index) => &mut self.refused[index],
            None => {
                self.refused.push((reason, 0, Vec::new()));
                self.refused.last_mut().expect("just pushed")
            }
        };
        entry.1 += 1;
        if entry.2.len() < SHOWN {
            entry.2.push(format!("{origin}: {detail}"));
        }
    }

    /// One line per reason with its first places; empty if every row was used.
    pub fn describe(&self) -> String {
        let mut out = String::new();
        for (reason, count, places) in &self.refused {
            let _ = writeln!(out, "  {count} of {} rows left out: {reason}", self.rows);
            for place in places {
                let _ = writeln!(out, "    {place}");
            }
            if *count > places.len() {
                let _ = writeln!(out, "    … and {} more", count - places.len());
            }
        }
        out
    }
}

//! A source: one `[[data]]` entry with its rows as token groups and its objective.

use super::account::Account;
use super::rows::{self, Row};
use crate::config::schema::{Config, DataSection};
use crate::config::{BadRows, LongRows};
use crate::group::{Group, Origin};
use crate::plugins::{Adapter, Registry, Sum};
use crate::text::{Limits, Reason, Text};
use crate::{Error, Result};
use rayon::prelude::*;
use uft_core::{Kind, Kinds, Needs};

/// A group with its place in the data.
#[derive(Clone, Debug)]
pub struct Example {
    pub group: Group,
    pub origin: Origin,
}

/// Rows of one kind of feedback with the objective that they are trained by.
pub struct Source {
    pub name: String,
    pub weight: f64,
    /// Share in the batches relative to the others'; unset: by size.
    pub ratio: Option<f64>,
    pub objective: Sum,
    pub train: Vec<Example>,
    pub held_out: Vec<Example>,
    pub account: Account,
    pub held_out_account: Account,
}

impl Source {
    /// Reads, adapts and tokenises a source's files for a model with `vocab` tokens, and checks that the objective gets what it
    /// needs.
    ///
    /// # Errors
    /// If a plugin or a file cannot be used, a row cannot be used and the configuration does not say to
    /// skip it, or the data lacks what the objective needs.
    pub fn load(
        config: &Config,
        data: &DataSection,
        text: &Text,
        vocab: usize,
        registry: &mut Registry,
    ) -> Result<Self> {
        let place = format!("[[data]] `{}`", data.name);
        let adapter = registry.adapter(&data.adapter).map_err(|e| e.at(&place))?;
        let objective = Sum::new(registry, &data.objective).map_err(|e| e.at(&place))?;
        compatible(&adapter, &objective).map_err(|e| e.at(&place))?;

        let mut rows = rows::read(&data.files).map_err(|e| e.at(&place))?;
        let mut held_out_rows = rows::read(&data.eval_files).map_err(|e| e.at(&place))?;
        held_out_rows.extend(hold_out(&mut rows, data.eval_fraction));

        let loader = Loader { config, adapter: &adapter, text };
        let (train, account) = loader.load(&rows).map_err(|e| e.at(&place))?;
        let (held_out, held_out_account) = loader.load(&held_out_rows).map_err(|e| e.at(&place))?;
        let source = Self {
            name: data.name.clone(),
            weight: data.weight,
            ratio: data.ratio,
            objective,
            train,
            held_out,
            account,
            held_out_account,
        };
        source.check(vocab).map_err(|e| e.at(&place))?;
        Ok(source)
    }

    /// Whether the objective reads reference log-probs.
    pub fn needs_reference(&self) -> bool {
        self.objective.needs(Needs::REFERENCE) || self.objective.needs(Needs::MISMATCHED)
    }

    /// Whether numbers over the whole step are needed before its first loss.
    pub fn needs_statistics(&self) -> bool {
        self.objective.needs(Needs::MISMATCHED) || self.objective.needs(Needs::STEP_LOG_RATIOS)
    }

    fn check(&self, vocab: usize) -> Result<()> {
        let name = &self.objective.name;
        if self.train.is_empty() {
            let why = self.account.describe();
            return Err(Error::data(format!("no row can be used\n{}", why.trim_end())));
        }
        for example in self.train.iter().chain(&self.held_out) {
            let kinds: Vec<Kind> = example.group.segments().map(|s| s.feedback.kind()).collect();
            let at = &example.origin;
            in_vocabulary(&example.group, vocab).map_err(|e| e.at(at))?;
            if let Some(kind) =
                kinds.iter().find(|k| !self.objective.accepts.contains(Kinds::of(**k)))
            {
                return Err(Error::data(format!(
                    "{at}: a {} response, but objective `{name}` takes {}",
                    kind.name(),
                    self.objective.accepts.names().join(", ")
                )));
            }
            let pair = kinds.contains(&Kind::Chosen) && kinds.contains(&Kind::Rejected);
            if self.objective.needs(Needs::PAIRS) && !pair {
                return Err(Error::data(format!(
                    "{at}: objective `{name}` needs a chosen and a rejected response to every prompt"
                )));
            }
            if self.objective.needs(Needs::GROUPS) && kinds.len() < 2 {
                return Err(Error::data(format!(
                    "{at}: objective `{name}` needs at least two responses to every prompt"
                )));
            }
        }
        let responses = self.train.iter().flat_map(|e| e.group.segments());
        let kinds = responses.fold(0, |all, s| all | Kinds::of(s.feedback.kind()).0);
        if let Some((part, _)) = self.objective.parts().find(|(_, takes)| takes.0 & kinds == 0) {
            return Err(Error::data(format!(
                "objective `{name}`: no row has feedback for `{part}`"
            )));
        }
        for (rows, set) in [(&self.train, "rows"), (&self.held_out, "held-out rows")] {
            if self.objective.needs(Needs::MISMATCHED) && rows.len() == 1 {
                return Err(Error::data(format!(
                    "objective `{name}` pairs prompts with completions of other rows, and there is only one of the {set}; add rows or choose another objective"
                )));
            }
        }
        Ok(())
    }
}

/// Refuses token ids that the model has no embedding for.
///
/// # Errors
/// With the first such id.
pub fn in_vocabulary(group: &Group, vocab: usize) -> Result<()> {
    let mut ids = group.prompt.iter().chain(group.branches.iter().flat_map(|b| &b.tokens));
    match ids.find(|id| **id as usize >= vocab) {
        None => Ok(()),
        Some(id) => Err(Error::model(format!(
            "token {id} is not in the model's vocabulary of {vocab}; the tokenizer is not this model's"
        ))),
    }
}

/// Whether the adapter's feedback is what the objective takes; asked before any file is read.
fn compatible(adapter: &Adapter, objective: &Sum) -> Result<()> {
    let (offers, accepts) = (adapter.offers(), objective.accepts);
    if offers.0 & accepts.0 == 0 {
        return Err(Error::config(format!(
            "adapter `{}` gives {}, but objective `{}` takes {}; choose another of the two",
            adapter.name,
            offers.names().join(", "),
            objective.name,
            accepts.names().join(", ")
        )));
    }
    let offers_pairs = offers.contains(Kinds::PAIR);
    if objective.needs(Needs::PAIRS) && !offers_pairs {
        return Err(Error::config(format!(
            "objective `{}` needs pairs, but adapter `{}` gives {}; an adapter such as `preferences` gives pairs",
            objective.name,
            adapter.name,
            offers.names().join(", ")
        )));
    }
    Ok(())
}

/// Takes every n-th row out, spread evenly.
fn hold_out(rows: &mut Vec<Row>, fraction: f64) -> Vec<Row> {
    let mut out = Vec::new();
    let mut kept = Vec::new();
    for (index, row) in rows.drain(..).enumerate() {
        let before = (index as f64 * fraction).floor();
        let held = ((index + 1) as f64 * fraction).floor() > before;
        if held { out.push(row) } else { kept.push(row) }
    }
    *rows = kept;
    out
}

struct Loader<'a> {
    config: &'a Config,
    adapter: &'a Adapter,
    text: &'a Text,
}

impl Loader<'_> {
    fn load(&self, rows: &[Row]) -> Result<(Vec<Example>, Account)> {
        let text = &self.config.text;
        let limits = Limits {
            max_length: self.config.train.max_length,
            long_rows: text.long_rows,
            end_of_turn: text.end_of_turn,
        };
        let loaded: Vec<_> = rows.par_iter().map(|row| self.row(row, &limits)).collect();
        let (mut examples, mut account) =
            (Vec::new(), Account { rows: rows.len(), ..Account::default() });
        let mut fatal = Account { rows: rows.len(), ..Account::default() };
        for (row, outcome) in rows.iter().zip(loaded) {
            let (groups, refused) = outcome.map_err(|e| e.at(&row.origin))?;
            account.used += usize::from(!groups.is_empty());
            let example = |group| Example { group, origin: row.origin.clone() };
            examples.extend(groups.into_iter().map(example));
            for (reason, detail) in refused {
                let skip = match reason {
                    Some(Reason::TooLong) => text.long_rows != LongRows::Error,
                    _ => text.bad_rows == BadRows::Skip,
                };
                let to = if skip { &mut account } else { &mut fatal };
                to.refuse(reason.map_or("not understood", |r| r.name()), &row.origin, &detail);
            }
        }
        if fatal.refused.is_empty() {
            return Ok((examples, account));
        }
        Err(Error::data(format!(
            "rows that cannot be used\n{}  mend them, or leave them out with [text] bad_rows = \"skip\" \
             (long ones: long_rows = \"skip\" or \"cut-prompt\")",
            fatal.describe().replace("left out", "cannot be used")
        )))
    }

    /// The groups of one row, and what of it was refused.
    #[allow(clippy::type_complexity)]
    fn row(
        &self,
        row: &Row,
        limits: &Limits,
    ) -> Result<(Vec<Group>, Vec<(Option<Reason>, String)>)> {
        let samples = match self.adapter.adapt(row.text()) {
            Ok(samples) => samples,
            Err(e) if e.kind == crate::ErrorKind::Data => {
                return Ok((vec![], vec![(None, e.message)]));
            }
            Err(e) => return Err(e),
        };
        let (mut groups, mut refused) = (Vec::new(), Vec::new());
        for sample in &samples {
            match self.text.encode_sample(sample, limits) {
                Ok(encoded) => groups.extend(encoded),
                Err(why) => refused.push((Some(why.reason), why.detail)),
            }
        }
        Ok((groups, refused))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_out_rows_are_spread_evenly() {
        let path = std::env::temp_dir().join(format!("uft-rows-{}.jsonl", std::process::id()));
        std::fs::write(&path, "\u{feff}{}\n".to_owned() + &" {} \r\n".repeat(9)).unwrap();
        let mut rows = rows::read(&[path.display().to_string()]).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(rows.len() == 10 && rows.iter().all(|row| row.text().trim() == "{}"));
        let held: Vec<usize> = hold_out(&mut rows, 0.3).iter().map(|r| r.origin.line).collect();
        assert_eq!(held, [4, 7, 10]);
        assert_eq!(rows.len(), 7);
        assert!(hold_out(&mut rows, 0.0).is_empty());
    }
}

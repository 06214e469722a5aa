//! Typed parameters that refuse leftovers.
//!
//! Reading a parameter also documents it: `uft plugin list` shows what a plugin asked for when it
//! was created from an empty table.

use crate::fault::Fault;
use abi_stable::{StableAbi, std_types::RString};
use serde_json::{Map, Value};

/// The range of a number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// Any finite number.
    Finite,
    /// Above 0.
    Positive,
    /// 0 or more.
    NotNegative,
    /// From the first to the second, both included.
    Within(f64, f64),
}

impl Bound {
    pub(crate) fn holds(self, x: f64) -> bool {
        x.is_finite()
            && match self {
                Bound::Finite => true,
                Bound::Positive => x > 0.0,
                Bound::NotNegative => x >= 0.0,
                Bound::Within(low, high) => (low..=high).contains(&x),
            }
    }

    pub(crate) fn words(self) -> String {
        match self {
            Bound::Finite => "a finite number".into(),
            Bound::Positive => "a number above 0".into(),
            Bound::NotNegative => "a number that is not negative".into(),
            Bound::Within(low, high) => format!("a number from {low} to {high}"),
        }
    }
}

/// What a plugin says of one of its parameters.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct ParamDoc {
    /// The key in the configuration.
    pub name: RString,
    /// What may be given, in words.
    pub kind: RString,
    /// The default as TOML.
    pub default: RString,
    /// What it does, in one line.
    pub about: RString,
}

/// The parameters of one plugin entry, from its table in the configuration.
#[derive(Debug, Default)]
pub struct Params {
    given: Map<String, Value>,
    docs: Vec<ParamDoc>,
    fault: Option<Fault>,
}

impl Params {
    /// From the entry's table as a JSON object.
    ///
    /// # Errors
    /// If the text is not a JSON object.
    pub fn from_json(json: &str) -> Result<Self, Fault> {
        match serde_json::from_str(json) {
            Ok(Value::Object(given)) => Ok(Self { given, ..Self::default() }),
            _ => Err(Fault::parameter("the parameters are not a table")),
        }
    }

    /// A number.
    pub fn number(&mut self, name: &str, default: f64, bound: Bound, about: &str) -> f64 {
        self.read(name, &bound.words(), &format!("{default:?}"), about, |v| {
            v.as_f64().filter(|x| bound.holds(*x))
        })
        .unwrap_or(default)
    }

    /// Two numbers in rising order, such as the range of a score.
    pub fn range(&mut self, name: &str, default: (f64, f64), about: &str) -> (f64, f64) {
        let words = "two numbers [low, high] in rising order";
        self.read(name, words, &format!("[{:?}, {:?}]", default.0, default.1), about, |v| {
            let [low, high] = v.as_array()?.as_slice() else { return None };
            let (low, high) = (low.as_f64()?, high.as_f64()?);
            (low < high && low.is_finite() && high.is_finite()).then_some((low, high))
        })
        .unwrap_or(default)
    }

    /// `true` or `false`.
    pub fn flag(&mut self, name: &str, default: bool, about: &str) -> bool {
        self.read(name, "true or false", &default.to_string(), about, Value::as_bool)
            .unwrap_or(default)
    }

    /// `true`, `false`, or none for `"auto"`, the default.
    pub fn flag_or_auto(&mut self, name: &str, about: &str) -> Option<bool> {
        self.read(name, "true, false or \"auto\"", "\"auto\"", about, |v| match v.as_str() {
            Some("auto") => Some(None),
            _ => v.as_bool().map(Some),
        })
        .flatten()
    }

    /// One of some words.
    pub fn choice(
        &mut self,
        name: &str,
        default: &'static str,
        options: &[&'static str],
        about: &str,
    ) -> &'static str {
        let quoted: Vec<_> = options.iter().map(|o| format!("\"{o}\"")).collect();
        self.read(name, &quoted.join(" or "), &format!("\"{default}\""), about, |v| {
            let given = v.as_str()?;
            options.iter().find(|o| **o == given).copied()
        })
        .unwrap_or(default)
    }

    /// A text.
    pub fn text(&mut self, name: &str, default: &str, about: &str) -> String {
        self.read(name, "a text", &format!("\"{default}\""), about, |v| {
            v.as_str().map(String::from)
        })
        .unwrap_or_else(|| default.into())
    }

    /// A table of names to texts; empty by default.
    pub fn texts(&mut self, name: &str, about: &str) -> Vec<(String, String)> {
        self.read(name, "a table of texts", "{}", about, |v| {
            let pairs = v.as_object()?.iter();
            pairs.map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect()
        })
        .unwrap_or_default()
    }

    /// A table of names to numbers; `default` if it is not given.
    pub fn numbers(
        &mut self,
        name: &str,
        default: &[(&str, f64)],
        about: &str,
    ) -> Vec<(String, f64)> {
        let shown: Vec<_> = default.iter().map(|(k, v)| format!("{k} = {v:?}")).collect();
        let shown =
            if shown.is_empty() { "{}".into() } else { format!("{{ {} }}", shown.join(", ")) };
        self.read(name, "a table of numbers", &shown, about, |v| {
            let pairs = v.as_object()?.iter();
            pairs.map(|(k, v)| Some((k.clone(), v.as_f64().filter(|x| x.is_finite())?))).collect()
        })
        .unwrap_or_else(|| default.iter().map(|(k, v)| ((*k).to_owned(), *v)).collect())
    }

    /// Refuses the parameters for a reason that a single value does not show.
    pub fn reject(&mut self, reason: impl Into<String>) {
        self.fault.get_or_insert_with(|| Fault::parameter(reason));
    }

    /// What was asked for, in order.
    pub fn docs(&self) -> &[ParamDoc] {
        &self.docs
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// The first wrong value, or a parameter that nobody asked for, with the nearest known name.
    pub fn finish(self) -> Result<(), Fault> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        let known: Vec<&str> = self.docs.iter().map(|d| d.name.as_str()).collect();
        let Some(leftover) = self.given.keys().next() else { return Ok(()) };
        Err(Fault::parameter(format!(
            "unknown parameter `{leftover}`{}",
            nearest(leftover, &known)
        )))
    }

    fn read<T>(
        &mut self,
        name: &str,
        kind: &str,
        default: &str,
        about: &str,
        convert: impl FnOnce(&Value) -> Option<T>,
    ) -> Option<T> {
        self.docs.push(ParamDoc {
            name: name.into(),
            kind: kind.into(),
            default: default.into(),
            about: about.into(),
        });
        let value = self.given.remove(name)?;
        let converted = convert(&value);
        if converted.is_none() {
            self.reject(format!("parameter `{name}` must be {kind}, not {value}"));
        }
        converted
    }
}

/// `; did you mean …?` for a close known name, otherwise the list of what is known.
pub fn nearest(unknown: &str, known: &[&str]) -> String {
    let closest = known
        .iter()
        .map(|k| (strsim::jaro_winkler(unknown, k), *k))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(similarity, _)| *similarity > 0.75);
    match (closest, known) {
        (Some((_, name)), _) => format!("; did you mean `{name}`?"),
        (None, []) => "; it has none".into(),
        (None, _) => format!("; known: {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leftover_names_the_nearest_parameter() {
        let mut params = Params::from_json(r#"{"bta": 0.5}"#).unwrap();
        assert_eq!(params.number("beta", 0.1, Bound::Positive, ""), 0.1);
        let fault = params.finish().unwrap_err();
        assert_eq!(fault.message.as_str(), "unknown parameter `bta`; did you mean `beta`?");
    }

    #[test]
    fn a_wrong_value_says_what_may_be_given() {
        for (json, says) in [
            (r#"{"beta": -1}"#, "parameter `beta` must be a number above 0, not -1"),
            (r#"{"beta": "high"}"#, "parameter `beta` must be a number above 0, not \"high\""),
        ] {
            let mut params = Params::from_json(json).unwrap();
            params.number("beta", 0.1, Bound::Positive, "");
            assert_eq!(params.finish().unwrap_err().message.as_str(), says);
        }
        let mut params = Params::from_json(r#"{"range": [4, 0]}"#).unwrap();
        params.range("range", (0.0, 1.0), "");
        assert!(params.finish().is_err());
    }

    #[test]
    fn what_is_read_is_documented() {
        let mut params = Params::default();
        params.choice("loss", "mse", &["mse", "bce"], "discrepancy");
        params.numbers("weights", &[("helpfulness", 0.65)], "weights");
        let docs = params.docs();
        assert_eq!(docs[0].kind.as_str(), "\"mse\" or \"bce\"");
        assert_eq!(docs[1].default.as_str(), "{ helpfulness = 0.65 }");
        assert!(params.finish().is_ok());
    }
}

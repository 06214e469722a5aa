//! Parameters of an objective in C: the table says what they can be, [`Params`] reads them.

use super::declarations::*;
use super::read;
use crate::params::{Bound, Params};
use std::ffi::CString;
use std::ptr::null;

/// A parameter of the table. Tables are never given back, so their texts may live as long.
#[derive(Debug)]
pub(super) struct Param {
    pub name: String,
    about: String,
    kind: Kind,
}

/// What can be given, and the default.
#[derive(Debug)]
enum Kind {
    Number(f64, Bound),
    Flag(bool),
    Choice(&'static str, Vec<&'static str>),
    Text(String),
}

/// A parameter's value; owns what the library gets to see.
pub(super) struct Value {
    number: f64,
    text: Option<CString>,
}

impl Param {
    /// # Safety
    /// The texts are null or end with a zero byte.
    pub unsafe fn new(table: &UftParam) -> Result<Self, String> {
        // SAFETY: the caller's promise.
        let text =
            |what: &str, from| unsafe { read::text(from) }.map_err(|why| format!("`{what}` {why}"));
        let name = text("name", table.name)?;
        if name.is_empty() {
            return Err("`name` is empty".into());
        }
        let of = |why: String| format!("`{name}`: {why}");
        let number = |bound: Bound| match bound.holds(table.number) {
            true => Ok(Kind::Number(table.number, bound)),
            false => {
                Err(of(format!("its default must be {}, not {}", bound.words(), table.number)))
            }
        };
        let kind = match table.kind {
            UFT_NUMBER => number(Bound::Finite)?,
            UFT_POSITIVE => number(Bound::Positive)?,
            UFT_NOT_NEGATIVE => number(Bound::NotNegative)?,
            UFT_WITHIN => number(Bound::Within(table.low, table.high))?,
            UFT_FLAG if table.number == 0.0 || table.number == 1.0 => {
                Kind::Flag(table.number == 1.0)
            }
            UFT_FLAG => {
                return Err(of(format!("its default must be 0 or 1, not {}", table.number)));
            }
            UFT_CHOICE => {
                let words: &'static str = text("words", table.words).map_err(of)?.leak();
                let words: Vec<&str> = words.split('|').collect();
                let default = text("text", table.text).map_err(of)?;
                let word = words.iter().find(|word| **word == default);
                let lost = || of(format!("its default `{default}` is none of its words"));
                Kind::Choice(word.ok_or_else(lost)?, words)
            }
            UFT_TEXT => Kind::Text(text("text", table.text).map_err(of)?),
            kind => return Err(of(format!("no parameter has the kind {kind}"))),
        };
        let about = text("about", table.about).map_err(of)?;
        Ok(Self { name, about, kind })
    }

    /// Reads the parameter as a constructor in Rust does.
    pub fn read(&self, params: &mut Params) -> Value {
        let (name, about) = (self.name.as_str(), self.about.as_str());
        let (number, text) = match &self.kind {
            Kind::Number(default, bound) => (params.number(name, *default, *bound, about), None),
            Kind::Flag(default) => (f64::from(params.flag(name, *default, about)), None),
            Kind::Choice(default, words) => {
                let word = params.choice(name, default, words, about);
                let place = words.iter().position(|w| *w == word).unwrap_or_default();
                (place as f64, Some(word.to_owned()))
            }
            Kind::Text(default) => (0.0, Some(params.text(name, default, about))),
        };
        let text = text.and_then(|text| match CString::new(text) {
            Ok(text) => Some(text),
            Err(_) => {
                params.reject(format!("parameter `{name}` must not have a zero character"));
                None
            }
        });
        Value { number, text }
    }
}

impl Value {
    /// As the library sees it, as long as this one is there.
    pub fn seen(&self) -> UftValue {
        UftValue { number: self.number, text: self.text.as_ref().map_or(null(), |t| t.as_ptr()) }
    }
}

//! What chat templates expect of Python: its JSON, its truth about sequences, its methods.

use super::fuel::{self, Payment};
use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use std::fmt::Write as _;

/// Widest indent of `tojson`: what is written for it is not part of the template's fuel.
const WIDEST_INDENT: usize = 16;

/// Adds Python's ways to an environment.
pub fn install(env: &mut Environment) {
    env.add_filter("tojson", tojson);
    env.add_filter("string", |state: &State, v: &Value| {
        fuel::whole(state, v)?;
        Ok::<_, Error>(display(v))
    });
    env.set_formatter(|out, state, value| match value.as_str() {
        Some(text) => Ok(out.write_str(text)?),
        None => {
            fuel::whole(state, value)?;
            Ok(out.write_str(&display(value))?)
        }
    });
    // In Python strings and mappings have a length and items too, but nothing iterates over None.
    use ValueKind::{Iterable, Map, Seq, String, Undefined};
    env.add_test("sequence", |v: &Value| matches!(v.kind(), Undefined | Seq | String | Map));
    env.add_test("iterable", |v: &Value| {
        matches!(v.kind(), Undefined | Seq | String | Map | Iterable)
    });
    env.set_unknown_method_callback(method);
}

/// Python's string methods that [`minijinja_contrib::pycompat`] lacks, then the others.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let mut operands = vec![value.clone()];
    operands.extend_from_slice(args);
    cost(value, name).pay(state, &mut operands)?;
    let (value, args) = operands.split_first().expect("a method's value");
    let Some(text) = value.as_str() else {
        return minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args);
    };
    Ok(match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let first = name == "partition";
            let cut = if first { text.split_once(separator) } else { text.rsplit_once(separator) };
            match cut {
                Some((before, after)) => Value::from((before, separator, after)),
                None if first => Value::from((text, "", "")),
                None => Value::from(("", "", text)),
            }
        }
        "rsplit" => {
            let (separator, most): (&str, Option<i64>) = from_args(args)?;
            let most = most.and_then(|n| usize::try_from(n).ok()).map_or(usize::MAX, |n| n + 1);
            let mut parts: Vec<&str> = text.rsplitn(most, separator).collect();
            parts.reverse();
            parts.into_iter().map(Value::from).collect()
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let sign = text.len() - text.trim_start_matches(['+', '-']).len();
            let zeros = width.min(1000).saturating_sub(text.chars().count());
            Value::from(format!(
                "{}{}{}",
                &text[..sign.min(1)],
                "0".repeat(zeros),
                &text[sign.min(1)..]
            ))
        }
        _ => return minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    })
}

/// How a method pays for its value and its arguments.
fn cost(value: &Value, name: &str) -> Payment {
    let text = value.kind() == ValueKind::String;
    match name {
        "replace" => Payment::Replaced,
        "split" | "rsplit" | "splitlines" => Payment::Split,
        "strip" | "lstrip" | "rstrip" => Payment::Trimmed,
        "format" => Payment::Formatted('{'),
        "startswith" | "endswith" | "find" | "rfind" | "partition" | "rpartition" => Payment::Whole,
        "removeprefix" | "removesuffix" | "join" => Payment::Whole,
        "count" if !text => Payment::Counted,
        "keys" | "values" | "items" => Payment::Joined,
        "get" => Payment::Item,
        _ => Payment::Characters,
    }
}

/// `json.dumps` with transformers' arguments: nothing escaped for HTML, no ASCII only.
fn tojson(state: &State, value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    if indent.is_some_and(|width| width > WIDEST_INDENT) {
        return Err(invalid(format!("tojson: an indent of more than {WIDEST_INDENT}")));
    }
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("tojson: separators are two texts")),
    };
    let ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let mut json = Json { state, out: String::new(), indent, item, key, ascii, sort };
    json.write(value, 0)?;
    Ok(json.out)
}

/// A JSON text being written, with `json.dumps`' options.
struct Json<'a> {
    state: &'a State<'a, 'a>,
    out: String,
    indent: Option<usize>,
    item: String,
    key: String,
    ascii: bool,
    sort: bool,
}

impl Json<'_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        fuel::node(self.state, value, depth)?;
        let around = self.item.len() + self.key.len() + self.indent.unwrap_or(0) * depth;
        self.state.consume_fuel(around as u64 / 8)?;
        match value.kind() {
            ValueKind::None => self.out += "null",
            ValueKind::Bool => self.out += if value.is_true() { "true" } else { "false" },
            ValueKind::Number => self.out += &number(value),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.out.push('[');
                let mut items = value.try_iter()?.peekable();
                let empty = items.peek().is_none();
                for (i, item) in items.enumerate() {
                    self.next(i, depth + 1);
                    self.write(&item, depth + 1)?;
                }
                self.close(']', empty, depth);
            }
            ValueKind::Map => {
                self.out.push('{');
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort {
                    keys.sort();
                }
                for (i, key) in keys.iter().enumerate() {
                    fuel::whole(self.state, key)?;
                    self.next(i, depth + 1);
                    match key.kind() {
                        ValueKind::String => self.string(key.as_str().unwrap_or_default()),
                        _ => {
                            self.out.push('"');
                            self.write(key, depth + 1)?;
                            self.out.push('"');
                        }
                    }
                    self.out += &self.key.clone();
                    self.write(&value.get_item(key)?, depth + 1)?;
                }
                self.close('}', keys.is_empty(), depth);
            }
            kind => return Err(invalid(format!("tojson: {kind} is not JSON"))),
        }
        Ok(())
    }

    /// What stands in front of the i-th item.
    fn next(&mut self, i: usize, depth: usize) {
        if i > 0 {
            self.out += &self.item.clone();
        }
        self.line(depth);
    }

    fn close(&mut self, bracket: char, empty: bool, depth: usize) {
        if !empty {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    /// A new line, if there is an indent.
    fn line(&mut self, depth: usize) {
        if let Some(width) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', width * depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out += "\\\"",
                '\\' => self.out += "\\\\",
                '\n' => self.out += "\\n",
                '\r' => self.out += "\\r",
                '\t' => self.out += "\\t",
                '\u{8}' => self.out += "\\b",
                '\u{c}' => self.out += "\\f",
                c if c < ' ' || (self.ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// `str` of a value.
fn display(value: &Value) -> String {
    if value.kind() == ValueKind::Number { number(value) } else { value.to_string() }
}

/// A number as Python writes it.
fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => python_float(float),
        _ => value.to_string(),
    }
}

/// `repr` of a float: the shortest digits that read back the same, with an exponent below 1e-4
/// and from 1e16 on.
pub fn python_float(float: f64) -> String {
    if float.is_nan() {
        return "NaN".into();
    }
    if float.is_infinite() {
        return if float > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').expect("Rust writes an exponent");
    let exponent: i32 = exponent.parse().expect("an integer");
    if float != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = float.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

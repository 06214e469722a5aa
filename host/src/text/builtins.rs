//! Which of minijinja's filters, tests and functions pay, and how.

use super::fuel::Payment;
use minijinja::value::{Kwargs, ValueOrKwargs};
use minijinja::{Environment, Error, State, Value, functions, tests};
use std::borrow::Cow;

/// A test of a value with another one.
type Test = fn(&State, &Value, &Value) -> Result<bool, Error>;

/// Tests that walk over two values, by all of their names. Comparisons and `in` stand for operators.
const TESTS: [(&[&str], Payment, Test); 10] = [
    (&["eq", "equalto", "=="], Payment::Compared, |_, a, b| Ok(tests::is_eq(a, b))),
    (&["ne", "!="], Payment::Compared, |_, a, b| Ok(tests::is_ne(a, b))),
    (&["lt", "lessthan", "<"], Payment::Compared, |_, a, b| Ok(tests::is_lt(a, b))),
    (&["le", "<="], Payment::Compared, |_, a, b| Ok(tests::is_le(a, b))),
    (&["gt", "greaterthan", ">"], Payment::Compared, |_, a, b| Ok(tests::is_gt(a, b))),
    (&["ge", ">="], Payment::Compared, |_, a, b| Ok(tests::is_ge(a, b))),
    (&["sameas"], Payment::Compared, |_, a, b| Ok(tests::is_sameas(a, b))),
    (&["in"], Payment::Contained, tests::is_in),
    (&["startingwith"], Payment::Whole, |_, a, b| Ok(tests::is_startingwith(text(a), text(b)))),
    (&["endingwith"], Payment::Whole, |_, a, b| Ok(tests::is_endingwith(text(a), text(b)))),
];

/// A test of one value.
type TestOfOne = fn(&Value) -> bool;

/// Tests that walk over one value.
const TESTS_OF_ONE: [(&str, TestOfOne); 2] =
    [("lower", tests::is_lower), ("upper", tests::is_upper)];

/// Filters and functions that Jinja does not have.
const FOREIGN_FILTERS: [&str; 5] = ["bool", "chain", "lines", "split", "zip"];
const FOREIGN_FUNCTIONS: [&str; 1] = ["debug"];

/// How a filter pays for its operands; `None` if what it does is small or it pays itself.
pub fn filter(name: &str) -> Option<Payment> {
    Some(match name {
        "default" | "d" | "length" | "count" | "abs" | "round" | "int" | "float" => return None,
        "string" | "tojson" => return None,
        "upper" | "lower" | "title" | "capitalize" | "escape" | "e" | "indent" => {
            Payment::Characters
        }
        "list" | "batch" | "slice" | "items" | "reverse" | "first" | "last" | "select"
        | "reject" | "selectattr" | "rejectattr" => Payment::Items,
        "sort" | "unique" | "groupby" | "dictsort" | "min" | "max" => Payment::Sorted,
        "map" => Payment::Mapped,
        "sum" => Payment::Summed,
        "attr" => Payment::Item,
        "replace" => Payment::Replaced,
        "trim" => Payment::Trimmed,
        "format" => Payment::Formatted('%'),
        _ => Payment::Whole,
    })
}

/// Changes an environment's.
pub fn install(env: &mut Environment) {
    for name in FOREIGN_FILTERS {
        env.remove_filter(name);
    }
    for name in FOREIGN_FUNCTIONS {
        env.remove_global(name);
    }
    for (names, payment, holds) in TESTS {
        for name in names {
            env.add_test(*name, move |state: &State, a: Value, b: Value| {
                let mut operands = [a, b];
                payment.pay(state, &mut operands)?;
                holds(state, &operands[0], &operands[1])
            });
        }
    }
    for (name, holds) in TESTS_OF_ONE {
        env.add_test(name, move |state: &State, value: Value| {
            let mut operands = [value];
            Payment::Characters.pay(state, &mut operands)?;
            Ok::<_, Error>(holds(&operands[0]))
        });
    }
    env.add_function("dict", |state: &State, entries: Option<Value>, more: Kwargs| {
        Payment::Mappings.pay(state, &mut [entries.clone().unwrap_or_default()])?;
        functions::dict(entries, more)
    });
    env.add_function("namespace", |state: &State, entries: Option<ValueOrKwargs>| {
        let given = entries.clone().map(ValueOrKwargs::into_value);
        Payment::Mappings.pay(state, &mut [given.unwrap_or_default()])?;
        functions::namespace(entries)
    });
}

fn text(value: &Value) -> Cow<'_, str> {
    value.as_str().map_or_else(|| value.to_string().into(), Cow::from)
}

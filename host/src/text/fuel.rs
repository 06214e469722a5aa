//! What a template pays for what happens to its values.
//!
//! minijinja charges fuel for instructions, for the bytes of a text and for the slots of a list, once
//! they are there. It charges nothing for what a list holds, and a list that holds the same list
//! twice, sixty deep, is small until somebody compares, sorts, hashes or prints it; nor for a text of
//! megabytes that is compared in a loop, nor for a view of a view of a list. So everything that can
//! walk over a value pays here first, for each time that it can come by.

use super::builtins;
use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};

/// Deepest nesting of a value that anything walks over.
const DEEPEST: usize = 100;
/// Bytes of text that are copied, compared or searched for one unit of fuel.
const COPIED: u64 = 64;
/// Bytes of text that are gone through character by character for one unit of fuel.
const READ: u64 = 8;
/// Items of a list that are skipped for one unit of fuel.
const SKIPPED: u64 = 8;
/// Items of a list or pieces of a text that are made for one unit of fuel.
const MADE: u64 = 2;

/// How an operation goes over its operands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Payment {
    /// All of every operand, to its last leaf.
    Whole,
    /// The same, and texts character by character.
    Characters,
    /// The items of the first operand, or its characters; the others are names.
    Items,
    /// All of the first operand, in comparisons of a sort.
    Sorted,
    /// The items of the first operand, which are added.
    Summed,
    /// The items of the first operand, each as the filter that the second names.
    Mapped,
    /// Two operands side by side.
    Compared,
    /// The same, or as in [`Payment::Contained`].
    Chained,
    /// A value, and a text, list or mapping to find it in.
    Contained,
    /// A list, and a value to count in it.
    Counted,
    /// A text, list or mapping, and the key or index of an item.
    Item,
    /// A text or list, start, stop and step.
    Sliced,
    /// Lists that are joined or repeated.
    Joined,
    /// A list that becomes variables.
    Unpacked,
    /// Keys and values in turn.
    Entries,
    /// Mappings whose entries are copied.
    Mappings,
    /// A text, what to replace, by what, and how often at most.
    Replaced,
    /// A text, and the separator if any.
    Split,
    /// A text, and the characters to take off if any.
    Trimmed,
    /// Something of another template, of which there is none.
    Others,
    /// A text with fields that begin with the character, and what goes into them.
    Formatted(char),
}

impl Payment {
    /// Pays for an operation. Views of lists become lists, so that none is the view of a view, and
    /// what would be made a text becomes one.
    ///
    /// # Errors
    /// No fuel left; an operand nested too deep.
    pub fn pay(self, state: &State, operands: &mut [Value]) -> Result<(), Error> {
        for operand in &mut *operands {
            plain(state, operand)?;
        }
        match self {
            Self::Whole => whole_each(state, operands),
            Self::Characters => {
                operands.iter().try_for_each(|operand| walk(state, operand, 0, READ))
            }
            Self::Items => {
                characters(state, operands.first())?;
                names(state, operands)
            }
            Self::Sorted => sorted(state, operands),
            Self::Summed => summed(state, operands),
            Self::Mapped => mapped(state, operands),
            Self::Joined => Ok(()),
            Self::Entries => {
                operands.iter().step_by(2).try_for_each(|key| walk(state, key, 0, COPIED))
            }
            Self::Mappings => operands.iter().try_for_each(|mapping| keys(state, mapping)),
            Self::Compared => both(operands, |a, b| compared(state, a, b, 0)),
            Self::Contained => {
                both(operands, |value, container| contained(state, value, container))
            }
            Self::Counted => both(operands, |list, value| contained(state, value, list)),
            Self::Chained => {
                both(operands, |a, b| compared(state, a, b, 0))?;
                both(operands, |value, container| contained(state, value, container))
            }
            Self::Others => {
                let message = "a chat template has no other templates to take something from";
                Err(Error::new(ErrorKind::InvalidOperation, message))
            }
            Self::Item => {
                characters(state, operands.first())?;
                whole_each(state, operands.get(1..).unwrap_or_default())
            }
            Self::Sliced => {
                characters(state, operands.first())?;
                listed(state, operands.first(), SKIPPED)
            }
            Self::Unpacked => listed(state, operands.first(), MADE),
            Self::Replaced => replaced(state, operands),
            Self::Split => split(state, operands),
            Self::Trimmed => {
                whole_each(state, operands)?;
                match texts(operands) {
                    [Some(text), Some(set), _] => product(state, text.len(), set.len(), COPIED),
                    _ => Ok(()),
                }
            }
            Self::Formatted(mark) => formatted(state, operands, mark),
        }
    }
}

/// Pays for a value that is being written, without what it holds.
///
/// # Errors
/// No fuel left; nested too deep.
pub fn node(state: &State, value: &Value, depth: usize) -> Result<(), Error> {
    pay_node(state, value, depth, READ)
}

/// Pays for going over a value with all that it holds, as often as it holds it.
///
/// # Errors
/// No fuel left; nested too deep.
pub fn whole(state: &State, value: &Value) -> Result<(), Error> {
    walk(state, value, 0, COPIED)
}

fn pay_node(state: &State, value: &Value, depth: usize, bytes: u64) -> Result<(), Error> {
    if depth > DEEPEST {
        let message =
            format!("a value nested more than {DEEPEST} deep cannot be written or compared");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    state.consume_fuel(1 + value.as_str().map_or(0, str::len) as u64 / bytes)
}

/// Texts in a list are written with quotes and escapes, character by character.
fn walk(state: &State, value: &Value, depth: usize, bytes: u64) -> Result<(), Error> {
    pay_node(state, value, depth, bytes)?;
    let map = value.kind() == ValueKind::Map;
    if map || is_list(value) {
        for item in value.try_iter()? {
            walk(state, &item, depth + 1, READ)?;
            if map {
                walk(state, &value.get_item(&item)?, depth + 1, READ)?;
            }
        }
    }
    Ok(())
}

fn whole_each(state: &State, values: &[Value]) -> Result<(), Error> {
    values.iter().try_for_each(|value| whole(state, value))
}

fn both(
    operands: &[Value],
    pay: impl FnOnce(&Value, &Value) -> Result<(), Error>,
) -> Result<(), Error> {
    match operands {
        [a, b, ..] => pay(a, b),
        _ => Ok(()),
    }
}

/// Mappings are compared entry by entry in either's order, so all of both counts.
fn compared(state: &State, a: &Value, b: &Value, depth: usize) -> Result<(), Error> {
    // The first pair is paid for by its instruction.
    state.consume_fuel(depth.min(1) as u64)?;
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        return state.consume_fuel(a.len().min(b.len()) as u64 / COPIED);
    }
    if is_list(a) && is_list(b) {
        node(state, a, depth)?;
        let mut pairs = a.try_iter()?.zip(b.try_iter()?);
        return pairs.try_for_each(|(a, b)| compared(state, &a, &b, depth + 1));
    }
    if a.kind() == ValueKind::Map && b.kind() == ValueKind::Map {
        walk(state, a, depth, COPIED)?;
        walk(state, b, depth, COPIED)?;
    }
    Ok(())
}

fn contained(state: &State, value: &Value, container: &Value) -> Result<(), Error> {
    if is_list(container) {
        return container.try_iter()?.try_for_each(|item| {
            state.consume_fuel(1)?;
            compared(state, &item, value, 0)
        });
    }
    characters(state, Some(container))?;
    whole(state, value)
}

/// Replaces a view of a list by the list.
fn plain(state: &State, value: &mut Value) -> Result<(), Error> {
    if value.kind() != ValueKind::Iterable {
        return Ok(());
    }
    let known = value.len();
    state.consume_fuel(known.unwrap_or(0) as u64 / MADE)?;
    let mut items = Vec::new();
    for item in value.try_iter()? {
        if known.is_none() {
            state.consume_fuel(1)?;
        }
        items.push(item);
    }
    *value = Value::from(items);
    Ok(())
}

fn characters(state: &State, value: Option<&Value>) -> Result<(), Error> {
    let bytes = value.and_then(Value::as_str).map_or(0, str::len);
    state.consume_fuel(bytes as u64 / READ)
}

fn listed(state: &State, value: Option<&Value>, items: u64) -> Result<(), Error> {
    let length = value.filter(|value| is_list(value)).and_then(Value::len);
    state.consume_fuel(length.unwrap_or(0) as u64 / items)
}

/// Each item is asked for what the other operands name, with dots and commas between the names.
fn names(state: &State, operands: &[Value]) -> Result<(), Error> {
    let Some((list, names)) = operands.split_first() else { return Ok(()) };
    let (mut bytes, mut parts) = (0, 0);
    let mut add = |name: &str| {
        bytes += name.len();
        parts += name.matches(['.', ',']).count();
    };
    for name in names {
        name.as_str().into_iter().for_each(&mut add);
        // Named arguments are a mapping.
        if name.kind() == ValueKind::Map {
            for key in name.try_iter()? {
                whole(state, &key)?;
                name.get_item(&key)?.as_str().into_iter().for_each(&mut add);
            }
        }
    }
    product(state, length(list), parts, 1)?;
    product(state, length(list), bytes, COPIED)
}

/// Pays for the filter that is called with each item and what comes after its name.
fn mapped(state: &State, operands: &mut [Value]) -> Result<(), Error> {
    names(state, operands)?;
    let [list, name, more @ ..] = operands else { return Ok(()) };
    let Some(payment) = name.as_str().and_then(builtins::filter) else { return Ok(()) };
    if !is_list(list) {
        return Ok(());
    }
    let mut items = Vec::new();
    for item in list.try_iter()? {
        let mut called = vec![item];
        called.extend_from_slice(more);
        payment.pay(state, &mut called)?;
        items.push(called.swap_remove(0));
    }
    *list = Value::from(items);
    Ok(())
}

fn sorted(state: &State, operands: &[Value]) -> Result<(), Error> {
    names(state, operands)?;
    let spent = || state.fuel_levels().map_or(0, |(spent, _)| spent);
    let before = spent();
    whole_each(state, operands)?;
    let once = spent() - before;
    let items = operands.first().map_or(0, length);
    // Each item is compared about log2(items) times.
    state.consume_fuel(once.saturating_mul(items.max(2).ilog2().into()))
}

/// Texts and lists get longer with every addition.
fn summed(state: &State, operands: &[Value]) -> Result<(), Error> {
    names(state, operands)?;
    let Some(list) = operands.first().filter(|list| is_list(list)) else { return Ok(()) };
    let (mut count, mut total) = (0, 0);
    for item in list.try_iter()? {
        state.consume_fuel(1)?;
        if item.kind() != ValueKind::Number {
            count += 1;
            total += item.as_str().map_or_else(|| length(&item), str::len);
        }
    }
    product(state, count, total, SKIPPED)
}

fn keys(state: &State, mapping: &Value) -> Result<(), Error> {
    if mapping.kind() != ValueKind::Map {
        return Ok(());
    }
    mapping.try_iter()?.try_for_each(|key| whole(state, &key))
}

fn replaced(state: &State, operands: &mut [Value]) -> Result<(), Error> {
    textual(state, operands.get_mut(..3).unwrap_or_default())?;
    let most = operands.get(3).and_then(Value::as_usize).unwrap_or(usize::MAX);
    let [Some(text), Some(old), Some(new)] = texts(operands) else { return Ok(()) };
    let matches = counted(state, text.matches(old).take(most))?;
    product(state, matches, new.len().saturating_sub(old.len()), COPIED)
}

fn split(state: &State, operands: &[Value]) -> Result<(), Error> {
    match texts(operands) {
        [Some(text), Some(separator), _] => counted(state, text.matches(separator))?,
        [Some(text), None, _] => counted(state, text.matches(char::is_whitespace))?,
        _ => 0,
    };
    Ok(())
}

/// Counts pieces of a text, and pays for each.
fn counted<'a>(state: &State, pieces: impl Iterator<Item = &'a str>) -> Result<usize, Error> {
    let mut count: u64 = 0;
    for _ in pieces {
        count += 1;
        state.consume_fuel(u64::from(count.is_multiple_of(MADE)))?;
    }
    Ok(count as usize)
}

/// Fields may name the same value again and again, and a width that nothing fills.
fn formatted(state: &State, operands: &[Value], mark: char) -> Result<(), Error> {
    characters(state, operands.first())?;
    let Some(text) = operands.first().and_then(Value::as_str) else { return Ok(()) };
    for run in text.split(|c: char| !c.is_ascii_digit()) {
        let width = if run.is_empty() { 0 } else { run.parse().unwrap_or(u64::MAX) };
        state.consume_fuel(width / COPIED)?;
    }
    for _ in text.matches(mark) {
        state.consume_fuel(1)?;
        whole_each(state, &operands[1..])?;
    }
    Ok(())
}

/// Makes texts of values that an operation would make texts of.
fn textual(state: &State, values: &mut [Value]) -> Result<(), Error> {
    for value in values {
        whole(state, value)?;
        if matches!(value.kind(), ValueKind::Seq | ValueKind::Map) {
            *value = Value::from(value.to_string());
        }
    }
    Ok(())
}

fn product(state: &State, a: usize, b: usize, divisor: u64) -> Result<(), Error> {
    state.consume_fuel((a as u64).saturating_mul(b as u64) / divisor)
}

/// The first three operands, where they are texts.
fn texts(operands: &[Value]) -> [Option<&str>; 3] {
    [0, 1, 2].map(|i| operands.get(i).and_then(Value::as_str))
}

fn length(list: &Value) -> usize {
    if is_list(list) { list.len().unwrap_or(0) } else { 1 }
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

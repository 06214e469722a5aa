//! Chat templates: messages to text, as transformers' `apply_chat_template` renders them.

use super::{builtins, clock, fuel, program, program::Program, python};
use crate::{Error, Result, allocator};
use minijinja::{Environment, ErrorKind, State, UndefinedBehavior, Value};
use regex::Regex;
use std::ops::Range;
use uft_core::guard::{catch, record_places};

/// Work that one rendering may do, in instructions, 64 bytes of text, or what [`fuel`] takes for them.
/// Long conversations need some ten thousand; a template that does not end is stopped within about a
/// second and after 128 MB.
const FUEL: u64 = 2_000_000;
/// Stack of a rendering, of which only what is used takes memory. A list that a loop wraps into a new
/// list every time gets as deep as the fuel lasts, and goes down to its end when it is dropped.
const STACK: usize = 512 << 20;
/// Longest template that cannot nest its values deep without a namespace, in bytes.
const MOST_SHALLOW: usize = 1 << 16;
/// Depth of macros within macros.
const RECURSION: usize = 200;
/// Noncharacters of Unicode around the text of a `{% generation %}` block, removed after rendering.
/// In the template each stands between two tags of Jinja's own, of which the outer one behaves
/// towards white space as the generation tag would, and the other gives the block its scope.
pub const START: char = '\u{FDD0}';
pub const END: char = '\u{FDD1}';

/// A compiled chat template.
///
/// Compared with transformers' renderings on 142 templates of real models it differs in three
/// things: numbers below 1e-4 or from 1e16 on that a template joins to text with `~` or prints in a
/// list are not written with Python's exponent; text marked `safe` does not escape what `+` joins to
/// it; and a loop over None, which Python refuses, does nothing.
pub struct Template {
    env: Environment<'static>,
    program: Program,
    /// The file that it comes from, for messages.
    origin: String,
    has_generation: bool,
    uses_clock: bool,
    /// Whether it can nest values deep, in turns of a loop above all.
    nests: bool,
}

/// What a template wrote.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rendered {
    pub text: String,
    /// Byte ranges of `text` that stand in `{% generation %}` blocks, in order.
    pub generation: Vec<Range<usize>>,
}

impl Template {
    /// Compiles a template. `now` is the moment of `strftime_now`, in seconds since 1970 (UTC).
    ///
    /// # Errors
    /// Syntax that is not Jinja's, with file and line.
    pub fn new(source: &str, origin: impl Into<String>, now: i64) -> Result<Self> {
        let origin = origin.into();
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let tag =
            Regex::new(r"\{%([-+]?)(\s*)(end)?generation(\s*)([-+]?)%\}").expect("a valid regex");
        let has_generation = tag.is_match(&source);
        let source = tag.replace_all(&source, |c: &regex::Captures| {
            let (mark, scope) = if c.get(3).is_some() { (END, "endwith") } else { (START, "with") };
            format!("{{%{}{}set __uft = 0 %}}{mark}{{% {scope}{}{}%}}", &c[1], &c[2], &c[4], &c[5])
        });
        let uses_clock = source.contains("strftime_now");
        let nests = source.contains("namespace") || source.len() > MOST_SHALLOW;
        let program = sound(&origin, || Program::new(&source))?;
        let env = environment(now);
        Ok(Self { env, program, origin, has_generation, uses_clock, nests })
    }

    /// Whether the template marks what the assistant says with `{% generation %}`.
    pub fn has_generation(&self) -> bool {
        self.has_generation
    }

    /// Whether what the template writes can depend on today's date.
    pub fn uses_clock(&self) -> bool {
        self.uses_clock
    }

    /// Limits the fuel of a rendering.
    #[cfg(test)]
    pub(super) fn limit(&mut self, fuel: u64) {
        self.env.set_fuel(Some(fuel));
    }

    /// Renders messages with further variables.
    ///
    /// # Errors
    /// Whatever the template refuses or cannot do, with file and line.
    pub fn render(
        &self,
        messages: &[Value],
        variables: &[(String, Value)],
        add_generation_prompt: bool,
    ) -> Result<Rendered> {
        let own = [
            ("messages".to_owned(), Value::from(messages.to_vec())),
            ("add_generation_prompt".to_owned(), Value::from(add_generation_prompt)),
        ];
        let context = Value::from_pairs(variables.iter().cloned().chain(own));
        let render = || sound(&self.origin, || self.program.render(&self.env, context));
        let text = if self.nests { with_stack(render)? } else { render()? };
        if !self.has_generation {
            return Ok(Rendered { text, generation: Vec::new() });
        }
        unmark(&text).ok_or_else(|| {
            Error::data(format!(
                "{}: the template cuts apart what its generation blocks have written",
                self.origin
            ))
        })
    }
}

/// Calls the minijinja library, which panics on some templates where it should refuse them.
fn sound<T>(
    origin: &str,
    call: impl FnOnce() -> std::result::Result<T, minijinja::Error>,
) -> Result<T> {
    record_places();
    let result = catch(call).map_err(|what| {
        Error::data(format!("{origin}: the template engine {what}; the template is damaged"))
    })?;
    result.map_err(|e| explain(origin, &e))
}

/// Runs a rendering on a stack of [`STACK`].
fn with_stack(render: impl FnOnce() -> Result<String> + Send) -> Result<String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, render);
        let thread = thread.unwrap_or_else(|_| allocator::out_of_memory(STACK));
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The environment that transformers compiles chat templates in, with bounds on time and memory.
fn environment(now: i64) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(RECURSION);
    env.set_debug(true);
    program::install(&mut env);
    builtins::install(&mut env);
    python::install(&mut env);
    env.add_function("raise_exception", |state: &State, message: Value| {
        fuel::whole(state, &message)?;
        let message = message.to_string();
        state.consume_fuel(message.len() as u64)?;
        Err::<Value, _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", move |state: &State, format: &str| {
        state.consume_fuel(format.len() as u64)?;
        clock::strftime(now, format).ok_or_else(|| {
            let message = format!("strftime_now: the format {format:?} is not supported");
            minijinja::Error::new(ErrorKind::InvalidOperation, message)
        })
    });
    env
}

/// Removes the marks and says where they were. `None` if they do not match.
fn unmark(marked: &str) -> Option<Rendered> {
    let mut rendered =
        Rendered { text: String::with_capacity(marked.len()), generation: Vec::new() };
    let (mut depth, mut start) = (0, 0);
    for c in marked.chars() {
        match c {
            START => {
                if depth == 0 {
                    start = rendered.text.len();
                }
                depth += 1;
            }
            END if depth == 0 => return None,
            END => {
                depth -= 1;
                if depth == 0 && start < rendered.text.len() {
                    rendered.generation.push(start..rendered.text.len());
                }
            }
            c => rendered.text.push(c),
        }
    }
    (depth == 0).then_some(rendered)
}

/// One line for a template's error: file, line, what is wrong.
fn explain(origin: &str, error: &minijinja::Error) -> Error {
    let place = match error.line() {
        Some(line) => format!("{origin}, line {line}"),
        None => origin.to_owned(),
    };
    let what = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => "the template does not come to an end".to_owned(),
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    Error::data(format!("{place}: {what}"))
}

//! A compiled template whose every instruction pays before it works, see [`Payment`].
//!
//! minijinja has no hook in its operators, but lets a compiled template be changed. An instruction
//! that can walk over its operands becomes a jump behind the end of the template, to a call of a
//! function that takes the operands, pays and gives them back, the instruction itself, and a jump
//! back. Comparisons become tests, which pay themselves. What is constant minijinja computes when it
//! compiles, and without fuel, so no product is constant here.

use super::builtins::filter;
use super::fuel::Payment;
use minijinja::machinery::{
    CompiledTemplate, Instruction, Instructions, TemplateConfig, Token, eval, make_string_output,
    tokenize,
};
use minijinja::value::{Object, ObjectRepr, Tuple};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value, syntax::SyntaxConfig};
use std::collections::HashSet;
use std::sync::Arc;

/// Name of the template in its messages.
const NAME: &str = "chat";
/// An address behind the end, where a template ends.
const END: u32 = u32::MAX;
/// No place among a template's loaded tests.
const NO_PLACE: u8 = u8::MAX;
/// Most entries of a mapping that is written down in a template.
const MOST_ENTRIES: usize = 10_000;

/// A variable that is one.
const ONE: &str = "__uft_one";
/// What stands for taking something from another template.
const OTHERS: &str = "pay: others";

/// Functions that pay, by names that no template can write.
const CALLS: [(&str, Payment); 21] = [
    ("pay: whole", Payment::Whole),
    ("pay: characters", Payment::Characters),
    ("pay: items", Payment::Items),
    ("pay: sorted", Payment::Sorted),
    ("pay: summed", Payment::Summed),
    ("pay: mapped", Payment::Mapped),
    ("pay: compared", Payment::Compared),
    ("pay: chained", Payment::Chained),
    ("pay: contained", Payment::Contained),
    ("pay: item", Payment::Item),
    ("pay: sliced", Payment::Sliced),
    ("pay: joined", Payment::Joined),
    ("pay: unpacked", Payment::Unpacked),
    ("pay: entries", Payment::Entries),
    ("pay: mappings", Payment::Mappings),
    ("pay: replaced", Payment::Replaced),
    ("pay: split", Payment::Split),
    ("pay: trimmed", Payment::Trimmed),
    (OTHERS, Payment::Others),
    ("pay: formatted %", Payment::Formatted('%')),
    ("pay: formatted {", Payment::Formatted('{')),
];

/// A compiled template with its source.
pub struct Program {
    /// Borrows from `source`, and is dropped before it.
    compiled: CompiledTemplate<'static>,
    #[expect(dead_code, reason = "what `compiled` borrows from")]
    source: Box<str>,
}

impl Program {
    /// Compiles a template.
    ///
    /// # Errors
    /// Broken syntax.
    pub fn new(source: &str) -> Result<Self, Error> {
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .keep_trailing_newline(false)
            .build()
            .expect("Jinja's own delimiters");
        let source = variable_products(source, &syntax).into_boxed_str();
        let config = TemplateConfig {
            syntax_config: syntax,
            default_auto_escape: Arc::new(|_| AutoEscape::None),
        };
        // SAFETY: the text lies in a box, which does not move and is freed after `compiled`; what
        // borrows from it does not leave this struct with the longer lifetime.
        let text: &'static str = unsafe { &*std::ptr::from_ref::<str>(&source) };
        let mut compiled = CompiledTemplate::new(NAME, text, &config)?;
        meter(&mut compiled.instructions)?;
        compiled.blocks.values_mut().try_for_each(meter)?;
        Ok(Self { compiled, source })
    }

    /// Renders with variables, in an environment with [`install`]ed functions.
    ///
    /// # Errors
    /// Whatever the template refuses or cannot do; no fuel left.
    pub fn render(&self, env: &Environment, variables: Value) -> Result<String, Error> {
        let mut text = String::with_capacity(self.compiled.buffer_size_hint);
        let mut out = make_string_output(&mut text);
        let CompiledTemplate { instructions, blocks, .. } = &self.compiled;
        eval(env, instructions, variables, blocks, &mut out, AutoEscape::None)?;
        drop(out);
        Ok(text)
    }
}

/// Multiplies everything that is multiplied by [`ONE`] too. Text of broken syntax stays as it is.
fn variable_products(source: &str, syntax: &SyntaxConfig) -> String {
    let mut changed = String::with_capacity(source.len());
    let (mut copied, mut unpacks) = (0, false);
    for (token, span) in tokenize(source, false, syntax.clone()).map_while(Result::ok) {
        let start = span.start_offset as usize;
        // In front of an argument the star has another meaning.
        if matches!(token, Token::Mul) && !unpacks {
            changed += &source[copied..start];
            changed += "* ";
            changed += ONE;
            changed.push(' ');
            copied = start;
        }
        unpacks = matches!(token, Token::ParenOpen | Token::Comma);
    }
    changed + &source[copied..]
}

/// Adds what a [`Program`] calls to an environment.
pub fn install(env: &mut Environment) {
    env.add_global(ONE, 1);
    for (name, payment) in CALLS {
        env.add_global(name, Value::from_object(Call(payment)));
    }
}

/// Takes operands, pays for them and gives them back.
#[derive(Debug)]
struct Call(Payment);

impl Object for Call {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &mut State, operands: &[Value]) -> Result<Value, Error> {
        let mut operands = operands.to_vec();
        self.0.pay(state, &mut operands)?;
        Ok(Value::from(Tuple::from(operands)))
    }
}

/// What becomes of an instruction.
enum Metered<'a> {
    /// As it is.
    Free,
    /// Another one in its place.
    Instead(Instruction<'a>),
    /// After payment for so many operands, or for as many as the stack says.
    Paid(Payment, Option<u16>),
}

/// Makes all instructions pay.
fn meter(instructions: &mut Instructions) -> Result<(), Error> {
    let length = (0..).find(|&i| instructions.get(i).is_none()).expect("an end");
    let targets: HashSet<u32> =
        (0..length).filter_map(|i| instructions.get(i).and_then(target)).collect();
    // What is put behind the end is not run into.
    instructions.add(Instruction::Jump(END));
    for place in 0..length {
        // An index that is written down is the operand of all that comes by, unless something jumps here.
        let constant = place.checked_sub(1).filter(|_| !targets.contains(&place));
        let constant = match constant.and_then(|before| instructions.get(before)) {
            Some(Instruction::LoadConst(value)) => Some(value),
            _ => None,
        };
        match metered(instructions.get(place).expect("an instruction"), constant)? {
            Metered::Free => {}
            Metered::Instead(other) => {
                *instructions.get_mut(place).expect("an instruction") = other;
            }
            Metered::Paid(payment, operands) => detour(instructions, place, payment, operands),
        }
    }
    Ok(())
}

/// Where an instruction may jump to.
fn target(instruction: &Instruction) -> Option<u32> {
    use Instruction::{Iterate, Jump, JumpIfFalse, JumpIfFalseOrPop, JumpIfTrueOrPop};
    match instruction {
        Iterate(to) | Jump(to) => Some(*to),
        JumpIfFalse(to) | JumpIfFalseOrPop(to) | JumpIfTrueOrPop(to) => Some(*to),
        _ => None,
    }
}

/// `constant` is the last operand if it is written down in the template.
fn metered<'a>(
    instruction: &Instruction<'a>,
    constant: Option<&Value>,
) -> Result<Metered<'a>, Error> {
    use minijinja::machinery::Instruction::*;
    let comparison = |name| Metered::Instead(PerformTest(name, Some(2), NO_PLACE));
    let paid = |payment, operands: usize| Metered::Paid(payment, u16::try_from(operands).ok());
    Ok(match instruction {
        Eq => comparison("eq"),
        Ne => comparison("ne"),
        Gt => comparison("gt"),
        Gte => comparison("ge"),
        Lt => comparison("lt"),
        Lte => comparison("le"),
        CompareAndPreserve(_) => paid(Payment::Chained, 2),
        In => paid(Payment::Contained, 2),
        StringConcat => paid(Payment::Whole, 2),
        Add | Mul => paid(Payment::Joined, 2),
        GetItem if constant.is_some_and(is_short) => Metered::Free,
        GetItem => paid(Payment::Item, 2),
        Slice => paid(Payment::Sliced, 4),
        UnpackList(_) => paid(Payment::Unpacked, 1),
        BuildMap(entries) if *entries > MOST_ENTRIES => {
            let message = format!("a mapping of more than {MOST_ENTRIES} entries");
            return Err(Error::new(ErrorKind::SyntaxError, message));
        }
        BuildMap(entries) => paid(Payment::Entries, 2 * entries),
        MergeKwargs(mappings) => paid(Payment::Mappings, *mappings),
        ApplyFilter(name, operands, _) => match filter(name) {
            Some(payment) => Metered::Paid(payment, *operands),
            None => Metered::Free,
        },
        // A loop compares what it is given with what it was given last. Other methods pay themselves.
        CallMethod("changed", operands) => Metered::Paid(Payment::Whole, *operands),
        Include(_) | LoadBlocks => Metered::Instead(CallFunction(OTHERS, Some(1))),
        _ => Metered::Free,
    })
}

/// Whether an index costs nothing to look up: a name, or one of the first items.
fn is_short(index: &Value) -> bool {
    index.as_str().is_some() || index.as_usize().is_some_and(|index| index < 64)
}

/// Replaces an instruction by a jump to one that has been paid for.
fn detour<'a>(
    instructions: &mut Instructions<'a>,
    place: u32,
    payment: Payment,
    operands: Option<u16>,
) {
    let name = CALLS.iter().find(|(_, known)| *known == payment).expect("a call for each").0;
    let original = instructions.get(place).expect("an instruction").clone();
    let line = instructions.get_line(place);
    let span = instructions.get_span(place);
    let mut add = |instruction: Instruction<'a>| match (span, line) {
        (Some(span), _) => instructions.add_with_span(instruction, span),
        (None, Some(line)) => instructions.add_with_line(instruction, line as u16),
        (None, None) => instructions.add(instruction),
    };
    let start = add(Instruction::CallFunction(name, operands));
    // Gives back the operands and their number, which is an operand where the stack has to say it.
    add(Instruction::UnpackLists(1));
    if operands.is_some() {
        add(Instruction::DiscardTop);
    }
    add(original);
    add(Instruction::Jump(place + 1));
    *instructions.get_mut(place).expect("an instruction") = Instruction::Jump(start);
}

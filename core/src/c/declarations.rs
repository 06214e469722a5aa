//! What crosses the border in C. The header's text is this file's, comments included.
//!
//! Within revision 1 nothing here changes but one thing: a struct that begins with `size` may get
//! further fields at its end. Whoever fills such a struct writes its own `sizeof` into `size`, and
//! whoever reads it reads no further. Elements of arrays have no size and never change.

use std::ffi::{c_char, c_void};

/// The revision of this interface; `UftPlugin.revision`.
pub const UFT_C_REVISION: u32 = 1;

/// A response to imitate; its value is 1.
pub const UFT_DEMONSTRATION: u32 = 0;
/// A response with a score from 0 to 1.
pub const UFT_SCORE: u32 = 1;
/// A response with thumbs up (1) or down (0).
pub const UFT_BINARY: u32 = 2;
/// The better response of a pair; its value is the margin, 0 if none is known.
pub const UFT_CHOSEN: u32 = 3;
/// The worse response of a pair; its value is the margin.
pub const UFT_REJECTED: u32 = 4;

/// `UftObjective.accepts` is a sum of bits, one for each kind of feedback.
pub const UFT_ACCEPTS_DEMONSTRATION: u64 = 1;
/// UFT_SCORE.
pub const UFT_ACCEPTS_SCORE: u64 = 2;
/// UFT_BINARY.
pub const UFT_ACCEPTS_BINARY: u64 = 4;
/// UFT_CHOSEN.
pub const UFT_ACCEPTS_CHOSEN: u64 = 8;
/// UFT_REJECTED.
pub const UFT_ACCEPTS_REJECTED: u64 = 16;
/// Chosen and rejected.
pub const UFT_ACCEPTS_PAIR: u64 = 24;

/// `UftObjective.needs` is a sum of bits, too. This one: log-probs of the reference, in `UftBatch.ref_logps`.
pub const UFT_NEEDS_REFERENCE: u64 = 1;
/// Every group has a chosen and a rejected response.
pub const UFT_NEEDS_PAIRS: u64 = 2;
/// Every group has two responses or more.
pub const UFT_NEEDS_GROUPS: u64 = 4;
/// `UftStep.mismatched`; implies the reference.
pub const UFT_NEEDS_MISMATCHED: u64 = 8;
/// `UftStep.log_ratios`; implies the reference.
pub const UFT_NEEDS_STEP_LOG_RATIOS: u64 = 16;
/// The loss depends on how many tokens a response has.
pub const UFT_NEEDS_TOKEN_COUNTS: u64 = 32;
/// Single tokens matter, not only their sum.
pub const UFT_NEEDS_TOKEN_LOGPS: u64 = 64;
/// `save_state` goes into checkpoints.
pub const UFT_NEEDS_STATE: u64 = 128;
/// `UftStep.responses`; implies `UFT_NEEDS_STEP_LOG_RATIOS`.
pub const UFT_NEEDS_STEP_RESPONSES: u64 = 256;

/// `UftParam.kind`: any finite number.
pub const UFT_NUMBER: u32 = 0;
/// A number above 0.
pub const UFT_POSITIVE: u32 = 1;
/// A number that is not negative.
pub const UFT_NOT_NEGATIVE: u32 = 2;
/// A number from `low` to `high`, both included.
pub const UFT_WITHIN: u32 = 3;
/// true or false; the number is 1 or 0.
pub const UFT_FLAG: u32 = 4;
/// One of the words in `words`; the number is its place among them, from 0.
pub const UFT_CHOICE: u32 = 5;
/// A text.
pub const UFT_TEXT: u32 = 6;

/// A parameter of the configuration: the host reads it, refuses what it cannot be, and gives its
/// value to `create`. Texts are UTF-8 and end with a zero byte, here and everywhere.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UftParam {
    /// The key in the configuration.
    pub name: *const c_char,
    /// What it does, in one line.
    pub about: *const c_char,
    /// UFT_NUMBER, UFT_POSITIVE, ...
    pub kind: u32,
    /// The default of a number; of a flag 1 or 0.
    pub number: f64,
    /// The default of a text, or of a choice one of its words.
    pub text: *const c_char,
    /// The words of a choice, with `|` between them: "mse|bce".
    pub words: *const c_char,
    /// The least number of UFT_WITHIN.
    pub low: f64,
    /// The largest number of UFT_WITHIN.
    pub high: f64,
}

/// The value of a parameter.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UftValue {
    /// Of a number, a flag or a choice; otherwise 0.
    pub number: f64,
    /// Of a text or a choice; otherwise NULL.
    pub text: *const c_char,
}

/// Why something cannot be done. The host gives it empty; whoever fails writes one line into it.
#[repr(C)]
pub struct UftFault {
    /// sizeof(UftFault) of the host.
    pub size: u32,
    /// In UTF-8, with a zero byte at its end.
    pub message: [c_char; 508],
}

/// A response of a batch: a range of trained tokens with the feedback that it got.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UftSegment {
    /// Equal for the responses to one prompt.
    pub group: u32,
    /// Its place among the responses of the step, the index into `UftStep.log_ratios`.
    pub in_step: u32,
    /// Its first token in `UftBatch.logps`.
    pub start: u32,
    /// Number of its tokens, at least 1.
    pub tokens: u32,
    /// UFT_DEMONSTRATION, UFT_SCORE, ...
    pub kind: u32,
    /// What was said of it; see its kind.
    pub value: f32,
}

/// A response of the step, whatever batch it is in.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UftResponse {
    /// `UftSegment.group`.
    pub group: u32,
    /// `UftSegment.kind`.
    pub kind: u32,
    /// log pi(y|x) in nats.
    pub logp: f64,
    /// log pi(y|x) - log pi_ref(y|x) in nats.
    pub log_ratio: f64,
}

/// Totals of one objective over the whole optimizer step. A step is evaluated in one or more
/// batches; divide by these and never by what is in a batch, so that the gradient does not depend on
/// how a step is split.
#[repr(C)]
pub struct UftStep {
    /// sizeof(UftStep) of the host.
    pub size: u32,
    /// 0 in evaluation and in checks: state must not change.
    pub training: u32,
    /// Optimizer step, from 0.
    pub number: u64,
    /// Optimizer steps planned in all.
    pub steps: u64,
    /// Prompts with their responses.
    pub groups: u64,
    /// Responses.
    pub segments: u64,
    /// Pairs of a chosen and a rejected response of the same group.
    pub pairs: u64,
    /// Trained tokens.
    pub tokens: u64,
    /// Responses of each kind, in the order of the kinds.
    pub by_kind: [u64; 5],
    /// log pi - log pi_ref of every response of the step, in nats, `segments` of them; NULL without
    /// UFT_NEEDS_STEP_LOG_RATIOS.
    pub log_ratios: *const f64,
    /// log pi - log pi_ref of every response's prompt with a completion of the group before it,
    /// `segments` of them; NULL without UFT_NEEDS_MISMATCHED.
    pub mismatched: *const f64,
    /// Every response of the step, `segments` of them; NULL without UFT_NEEDS_STEP_RESPONSES.
    pub responses: *const UftResponse,
}

/// The part of a step that one call of `evaluate` sees. Groups are never split between batches, and
/// the responses of a group are neighbours.
#[repr(C)]
pub struct UftBatch {
    /// sizeof(UftBatch) of the host.
    pub size: u32,
    /// Number of `segments`.
    pub segment_count: u32,
    /// The step that the batch is a part of.
    pub step: *const UftStep,
    /// The responses.
    pub segments: *const UftSegment,
    /// Log-probs of the policy for every trained token, response after response, in nats.
    pub logps: *const f32,
    /// The same of the reference; NULL without UFT_NEEDS_REFERENCE.
    pub ref_logps: *const f32,
    /// Number of trained tokens: of `logps`, of `ref_logps` and of `UftEvaluation.dlogp`.
    pub tokens: u64,
}

/// A named number, averaged by the host over batches as sum / count.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UftMetric {
    /// As it appears in metrics.jsonl.
    pub name: [c_char; 64],
    /// Sum of the observations.
    pub sum: f64,
    /// Number of the observations.
    pub count: f64,
}

/// What an evaluation gives. Everything is in the host's memory, and NaN until it is written.
#[repr(C)]
pub struct UftEvaluation {
    /// sizeof(UftEvaluation) of the host.
    pub size: u32,
    /// How many metrics were written.
    pub metric_count: u32,
    /// How many there is room for.
    pub metric_capacity: u32,
    /// The batch's share of the step's loss.
    pub loss: f64,
    /// d loss / d logp of every token, in the order of `UftBatch.logps`. All have to be written.
    pub dlogp: *mut f32,
    /// `uft_metric` writes them.
    pub metrics: *mut UftMetric,
}

/// An objective: what it is called, what it asks for, and its functions. Those that give an int give
/// 0, or anything else after writing `fault`. `evaluate` may be called by several threads at once,
/// the others are not. None of them may unwind (C++ exceptions) or jump out.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UftObjective {
    /// sizeof(UftObjective) of the library.
    pub size: u32,
    /// Number of `params`.
    pub param_count: u32,
    /// The name in the configuration: objective = { plugin = "..." }.
    pub name: *const c_char,
    /// One line: the formula and, in parentheses, where it is from.
    pub about: *const c_char,
    /// UFT_NEEDS_... that the host has to prepare.
    pub needs: u64,
    /// UFT_ACCEPTS_... that it is defined for.
    pub accepts: u64,
    /// NULL if there are none.
    pub params: *const UftParam,
    /// Makes an objective; NULL after writing `fault`. `values` are those of `params`, in the same
    /// order, and are there during the call only.
    pub create:
        Option<unsafe extern "C" fn(values: *const UftValue, fault: *mut UftFault) -> *mut c_void>,
    /// Frees what `create` made; may be NULL.
    pub destroy: Option<unsafe extern "C" fn(objective: *mut c_void)>,
    /// Called once before the batches of a step: the place to update state; may be NULL.
    pub begin_step: Option<
        unsafe extern "C" fn(
            objective: *mut c_void,
            step: *const UftStep,
            fault: *mut UftFault,
        ) -> i32,
    >,
    /// Writes loss and gradient of a batch. The same batch gives the same result.
    pub evaluate: Option<
        unsafe extern "C" fn(
            objective: *const c_void,
            batch: *const UftBatch,
            out: *mut UftEvaluation,
            fault: *mut UftFault,
        ) -> i32,
    >,
    /// Writes the state if it fits into `capacity` bytes, and gives its length in any case: it is
    /// asked for the length first. Needed with UFT_NEEDS_STATE, otherwise NULL.
    pub save_state: Option<
        unsafe extern "C" fn(objective: *const c_void, bytes: *mut c_void, capacity: u64) -> u64,
    >,
    /// Takes back what `save_state` wrote. Needed with UFT_NEEDS_STATE, otherwise NULL.
    pub load_state: Option<
        unsafe extern "C" fn(
            objective: *mut c_void,
            bytes: *const c_void,
            length: u64,
            fault: *mut UftFault,
        ) -> i32,
    >,
}

/// What a library has. It stays as it is and where it is for the life of the process, with
/// everything that it points to.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UftPlugin {
    /// UFT_C_REVISION.
    pub revision: u32,
    /// sizeof(UftPlugin) of the library.
    pub size: u32,
    /// Pointers to the objectives.
    pub objectives: *const *const UftObjective,
    /// How many they are.
    pub objective_count: u64,
}

unsafe extern "C" {
    /// The one symbol that a library exports.
    pub fn uft_c_plugin() -> *const UftPlugin;
}

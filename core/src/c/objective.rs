//! An objective in C as one of Rust: what it sees, and everything checked that comes back.

use super::declarations::*;
use super::param::Param;
use super::read;
use crate::abi::{ObjectiveAbi, ObjectiveAbi_TO, ObjectiveObject};
use crate::batch::{Batch, Metric, Outcome, Segment, Step};
use crate::fault::{Fault, FaultKind};
use crate::needs::{Kinds, Needs};
use crate::params::Params;
use abi_stable::{
    sabi_trait::TD_Opaque,
    std_types::{RResult, RSlice, RSliceMut, RVec},
};
use std::ffi::{c_char, c_void};
use std::ptr::null;

/// Room for metrics of a batch.
const METRICS: usize = 64;
/// Longest state that is believed, in bytes.
const LONGEST_STATE: u64 = 1 << 30;

/// An objective of a table.
#[derive(Debug)]
pub(super) struct Objective {
    pub name: String,
    pub about: String,
    pub needs: Needs,
    pub accepts: Kinds,
    pub params: Vec<Param>,
    pub functions: Functions,
}

type Create = unsafe extern "C" fn(*const UftValue, *mut UftFault) -> *mut c_void;
type Destroy = unsafe extern "C" fn(*mut c_void);
type BeginStep = unsafe extern "C" fn(*mut c_void, *const UftStep, *mut UftFault) -> i32;
type Evaluate =
    unsafe extern "C" fn(*const c_void, *const UftBatch, *mut UftEvaluation, *mut UftFault) -> i32;
type SaveState = unsafe extern "C" fn(*const c_void, *mut c_void, u64) -> u64;
type LoadState = unsafe extern "C" fn(*mut c_void, *const c_void, u64, *mut UftFault) -> i32;

/// Its functions, as [`UftObjective`] says.
#[derive(Debug)]
pub(super) struct Functions {
    pub create: Create,
    pub destroy: Option<Destroy>,
    pub begin_step: Option<BeginStep>,
    pub evaluate: Evaluate,
    pub state: Option<(SaveState, LoadState)>,
}

impl Objective {
    /// Makes an objective from its parameters as a JSON object.
    pub fn make(&'static self, params: &str) -> Result<ObjectiveObject, Fault> {
        let mut params = Params::from_json(params)?;
        let values: Vec<_> = self.params.iter().map(|param| param.read(&mut params)).collect();
        params.finish()?;
        let seen: Vec<UftValue> = values.iter().map(|value| value.seen()).collect();
        let mut said = Said::default();
        // SAFETY: the library's own function, with what it is declared to take.
        let object = unsafe { (self.functions.create)(seen.as_ptr(), said.pointer()) };
        if object.is_null() {
            return Err(said.fault(&self.name, FaultKind::Parameter, "create"));
        }
        let made = Made { of: self, object };
        said.is_whole(&self.name)?;
        Ok(ObjectiveAbi_TO::from_value(made, TD_Opaque))
    }
}

/// What a library's `create` made.
struct Made {
    of: &'static Objective,
    object: *mut c_void,
}

// SAFETY: the header says which functions may be called by several threads at once; the host calls the
// others through `&mut`.
unsafe impl Send for Made {}
// SAFETY: as above.
unsafe impl Sync for Made {}

impl Drop for Made {
    fn drop(&mut self) {
        if let Some(destroy) = self.of.functions.destroy {
            // SAFETY: made by `create` of the same table, and never used after.
            unsafe { destroy(self.object) };
        }
    }
}

// SAFETY, for every call below: the library's own function on what its `create` made; what else it gets
// is there for the call, as large as is said beside it.
impl ObjectiveAbi for Made {
    fn needs(&self) -> Needs {
        self.of.needs
    }

    fn accepts(&self) -> Kinds {
        self.of.accepts
    }

    fn begin_step(&mut self, step: &Step<'_>) -> RResult<(), Fault> {
        let Some(begin_step) = self.of.functions.begin_step else { return RResult::ROk(()) };
        let responses = responses(step);
        let step = seen(step, &responses);
        // SAFETY: above.
        self.call("begin_step", |fault| unsafe { begin_step(self.object, &step, fault) }).into()
    }

    fn evaluate(
        &self,
        batch: &Batch<'_>,
        mut dlogp: RSliceMut<'_, f32>,
    ) -> RResult<Outcome, Fault> {
        let outcome = self.evaluated(batch, dlogp.as_mut_slice());
        outcome.into()
    }

    fn save_state(&self) -> RResult<RVec<u8>, Fault> {
        self.saved().map(RVec::from).into()
    }

    fn load_state(&mut self, state: RSlice<'_, u8>) -> RResult<(), Fault> {
        let Some((_, load)) = self.of.functions.state else {
            return match state.is_empty() {
                true => RResult::ROk(()),
                false => {
                    RResult::RErr(Fault::evaluation(format!("`{}` keeps no state", self.of.name)))
                }
            };
        };
        let (bytes, length) = (state.as_ptr().cast(), state.len() as u64);
        // SAFETY: above.
        self.call("load_state", |fault| unsafe { load(self.object, bytes, length, fault) }).into()
    }
}

impl Made {
    /// Calls a function that gives 0 or writes a fault.
    fn call(&self, what: &str, call: impl FnOnce(*mut UftFault) -> i32) -> Result<(), Fault> {
        let mut said = Said::default();
        let code = call(said.pointer());
        match code {
            0 => said.is_whole(&self.of.name),
            _ => Err(said.fault(&self.of.name, FaultKind::Evaluation, what)),
        }
    }

    fn broken<T>(&self, what: impl AsRef<str>) -> Result<T, Fault> {
        Err(broken(&self.of.name, what.as_ref()))
    }

    fn evaluated(&self, batch: &Batch<'_>, dlogp: &mut [f32]) -> Result<Outcome, Fault> {
        let segment = |s: &Segment| UftSegment {
            group: s.group,
            in_step: s.in_step,
            start: s.start,
            tokens: s.tokens,
            kind: s.kind as u32,
            value: s.value,
        };
        let segments: Vec<UftSegment> = batch.segments().iter().map(segment).collect();
        let responses = responses(&batch.step);
        let step = seen(&batch.step, &responses);
        let given = UftBatch {
            size: size_of::<UftBatch>() as u32,
            segment_count: segments.len() as u32,
            step: &step,
            segments: segments.as_ptr(),
            logps: batch.logps.as_ptr(),
            ref_logps: if_any(batch.ref_logps.as_slice()),
            tokens: dlogp.len() as u64,
        };
        let unwritten = UftMetric { name: [0; 64], sum: f64::NAN, count: f64::NAN };
        let mut gradient = Edged::new(dlogp.len(), f32::NAN, EDGE);
        let mut metrics =
            Edged::new(METRICS, unwritten, UftMetric { sum: f64::INFINITY, ..unwritten });
        let mut out = UftEvaluation {
            size: size_of::<UftEvaluation>() as u32,
            metric_count: 0,
            metric_capacity: METRICS as u32,
            loss: f64::from_bits(UNWRITTEN),
            dlogp: gradient.inside(),
            metrics: metrics.inside(),
        };
        // SAFETY: above.
        let evaluate =
            |fault| unsafe { (self.of.functions.evaluate)(self.object, &given, &mut out, fault) };
        self.call("evaluate", evaluate)?;
        if !gradient.is_whole(|edge| edge.to_bits() == EDGE.to_bits()) {
            return self.broken(format!("wrote outside of its gradient of {} tokens", dlogp.len()));
        }
        if !metrics.is_whole(|edge| edge.sum == f64::INFINITY && edge.name == [0; 64]) {
            return self.broken(format!("wrote outside of its room for {METRICS} metrics"));
        }
        if out.loss.to_bits() == UNWRITTEN {
            return self.broken("did not write its loss");
        }
        let count = out.metric_count as usize;
        if count > METRICS {
            return self.broken(format!("gives {count} metrics, and there is room for {METRICS}"));
        }
        dlogp.copy_from_slice(gradient.written());
        let metrics = metrics.written()[..count].iter().map(|metric| self.metric(metric));
        Ok(Outcome { loss: out.loss, metrics: metrics.collect::<Result<_, _>>()? })
    }

    fn metric(&self, metric: &UftMetric) -> Result<Metric, Fault> {
        let name = read::buffer(&metric.name).map(|name| str::from_utf8(name));
        match name {
            Some(Ok(name)) if !name.is_empty() => {
                if metric.sum.is_nan() || metric.count.is_nan() || metric.count <= 0.0 {
                    let (sum, count) = (metric.sum, metric.count);
                    return self
                        .broken(format!("gives `{name}` as {sum} over {count} observations"));
                }
                Ok(Metric { name: name.into(), sum: metric.sum, count: metric.count })
            }
            Some(Ok(_)) => self.broken("gives a metric without a name"),
            Some(Err(_)) => self.broken("gives a metric whose name is not UTF-8"),
            None => self.broken("gives a metric whose name does not end"),
        }
    }

    fn saved(&self) -> Result<Vec<u8>, Fault> {
        let Some((save, _)) = self.of.functions.state else { return Ok(Vec::new()) };
        // SAFETY: above.
        let length = unsafe { save(self.object, std::ptr::null_mut(), 0) };
        if length > LONGEST_STATE {
            return self.broken(format!("has a state of {length} bytes, over {LONGEST_STATE}"));
        }
        let mut state = Edged::new(length as usize, 0u8, 0xed);
        // SAFETY: above.
        let again = unsafe { save(self.object, state.inside().cast(), length) };
        if again != length {
            return self.broken(format!("has a state of {length} bytes, then of {again}"));
        }
        if !state.is_whole(|edge| *edge == 0xed) {
            return self.broken(format!("wrote outside of its state of {length} bytes"));
        }
        Ok(state.written().to_vec())
    }
}

/// The responses of a step, where they are asked for.
fn responses(step: &Step<'_>) -> Vec<UftResponse> {
    let seen = step.responses().into_iter().map(|r| UftResponse {
        group: r.group,
        kind: r.kind as u32,
        logp: r.logp,
        log_ratio: r.log_ratio,
    });
    seen.collect()
}

/// A step as C sees it.
fn seen(step: &Step<'_>, responses: &[UftResponse]) -> UftStep {
    UftStep {
        size: size_of::<UftStep>() as u32,
        training: step.training.into(),
        number: step.number,
        steps: step.steps,
        groups: step.groups,
        segments: step.segments,
        pairs: step.pairs,
        tokens: step.tokens,
        by_kind: step.by_kind,
        log_ratios: if_any(step.log_ratios.as_slice()),
        mismatched: if_any(step.mismatched.as_slice()),
        responses: if_any(responses),
    }
}

fn if_any<T>(slice: &[T]) -> *const T {
    if slice.is_empty() { null() } else { slice.as_ptr() }
}

/// The plugin broke its side of the contract; the host tells it as it tells a panic, as a bug.
fn broken(name: &str, what: &str) -> Fault {
    Fault::new(FaultKind::Panic, format!("`{name}` {what}"))
}

/// A fault to be filled in, and what must stay as it is behind it.
#[repr(C)]
struct Said {
    fault: UftFault,
    edge: [u8; 512],
}

impl Default for Said {
    fn default() -> Self {
        let fault = UftFault { size: size_of::<UftFault>() as u32, message: [0; 508] };
        Self { fault, edge: [0xed; 512] }
    }
}

impl Said {
    fn pointer(&mut self) -> *mut UftFault {
        std::ptr::from_mut(self).cast()
    }

    fn is_whole(&self, name: &str) -> Result<(), Fault> {
        match self.edge.iter().all(|byte| *byte == 0xed) {
            true => Ok(()),
            false => Err(broken(name, "wrote a longer message than there is room for")),
        }
    }

    /// What a function says that failed.
    fn fault(&self, name: &str, kind: FaultKind, function: &str) -> Fault {
        if let Err(fault) = self.is_whole(name) {
            return fault;
        }
        let all: &[c_char] = &self.fault.message;
        // A message is told as far as it can be read.
        let message = match read::buffer(all) {
            Some(message) => String::from_utf8_lossy(message).into_owned(),
            None => return broken(name, "wrote a message that does not end"),
        };
        match message.trim() {
            "" => Fault::new(kind, format!("`{function}` failed without a word")),
            message => Fault::new(kind, message),
        }
    }
}

/// A loss that was not written, and what stands beside a gradient: NaNs that no arithmetic makes.
const UNWRITTEN: u64 = 0x7ff8_ed9e_ed9e_ed9e;
const EDGE: f32 = f32::from_bits(0x7fc0_ed9e);

/// Memory that a library writes into, between edges that it must not touch.
struct Edged<T> {
    all: Vec<T>,
    length: usize,
}

impl<T: Copy> Edged<T> {
    const EDGE: usize = 16;

    fn new(length: usize, inside: T, edge: T) -> Self {
        let mut all = vec![edge; length + 2 * Self::EDGE];
        all[Self::EDGE..Self::EDGE + length].fill(inside);
        Self { all, length }
    }

    fn inside(&mut self) -> *mut T {
        self.all.as_mut_ptr().wrapping_add(Self::EDGE)
    }

    fn written(&self) -> &[T] {
        &self.all[Self::EDGE..Self::EDGE + self.length]
    }

    fn is_whole(&self, is_edge: impl Fn(&T) -> bool) -> bool {
        let (before, rest) = self.all.split_at(Self::EDGE);
        before.iter().chain(&rest[self.length..]).all(is_edge)
    }
}

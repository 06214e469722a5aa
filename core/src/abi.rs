//! The border itself: what a plugin library exports and how the host opens it.
//!
//! Authors never see this module; [`plugin!`](crate::plugin) fills it in. Everything that crosses
//! is `repr(C)` with a layout that `abi_stable` compares at load time.

use crate::adapter::FeedbackAdapter;
use crate::batch::{Batch, Outcome, Step};
use crate::extension::Extension;
use crate::fault::Fault;
use crate::guard::{catch, guard, record_places};
use crate::mismatch;
use crate::needs::{Kinds, Needs};
use crate::objective::{Evaluation, Objective};
use crate::params::{ParamDoc, Params};
use crate::record::Record;
use crate::sample::Sample;
use abi_stable::{
    StableAbi,
    library::{
        __call_root_module_loader, AbiHeaderRef, LibraryError, ROOT_MODULE_LOADER_NAME_WITH_NUL,
        RootModule, RootModuleResult,
    },
    package_version_strings,
    prefix_type::PrefixTypeTrait,
    sabi_trait,
    sabi_types::VersionStrings,
    std_types::{RBox, ROption, RResult, RSlice, RSliceMut, RStr, RString, RVec},
};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Raised when today's plugins can no longer be loaded; exported by every plugin as the function
/// [`REVISION_SYMBOL`], so that the host can say so before it compares layouts.
pub const ABI_REVISION: u32 = 1;
/// Name of the exported `extern "C" fn() -> u32`.
pub const REVISION_SYMBOL: &[u8] = b"uft_plugin_abi_revision\0";
/// Name of the exported root of type [`Header`].
pub const ROOT_SYMBOL: &str = ROOT_MODULE_LOADER_NAME_WITH_NUL;
/// What stands behind [`ROOT_SYMBOL`].
pub type Header = AbiHeaderRef;

/// What an entry of a library is.
#[repr(u8)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// An [`Objective`].
    Objective,
    /// A [`FeedbackAdapter`].
    Adapter,
}

/// One objective or adapter of a library, with its documentation.
#[repr(C)]
#[derive(StableAbi, Clone, Debug)]
pub struct Entry {
    /// What it is.
    pub role: Role,
    /// Its `NAME`; unique among the entries of its role.
    pub name: RString,
    /// Its `ABOUT`: one line.
    pub about: RString,
    /// What its constructor reads, in order.
    pub params: RVec<ParamDoc>,
}

/// The root module of a plugin library.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginModule_Ref)))]
#[sabi(missing_field(panic))]
pub struct PluginModule {
    /// Everything that the library exports.
    pub entries: extern "C" fn() -> RVec<Entry>,
    /// An objective by name, from its parameters as a JSON object.
    pub objective: extern "C" fn(RStr<'_>, RStr<'_>) -> RResult<ObjectiveObject, Fault>,
    /// An adapter by name, from its parameters as a JSON object.
    pub adapter: extern "C" fn(RStr<'_>, RStr<'_>) -> RResult<AdapterObject, Fault>,
    /// The door for later revisions (see [`Extension`]).
    #[sabi(last_prefix_field)]
    pub query: extern "C" fn(RStr<'_>, u32) -> ROption<Extension>,
}

impl PluginModule {
    /// The module as a root; for [`plugin!`](crate::plugin).
    pub fn leak(self) -> PluginModule_Ref {
        self.leak_into_prefix()
    }
}

impl RootModule for PluginModule_Ref {
    abi_stable::declare_root_module_statics! {PluginModule_Ref}
    const BASE_NAME: &'static str = "uft_plugin";
    const NAME: &'static str = "uft plugin";
    const VERSION_STRINGS: VersionStrings = package_version_strings!();
}

/// [`Objective`] as it crosses the border.
#[sabi_trait]
pub trait ObjectiveAbi: Send + Sync {
    /// [`Objective::needs`] with what they imply.
    fn needs(&self) -> Needs;
    /// [`Objective::accepts`].
    fn accepts(&self) -> Kinds;
    /// [`Objective::begin_step`].
    fn begin_step(&mut self, step: &Step<'_>) -> RResult<(), Fault>;
    /// [`Objective::evaluate`]; `dlogp` takes the gradient and has the length of `batch.logps`.
    fn evaluate(&self, batch: &Batch<'_>, dlogp: RSliceMut<'_, f32>) -> RResult<Outcome, Fault>;
    /// [`Objective::save_state`].
    fn save_state(&self) -> RResult<RVec<u8>, Fault>;
    /// [`Objective::load_state`].
    #[sabi(last_prefix_field)]
    fn load_state(&mut self, state: RSlice<'_, u8>) -> RResult<(), Fault>;
}

/// An objective made by a plugin.
pub type ObjectiveObject = ObjectiveAbi_TO<'static, RBox<()>>;

/// [`FeedbackAdapter`] as it crosses the border.
#[sabi_trait]
pub trait AdapterAbi: Send + Sync {
    /// [`FeedbackAdapter::offers`].
    fn offers(&self) -> Kinds;
    /// [`FeedbackAdapter::adapt`] on a record given as a JSON object.
    #[sabi(last_prefix_field)]
    fn adapt(&self, record: RStr<'_>) -> RResult<RVec<Sample>, Fault>;
}

/// An adapter made by a plugin.
pub type AdapterObject = AdapterAbi_TO<'static, RBox<()>>;

/// Opens the root module behind a library's [`ROOT_SYMBOL`].
///
/// # Errors
/// What does not fit, in one line: another version of this crate or another layout. The full
/// report of `abi_stable` is the second part.
pub fn open(header: Header) -> Result<PluginModule_Ref, (String, String)> {
    let module = header.upgrade().and_then(|header| header.init_root_module::<PluginModule_Ref>());
    module.map_err(|error| {
        let full = error.to_string();
        let line = match &error {
            LibraryError::IncompatibleVersionNumber {
                expected_version, actual_version, ..
            } => {
                format!(
                    "it was built with uft-core {actual_version}, this host has {expected_version}"
                )
            }
            LibraryError::AbiInstability(_) => {
                format!("its types differ from this host's uft-core ({})", mismatch::summary(&full))
            }
            _ => "its header is not a uft plugin's".to_owned(),
        };
        (line, full)
    })
}

/// What an objective declares is asked once, when it is made, where a panic can be told.
struct ObjectiveShim<T> {
    objective: T,
    needs: Needs,
    accepts: Kinds,
}

impl<T: Objective> ObjectiveAbi for ObjectiveShim<T> {
    fn needs(&self) -> Needs {
        self.needs
    }

    fn accepts(&self) -> Kinds {
        self.accepts
    }

    fn begin_step(&mut self, step: &Step<'_>) -> RResult<(), Fault> {
        guard(T::NAME, || self.objective.begin_step(step))
    }

    fn evaluate(
        &self,
        batch: &Batch<'_>,
        mut dlogp: RSliceMut<'_, f32>,
    ) -> RResult<Outcome, Fault> {
        guard(T::NAME, || {
            let mut out = Evaluation::new(dlogp.as_mut_slice());
            self.objective.evaluate(batch, &mut out)?;
            Ok(out.finish())
        })
    }

    fn save_state(&self) -> RResult<RVec<u8>, Fault> {
        guard(T::NAME, || Ok(self.objective.save_state().into()))
    }

    fn load_state(&mut self, state: RSlice<'_, u8>) -> RResult<(), Fault> {
        guard(T::NAME, || self.objective.load_state(state.as_slice()))
    }
}

struct AdapterShim<T> {
    adapter: T,
    offers: Kinds,
    columns: Vec<(String, String)>,
}

impl<T: FeedbackAdapter> AdapterAbi for AdapterShim<T> {
    fn offers(&self) -> Kinds {
        self.offers
    }

    fn adapt(&self, record: RStr<'_>) -> RResult<RVec<Sample>, Fault> {
        guard(T::NAME, || {
            let record = Record::parse(record.as_str(), &self.columns)?;
            Ok(self.adapter.adapt(&record)?.into())
        })
    }
}

/// Makes an objective from its parameters; for [`plugin!`](crate::plugin) and tests.
pub fn make_objective<T: Objective>(params: &str) -> RResult<ObjectiveObject, Fault> {
    guard(T::NAME, || {
        let mut params = Params::from_json(params)?;
        let objective = T::new(&mut params);
        params.finish()?;
        let (needs, accepts) = (objective.needs().complete(), objective.accepts());
        let shim = ObjectiveShim { objective, needs, accepts };
        Ok(ObjectiveAbi_TO::from_value(shim, sabi_trait::TD_Opaque))
    })
}

/// Makes an adapter from its parameters; for [`plugin!`](crate::plugin) and tests.
pub fn make_adapter<T: FeedbackAdapter>(params: &str) -> RResult<AdapterObject, Fault> {
    guard(T::NAME, || {
        let mut params = Params::from_json(params)?;
        let (adapter, columns) = new_adapter::<T>(&mut params);
        params.finish()?;
        let shim = AdapterShim { offers: adapter.offers(), adapter, columns };
        Ok(AdapterAbi_TO::from_value(shim, sabi_trait::TD_Opaque))
    })
}

fn new_adapter<T: FeedbackAdapter>(params: &mut Params) -> (T, Vec<(String, String)>) {
    let adapter = T::new(params);
    (adapter, params.texts("columns", "field = \"name in the file\", for files with other names"))
}

/// The entry of an objective; for [`plugin!`](crate::plugin).
pub fn describe_objective<T: Objective>() -> Entry {
    let params = documented(|params| drop(T::new(params)));
    Entry { role: Role::Objective, name: T::NAME.into(), about: T::ABOUT.into(), params }
}

/// The entry of an adapter; for [`plugin!`](crate::plugin).
pub fn describe_adapter<T: FeedbackAdapter>() -> Entry {
    let params = documented(|params| drop(new_adapter::<T>(params)));
    Entry { role: Role::Adapter, name: T::NAME.into(), about: T::ABOUT.into(), params }
}

/// What a constructor asks for; a constructor that panics on an empty table documents nothing.
pub(crate) fn documented(construct: impl Fn(&mut Params)) -> RVec<ParamDoc> {
    let mut params = Params::default();
    let constructed = catch(|| construct(&mut params));
    if constructed.is_ok() { params.docs().to_vec().into() } else { RVec::new() }
}

/// What a library's root constructor gives the host; for [`plugin!`](crate::plugin).
pub fn root(module: fn() -> PluginModule_Ref) -> RootModuleResult {
    record_places();
    __call_root_module_loader(module)
}

/// The answer of a library's `query` function. A panic counts as none; there is no way to tell it
/// to the host, so it is printed as panics are.
pub fn answer(query: impl FnOnce() -> Option<Extension>) -> ROption<Extension> {
    catch_unwind(AssertUnwindSafe(query)).ok().flatten().into()
}

/// The fault for a name that a library does not export.
pub fn no_such_entry(name: RStr<'_>) -> Fault {
    Fault::parameter(format!("the library has no entry `{name}`"))
}

//! A plugin of this ABI revision whose types are others: what a plugin looks like that was built
//! against a uft-core in which someone changed a frozen type. Here an entry has a number where
//! [`uft_core::abi::Entry`] has a text.

// The derive macros write `::abi_stable`, which only uft-core depends on.
extern crate self as abi_stable;
pub use uft_core::export::abi_stable::*;

use library::{CheckTypeLayout, LibHeader, RootModule, RootModuleResult};
use prefix_type::PrefixTypeTrait;
use sabi_types::VersionStrings;
use std_types::{ROption, RResult, RStr, RString, RVec};
use uft_core::Fault;
use uft_core::abi::{AdapterObject, ObjectiveObject, Role};
use uft_core::extension::Extension;
use uft_core::params::ParamDoc;

/// An entry as it is not.
#[repr(C)]
#[derive(StableAbi)]
pub struct Entry {
    pub role: Role,
    pub name: RString,
    pub about: u64,
    pub params: RVec<ParamDoc>,
}

/// The root module with such entries.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginModuleRef)))]
#[sabi(missing_field(panic))]
pub struct PluginModule {
    pub entries: extern "C" fn() -> RVec<Entry>,
    pub objective: extern "C" fn(RStr<'_>, RStr<'_>) -> RResult<ObjectiveObject, Fault>,
    pub adapter: extern "C" fn(RStr<'_>, RStr<'_>) -> RResult<AdapterObject, Fault>,
    #[sabi(last_prefix_field)]
    pub query: extern "C" fn(RStr<'_>, u32) -> ROption<Extension>,
}

impl RootModule for PluginModuleRef {
    declare_root_module_statics! {PluginModuleRef}
    const BASE_NAME: &'static str = "uft_plugin";
    const NAME: &'static str = "uft plugin";
    const VERSION_STRINGS: VersionStrings = package_version_strings!();
}

extern "C" fn entries() -> RVec<Entry> {
    RVec::new()
}

extern "C" fn objective(name: RStr<'_>, _: RStr<'_>) -> RResult<ObjectiveObject, Fault> {
    RResult::RErr(uft_core::abi::no_such_entry(name))
}

extern "C" fn adapter(name: RStr<'_>, _: RStr<'_>) -> RResult<AdapterObject, Fault> {
    RResult::RErr(uft_core::abi::no_such_entry(name))
}

extern "C" fn query(_: RStr<'_>, _: u32) -> ROption<Extension> {
    ROption::RNone
}

extern "C" fn module() -> RootModuleResult {
    library::__call_root_module_loader(|| {
        PluginModule { entries, objective, adapter, query }.leak_into_prefix()
    })
}

#[unsafe(no_mangle)]
extern "C" fn uft_plugin_abi_revision() -> u32 {
    uft_core::abi::ABI_REVISION
}

#[unsafe(export_name = "_1as_0lib_1header_0root_bmodule_bloader")]
static HEADER: LibHeader =
    // SAFETY: `module` returns the module whose type stands in the turbofish.
    unsafe { LibHeader::from_constructor::<PluginModuleRef>(module, CheckTypeLayout::Yes) };

//! [`plugin!`](crate::plugin): the whole ABI boilerplate of a plugin library.

#[doc(hidden)]
pub use ::abi_stable;

/// Exports objectives and feedback adapters from a `cdylib` crate.
///
/// ```ignore
/// uft_core::plugin! { objectives: [UnaScore], adapters: [Scores] }
/// ```
///
/// Either list may be left out. `query: function` adds an answer to the generic door: a
/// `fn(name: &str, revision: u32) -> Option<Extension>`.
#[macro_export]
macro_rules! plugin {
    (
        $(objectives: [$($objective:ty),* $(,)?] $(,)?)?
        $(adapters: [$($adapter:ty),* $(,)?] $(,)?)?
        $(query: $query:path $(,)?)?
    ) => {
        #[doc(hidden)]
        mod uft_plugin_export {
            #[allow(unused_imports)]
            use super::*;
            use $crate::abi;
            use $crate::export::abi_stable;
            use abi_stable::prefix_type::PrefixTypeTrait;
            use abi_stable::std_types::{ROption, RResult, RStr, RVec};

            extern "C" fn entries() -> RVec<abi::Entry> {
                let entries = [
                    $($(abi::describe_objective::<$objective>(),)*)?
                    $($(abi::describe_adapter::<$adapter>(),)*)?
                ];
                entries.into_iter().collect()
            }

            extern "C" fn objective(
                name: RStr<'_>,
                params: RStr<'_>,
            ) -> RResult<abi::ObjectiveObject, $crate::Fault> {
                let _ = params;
                match name.as_str() {
                    $($(<$objective as $crate::Objective>::NAME =>
                        abi::make_objective::<$objective>(params.as_str()),)*)?
                    _ => RResult::RErr(abi::no_such_entry(name)),
                }
            }

            extern "C" fn adapter(
                name: RStr<'_>,
                params: RStr<'_>,
            ) -> RResult<abi::AdapterObject, $crate::Fault> {
                let _ = params;
                match name.as_str() {
                    $($(<$adapter as $crate::FeedbackAdapter>::NAME =>
                        abi::make_adapter::<$adapter>(params.as_str()),)*)?
                    _ => RResult::RErr(abi::no_such_entry(name)),
                }
            }

            extern "C" fn query(name: RStr<'_>, revision: u32) -> ROption<$crate::extension::Extension> {
                let answer: Option<$crate::extension::Extension> = None;
                $(let answer = $query(name.as_str(), revision);)?
                let _ = (name, revision);
                answer.into()
            }

            #[unsafe(no_mangle)]
            extern "C" fn uft_plugin_abi_revision() -> u32 {
                abi::ABI_REVISION
            }

            extern "C" fn module() -> abi_stable::library::RootModuleResult {
                abi_stable::library::__call_root_module_loader(|| {
                    abi::PluginModule { entries, objective, adapter, query }.leak_into_prefix()
                })
            }

            // abi_stable's own attribute would make every plugin depend on abi_stable; the name is
            // the one that `abi::ROOT_SYMBOL` holds, which a test compares.
            #[unsafe(export_name = "_1as_0lib_1header_0root_bmodule_bloader")]
            static HEADER: abi_stable::library::LibHeader =
                // SAFETY: `module` returns the module whose type stands in the turbofish.
                unsafe {
                    abi_stable::library::LibHeader::from_constructor::<abi::PluginModule_Ref>(
                        module,
                        abi_stable::library::CheckTypeLayout::Yes,
                    )
                };
        }
    };
}

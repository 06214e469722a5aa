//! [`plugin!`](crate::plugin): the whole ABI boilerplate of a plugin library.

#[doc(hidden)]
pub use ::abi_stable;
#[doc(hidden)]
pub use abi_stable::std_types::{ROption, RResult, RStr, RVec};

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
        // The author's names are in scope here, so this module defines none that could be one of
        // them, and says in full what it uses.
        #[doc(hidden)]
        mod uft_plugin_export {
            #[allow(unused_imports)]
            use super::*;

            extern "C" fn uft_plugin_entries() -> $crate::export::RVec<$crate::abi::Entry> {
                let entries = [
                    $($($crate::abi::describe_objective::<$objective>(),)*)?
                    $($($crate::abi::describe_adapter::<$adapter>(),)*)?
                ];
                entries.into_iter().collect()
            }

            extern "C" fn uft_plugin_objective(
                name: $crate::export::RStr<'_>,
                params: $crate::export::RStr<'_>,
            ) -> $crate::export::RResult<$crate::abi::ObjectiveObject, $crate::fault::Fault> {
                let _ = params;
                match name.as_str() {
                    $($(<$objective as $crate::objective::Objective>::NAME =>
                        $crate::abi::make_objective::<$objective>(params.as_str()),)*)?
                    _ => $crate::export::RResult::RErr($crate::abi::no_such_entry(name)),
                }
            }

            extern "C" fn uft_plugin_adapter(
                name: $crate::export::RStr<'_>,
                params: $crate::export::RStr<'_>,
            ) -> $crate::export::RResult<$crate::abi::AdapterObject, $crate::fault::Fault> {
                let _ = params;
                match name.as_str() {
                    $($(<$adapter as $crate::adapter::FeedbackAdapter>::NAME =>
                        $crate::abi::make_adapter::<$adapter>(params.as_str()),)*)?
                    _ => $crate::export::RResult::RErr($crate::abi::no_such_entry(name)),
                }
            }

            extern "C" fn uft_plugin_query(
                name: $crate::export::RStr<'_>,
                revision: u32,
            ) -> $crate::export::ROption<$crate::extension::Extension> {
                let _ = (name, revision);
                $crate::abi::answer(|| {
                    let answer: Option<$crate::extension::Extension> = None;
                    $(let answer = $query(name.as_str(), revision);)?
                    answer
                })
            }

            #[unsafe(no_mangle)]
            extern "C" fn uft_plugin_abi_revision() -> u32 {
                $crate::abi::ABI_REVISION
            }

            extern "C" fn uft_plugin_module() -> $crate::export::abi_stable::library::RootModuleResult {
                $crate::abi::root(|| {
                    $crate::abi::PluginModule {
                        entries: uft_plugin_entries,
                        objective: uft_plugin_objective,
                        adapter: uft_plugin_adapter,
                        query: uft_plugin_query,
                    }
                    .leak()
                })
            }

            // abi_stable's own attribute would make every plugin depend on abi_stable; the name is
            // the one that `abi::ROOT_SYMBOL` holds, otherwise no host would find it.
            #[unsafe(export_name = "_1as_0lib_1header_0root_bmodule_bloader")]
            static UFT_PLUGIN_HEADER: $crate::export::abi_stable::library::LibHeader =
                // SAFETY: `uft_plugin_module` returns the module whose type stands in the turbofish.
                unsafe {
                    $crate::export::abi_stable::library::LibHeader::from_constructor::<
                        $crate::abi::PluginModule_Ref,
                    >(
                        uft_plugin_module,
                        $crate::export::abi_stable::library::CheckTypeLayout::Yes,
                    )
                };
        }
    };
}

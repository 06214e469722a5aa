//! What remains the same between ABI revisions: the function that says which one it is.

/// A revision that no host speaks.
#[unsafe(no_mangle)]
pub extern "C" fn uft_plugin_abi_revision() -> u32 {
    99
}

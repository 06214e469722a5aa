//! The border in plain C: objectives from any language that can export a C function.
//!
//! A library without a line of Rust exports one symbol, [`SYMBOL`], which gives a table of its
//! objectives. The types are in [`declarations`]; `core/include/uft_plugin.h` is generated from
//! them, and has some functions of [`HELPERS`] at its end. [`Library`] is the host's side: it reads
//! the table and makes [`ObjectiveObject`](crate::abi::ObjectiveObject)s, so that nobody above it
//! knows what an objective is written in.
//!
//! Nothing that comes from C is believed. Tables are copied when the library is opened; results
//! are written into memory of the host's, whose edges are looked at afterwards.
//!
//! Feedback adapters are not written in C: one reads JSON and gives nested texts, which in C is a
//! JSON library and a tree of allocations across the border, for what columns of the bundled
//! adapters mostly do.

pub mod declarations;
mod library;
mod objective;
mod param;
mod read;
#[cfg(test)]
mod tests;

pub use library::Library;

/// The exported symbol, of type [`Entry`].
pub const SYMBOL: &[u8] = b"uft_c_plugin\0";
/// What stands behind [`SYMBOL`].
pub type Entry = unsafe extern "C" fn() -> *const declarations::UftPlugin;
/// The header for authors.
pub const HEADER: &str = include_str!("../include/uft_plugin.h");
/// The end of the header: what every objective in C would write again.
pub const HELPERS: &str = include_str!("c/helpers.h");

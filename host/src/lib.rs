//! The `uft` host: everything around the arithmetic. See docs/architecture.md for the map.

pub mod allocator;
pub mod cli;
pub mod config;
pub mod data;
pub mod error;
pub mod group;
mod machine;
pub mod model;
pub mod plugins;
pub mod signals;
pub mod text;
pub mod train;

pub use error::{Error, ErrorKind, Result};

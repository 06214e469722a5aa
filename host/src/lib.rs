//! The `uft` host: everything around the arithmetic. See docs/architecture.md for the map.

pub mod config;
pub mod error;
pub mod group;
pub mod model;
pub mod text;

pub use error::{Error, ErrorKind, Result};

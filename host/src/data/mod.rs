//! From files to sources of token groups, every row accounted for.

pub mod account;
pub mod order;
pub mod rows;
pub mod source;

pub use account::Account;
pub use order::{Item, Order};
pub use source::{Example, Source};

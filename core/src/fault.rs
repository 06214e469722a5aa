//! What a plugin says when it cannot go on.

use abi_stable::{StableAbi, std_types::RString};
use std::fmt;

/// Where a plugin failed; the host chooses its words and its exit code by it.
#[repr(u8)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// A parameter of the configuration is unknown, missing or out of range.
    Parameter,
    /// A data record cannot be understood.
    Record,
    /// Loss and gradient cannot be computed.
    Evaluation,
    /// The plugin panicked; the panic was caught at the border.
    Panic,
}

/// An error that crosses the plugin border: its kind and one line for the user.
#[repr(C)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where it happened.
    pub kind: FaultKind,
    /// What is wrong, in one line.
    pub message: RString,
}

impl Fault {
    /// A fault of any kind.
    pub fn new(kind: FaultKind, message: impl Into<String>) -> Self {
        Self { kind, message: RString::from(message.into()) }
    }

    /// A record that cannot be understood; the host adds file and line.
    pub fn record(message: impl Into<String>) -> Self {
        Self::new(FaultKind::Record, message)
    }

    /// A parameter that is wrong; the host adds the plugin and the config key.
    pub fn parameter(message: impl Into<String>) -> Self {
        Self::new(FaultKind::Parameter, message)
    }

    /// A batch on which loss or gradient cannot be computed.
    pub fn evaluation(message: impl Into<String>) -> Self {
        Self::new(FaultKind::Evaluation, message)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

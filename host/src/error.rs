//! Errors of the host: a kind, which decides the exit code, and one line for the user that says
//! what is wrong, where, and what to do.

use std::fmt;

/// What went wrong, as far as a script needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Anything that no other kind names, files that cannot be written among them.
    Other,
    /// The configuration or the command line.
    Config,
    /// Data files, chat template or tokenizer.
    Data,
    /// A plugin.
    Plugin,
    /// A model or adapter directory.
    Model,
    /// A loss, gradient or log-prob that is not a finite number.
    NonFinite,
    /// Memory or threads that are not to be had, or a run that needs more than the machine has.
    OutOfMemory,
    /// Interrupted by SIGINT.
    Interrupted,
    /// Ended by SIGTERM.
    Terminated,
}

impl ErrorKind {
    /// The exit codes with their meaning, as documented in docs/command-line.md.
    pub const ALL: [(ErrorKind, i32, &'static str); 9] = [
        (ErrorKind::Other, 1, "something else failed, such as writing a file"),
        (ErrorKind::Config, 2, "the configuration or the command line is wrong"),
        (ErrorKind::Data, 3, "a data file, the tokenizer or the chat template is wrong"),
        (ErrorKind::Plugin, 4, "a plugin cannot be loaded, or failed"),
        (ErrorKind::Model, 5, "a model or adapter directory cannot be used"),
        (ErrorKind::NonFinite, 6, "a loss, gradient or log-prob is not finite"),
        (
            ErrorKind::OutOfMemory,
            7,
            "out of memory, or the run does not fit into the machine's memory",
        ),
        (ErrorKind::Interrupted, 130, "interrupted (SIGINT); while training, with a checkpoint"),
        (ErrorKind::Terminated, 143, "ended (SIGTERM); while training, with a checkpoint"),
    ];

    pub fn exit_code(self) -> i32 {
        Self::ALL.iter().find(|(kind, ..)| *kind == self).map_or(1, |(_, code, _)| *code)
    }
}

/// An error of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    pub kind: ErrorKind,
    pub message: String,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    pub fn other(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Other, message)
    }

    pub fn config(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Config, message)
    }

    pub fn data(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Data, message)
    }

    pub fn plugin(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Plugin, message)
    }

    pub fn model(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Model, message)
    }

    pub fn non_finite(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NonFinite, message)
    }

    /// Puts the place before the message: a file, a config key, a plugin.
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

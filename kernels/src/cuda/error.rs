use std::fmt;

/// What a device says no with: one line for the user, with the remedy where there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// Something that has to be installed is not: a driver, a GPU, NVRTC, a C++ compiler.
    Missing(String),
    /// The device, or the arena, has no such memory left.
    OutOfMemory(String),
    /// A kernel that does not compile, a launch that is refused or fails, a file that cannot be written.
    Failed(String),
}

pub type Result<T> = std::result::Result<T, Error>;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Missing(message) | Self::OutOfMemory(message) | Self::Failed(message)) = self;
        f.write_str(message)
    }
}

impl std::error::Error for Error {}

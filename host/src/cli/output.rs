//! Stdout is for results alone. A plugin runs in this process and may print, from any thread and when the
//! process ends; what it writes goes to stderr, so that results stay readable for machines.

use crate::{Error, Result};
use std::fs::File;
use std::io::{ErrorKind, Write, stderr, stdout};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Mutex, OnceLock, PoisonError};

/// What stdout was before [`keep_stdout`].
static RESULTS: OnceLock<Mutex<File>> = OnceLock::new();

/// From here on [`print`] alone writes to what stdout is now; whatever else is written to stdout, by any
/// code of the process, goes to stderr.
///
/// # Errors
/// If the descriptors cannot be changed.
pub fn keep_stdout() -> Result<()> {
    let fail = |e: std::io::Error| Error::other(format!("stdout cannot be kept for results: {e}"));
    let results = stdout().as_fd().try_clone_to_owned().map_err(fail)?;
    // SAFETY: both are open, and the standard library names them by number.
    if unsafe { libc::dup2(stderr().as_raw_fd(), stdout().as_raw_fd()) } < 0 {
        return Err(fail(std::io::Error::last_os_error()));
    }
    RESULTS.get_or_init(|| Mutex::new(File::from(results)));
    Ok(())
}

/// Prints a result to stdout; a reader that went away (`uft score … | head`) ends the command quietly.
///
/// # Errors
/// If it cannot be written.
pub fn print(text: &str) -> Result<()> {
    let written = match RESULTS.get() {
        Some(results) => {
            let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
            write(anstream::AutoStream::auto(&mut *results), text)
        }
        None => write(anstream::stdout(), text),
    };
    match written {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(e) => Err(Error::other(format!("stdout: {e}"))),
        Ok(()) => Ok(()),
    }
}

fn write(mut out: impl Write, text: &str) -> std::io::Result<()> {
    out.write_all(text.as_bytes())?;
    out.flush()
}

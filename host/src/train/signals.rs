//! SIGINT and SIGTERM: the first asks the run to save and end, the second ends the process at once.

use crate::{Error, ErrorKind, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

const SIGNALS: [(i32, ErrorKind, &str); 2] =
    [(SIGINT, ErrorKind::Interrupted, "SIGINT"), (SIGTERM, ErrorKind::Terminated, "SIGTERM")];

/// One flag per signal, in the order of [`SIGNALS`].
static RAISED: OnceLock<[Arc<AtomicBool>; 2]> = OnceLock::new();

/// From here on a first signal only raises a flag. Before, and without this call, signals end the
/// process as they always do: there is nothing to save.
///
/// # Errors
/// If the handlers cannot be installed.
pub fn install() -> Result<()> {
    if RAISED.get().is_some() {
        return Ok(());
    }
    let flags = [Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false))];
    for ((signal, kind, name), raised) in SIGNALS.iter().zip(&flags) {
        // In this order: the shutdowns see the flags as the signal before left them, whichever of
        // the two it was.
        flags
            .iter()
            .try_for_each(|earlier| {
                flag::register_conditional_shutdown(*signal, kind.exit_code(), earlier.clone())
                    .map(drop)
            })
            .and_then(|()| flag::register(*signal, raised.clone()))
            .map_err(|e| Error::other(format!("{name} cannot be handled: {e}")))?;
    }
    let _ = RAISED.set(flags);
    Ok(())
}

/// Asked between pieces of work of at most a few seconds.
///
/// # Errors
/// If a signal arrived since [`install`].
pub fn check() -> Result<()> {
    let Some(flags) = RAISED.get() else { return Ok(()) };
    for ((_, kind, name), raised) in SIGNALS.iter().zip(flags) {
        if raised.load(Ordering::Relaxed) {
            return Err(Error::new(*kind, *name));
        }
    }
    Ok(())
}

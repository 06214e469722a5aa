//! SIGINT and SIGTERM: while training the first asks the run to save and end, the second ends the
//! process at once; before there is anything to save, the first already does.
//!
//! Whoever works for long asks [`check`] and passes its error on. The decoder does so between
//! layers, so no result of a model is ever that of an interrupted computation.

use crate::{Error, ErrorKind, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

const SIGNALS: [(i32, ErrorKind, &str); 2] =
    [(SIGINT, ErrorKind::Interrupted, "SIGINT"), (SIGTERM, ErrorKind::Terminated, "SIGTERM")];

/// Whether the next signal ends the process at once.
static AT_ONCE: AtomicBool = AtomicBool::new(true);
/// The signal that asked for an end; 0 is none.
static RAISED: AtomicI32 = AtomicI32::new(0);

/// From here on SIGINT and SIGTERM end the process at once with their documented exit codes.
/// Without this call they end it as they always do, which shells see as a death by signal.
///
/// # Errors
/// If the handlers cannot be installed.
pub fn install() -> Result<()> {
    for (signal, kind, name) in SIGNALS {
        let code = kind.exit_code();
        let handler = move || {
            if AT_ONCE.swap(true, Ordering::SeqCst) {
                low_level::exit(code);
            }
            RAISED.store(signal, Ordering::SeqCst);
        };
        // SAFETY: the handler does nothing but atomic accesses and `_exit`, both of which are
        // allowed in a signal handler.
        unsafe { low_level::register(signal, handler) }
            .map_err(|e| Error::other(format!("{name} cannot be handled: {e}")))?;
    }
    Ok(())
}

/// From here on a first signal only makes [`check`] fail: there is something to save.
pub fn save_first() {
    AT_ONCE.store(false, Ordering::SeqCst);
}

/// Asked between pieces of work of at most a few seconds.
///
/// # Errors
/// If a signal arrived since [`save_first`].
pub fn check() -> Result<()> {
    let raised = RAISED.load(Ordering::Relaxed);
    match SIGNALS.iter().find(|(signal, ..)| *signal == raised) {
        None => Ok(()),
        Some((_, kind, name)) => Err(Error::new(*kind, *name)),
    }
}

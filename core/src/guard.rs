//! Panics of code that is not ours, plugins above all: caught at the border, because unwinding must
//! not cross it, and told in one line with the place where they happened.

use crate::fault::{Fault, FaultKind};
use abi_stable::std_types::RResult;
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::sync::Once;

thread_local! {
    /// Whether this thread is inside of [`catch`].
    static CATCHING: Cell<bool> = const { Cell::new(false) };
    /// Where the last panic inside of [`catch`] happened, as ` at file:line`.
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs plugin code; a panic becomes a fault.
pub fn guard<T>(name: &str, f: impl FnOnce() -> Result<T, Fault>) -> RResult<T, Fault> {
    match catch(f) {
        Ok(result) => result.into(),
        Err(panicked) => {
            RResult::RErr(Fault::new(FaultKind::Panic, format!("`{name}` {panicked}")))
        }
    }
}

/// Runs code that may panic.
///
/// # Errors
/// `panicked at file:line: message`; without the place if [`record_places`] was not called.
pub fn catch<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    let outer = CATCHING.replace(true);
    PLACE.with_borrow_mut(String::clear);
    let result = panic::catch_unwind(AssertUnwindSafe(f));
    CATCHING.set(outer);
    result.map_err(|payload| {
        format!("panicked{}: {}", PLACE.with_borrow(String::clone), message(&*payload))
    })
}

/// Makes panics that [`catch`] catches note their place instead of printing it. A plugin library has
/// a standard library of its own, so this changes nothing outside of it; [`plugin!`](crate::plugin)
/// calls it when a host opens the library, and a host for what it catches itself. With `RUST_BACKTRACE` set they are printed too.
pub fn record_places() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            note_place(info);
            let backtrace = std::env::var_os("RUST_BACKTRACE").is_some_and(|v| v != "0");
            if backtrace || !CATCHING.get() {
                print(info);
            }
        }));
    });
}

fn note_place(info: &PanicHookInfo<'_>) {
    if let Some(place) = info.location() {
        PLACE.with_borrow_mut(|p| *p = format!(" at {}:{}", place.file(), place.line()));
    }
}

fn message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_fault_that_names_the_plugin() {
        let fault = guard("mine", || -> Result<(), Fault> { panic!("row {}", 3) });
        let fault = fault.into_result().unwrap_err();
        assert_eq!(fault.kind, FaultKind::Panic);
        assert!(fault.message.starts_with("`mine` panicked"), "{fault}");
        assert!(fault.message.ends_with(": row 3"), "{fault}");
        let payload = catch(|| panic::panic_any(7)).unwrap_err();
        assert!(payload.ends_with(": no message"), "{payload}");
        assert_eq!(guard("mine", || Ok(7)).into_result(), Ok(7));
    }
}

//! What a plugin may change of the thread that calls it and the host puts back, and that it may end the
//! process.
//!
//! The rounding mode and the handling of denormals belong to the thread, not to the code that runs on
//! it: a library that is linked with `-ffast-math` flushes denormals to zero from the moment it is
//! loaded, for everyone. So every call into a plugin, its loading included, is made through [`kept`].

use super::BUG;
use crate::ErrorKind;
use signal_hook::low_level;
use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::Once;

thread_local! {
    /// Which plugin this thread is in a call of.
    static INSIDE: Cell<Option<NonNull<str>>> = const { Cell::new(None) };
}

/// Calls a plugin, which is told by `name` if it does not come back, and puts the floating-point
/// environment back as it was.
// Not inlined, so that none of the caller's arithmetic is moved in here.
#[inline(never)]
pub fn kept<T>(name: &str, call: impl FnOnce() -> T) -> T {
    static WATCHED: Once = Once::new();
    WATCHED.call_once(|| {
        // SAFETY: the handler is a function of this program, which stays. Where there is no room for
        // it, such an end goes unnoticed, and nothing else changes.
        let _ = unsafe { libc::atexit(ended) };
    });
    let _state = State { outer: INSIDE.replace(Some(name.into())), floats: Floats::now() };
    call()
}

/// What is put back after a call.
struct State {
    outer: Option<NonNull<str>>,
    floats: Floats,
}

impl Drop for State {
    fn drop(&mut self) {
        self.floats.restore();
        INSIDE.set(self.outer);
    }
}

/// Runs when the process ends by `exit`. A plugin that calls it would make half a run look like a whole
/// one, with the exit code of its choice.
extern "C" fn ended() {
    if let Some(name) = INSIDE.get() {
        // SAFETY: the call that has the name has not returned.
        let name = unsafe { name.as_ref() };
        eprintln!("error: plugin `{name}` ended the process; {BUG}");
        low_level::exit(ErrorKind::Plugin.exit_code());
    }
}

/// The control registers of floating-point arithmetic.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Floats(imp::Registers);

impl Floats {
    fn now() -> Self {
        Self(imp::read())
    }

    fn restore(self) {
        imp::write(self.0);
    }
}

#[cfg(target_arch = "x86_64")]
mod imp {
    use std::arch::asm;

    /// MXCSR of SSE and AVX, and the control word of x87, which `long double` uses.
    pub type Registers = (u32, u16);

    pub fn read() -> Registers {
        let (mut mxcsr, mut x87) = (0u32, 0u16);
        // SAFETY: each stores a register into the variable whose address it gets.
        unsafe {
            asm!("stmxcsr [{}]", in(reg) &mut mxcsr, options(nostack));
            asm!("fnstcw [{}]", in(reg) &mut x87, options(nostack));
        }
        (mxcsr, x87)
    }

    pub fn write((mxcsr, x87): Registers) {
        // SAFETY: the values were read from the same registers. `fnclex` first: an exception that
        // is pending would be raised by the next instruction of x87.
        unsafe {
            asm!("ldmxcsr [{}]", in(reg) &mxcsr, options(nostack, readonly));
            asm!("fnclex", "fldcw [{}]", in(reg) &x87, options(nostack));
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod imp {
    use std::arch::asm;

    /// FPCR.
    pub type Registers = u64;

    pub fn read() -> Registers {
        let fpcr: u64;
        // SAFETY: reads a register.
        unsafe { asm!("mrs {}, fpcr", out(reg) fpcr, options(nomem, nostack)) };
        fpcr
    }

    pub fn write(fpcr: Registers) {
        // SAFETY: the value was read from the same register.
        unsafe { asm!("msr fpcr, {}", in(reg) fpcr, options(nomem, nostack)) };
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!(
    "the registers of floating-point arithmetic of this processor are not written down here"
);

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use std::hint::black_box;

    #[test]
    fn rounding_and_denormals_are_as_they_were() {
        let before = Floats::now();
        let third = || black_box(1.0f32) / black_box(3.0f32);
        let tiny = || black_box(f32::MIN_POSITIVE) / black_box(4.0f32);
        let (usual_third, usual_tiny) = (third(), tiny());
        assert!(usual_tiny > 0.0);
        let (other_third, other_tiny) = kept("mine", || {
            let (mxcsr, x87) = before.0;
            // Downwards, and denormals to zero.
            imp::write((mxcsr | 0x2000 | 0x8040, x87 | 0x0400));
            (third(), tiny())
        });
        assert_ne!(other_third.to_bits(), usual_third.to_bits());
        assert_eq!(other_tiny, 0.0);
        assert_eq!((third(), tiny()), (usual_third, usual_tiny));
        assert_eq!(imp::read().1, before.0.1);
    }
}

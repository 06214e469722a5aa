//! What a plugin may change of the thread that calls it, and the host puts back.
//!
//! The rounding mode and the handling of denormals belong to the thread, not to the code that runs on
//! it: a library that is linked with `-ffast-math` flushes denormals to zero from the moment it is
//! loaded, for everyone. So every call into a plugin, its loading included, is made through [`kept`].

/// Calls a plugin and puts the floating-point environment back as it was.
// Not inlined, so that none of the caller's arithmetic is moved in here.
#[inline(never)]
pub fn kept<T>(call: impl FnOnce() -> T) -> T {
    let before = Floats::now();
    let result = call();
    before.restore();
    result
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
        let (other_third, other_tiny) = kept(|| {
            let (mxcsr, x87) = before.0;
            // Upwards, and denormals to zero.
            imp::write((mxcsr | 0x4000 | 0x8040, x87 | 0x0800));
            (third(), tiny())
        });
        assert_ne!(other_third.to_bits(), usual_third.to_bits());
        assert_eq!(other_tiny, 0.0);
        assert_eq!((third(), tiny()), (usual_third, usual_tiny));
        assert_eq!(imp::read().1, before.0.1);
    }
}

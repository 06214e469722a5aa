//! Memory of the emulated device: every allocation lies between two stretches that cannot be accessed, as
//! close to the second as 16-byte alignment allows, and is NaN until it is written.

use super::{Error, Result};

const PAGE: usize = 4096;
/// Addresses only. An index that is wrong by a few rows still ends there and not in another buffer.
const GUARD: usize = 1 << 20;
/// What kernels may rely on; the driver gives more, but slices of a buffer do not have it.
const ALIGNMENT: usize = 16;
const POISON: u8 = 0xff;

/// One allocation.
pub(super) struct Guarded {
    /// The first guard.
    mapping: *mut u8,
    mapped: usize,
    start: *mut u8,
    len: usize,
}

// SAFETY: plain memory; who reads and writes it when is the business of those who launch.
unsafe impl Send for Guarded {}

impl Guarded {
    pub fn new(len: usize) -> Result<Self> {
        let padded = len.div_ceil(ALIGNMENT) * ALIGNMENT;
        let open = padded.div_ceil(PAGE).max(1) * PAGE;
        let mapped = open + 2 * GUARD;
        let out_of_memory = || {
            let error = std::io::Error::last_os_error();
            Error::OutOfMemory(format!("the emulated device has no {len} bytes left: {error}"))
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, of which the middle is opened.
        let mapping =
            unsafe { libc::mmap(std::ptr::null_mut(), mapped, libc::PROT_NONE, flags, -1, 0) };
        if mapping == libc::MAP_FAILED {
            return Err(out_of_memory());
        }
        let mapping: *mut u8 = mapping.cast();
        // SAFETY: all within the mapping.
        unsafe {
            let middle = mapping.add(GUARD);
            if libc::mprotect(middle.cast(), open, libc::PROT_READ | libc::PROT_WRITE) != 0 {
                let error = out_of_memory();
                libc::munmap(mapping.cast(), mapped);
                return Err(error);
            }
            middle.write_bytes(POISON, open);
            Ok(Self { mapping, mapped, start: middle.add(open - padded), len })
        }
    }

    pub fn address(&self) -> u64 {
        self.start.expose_provenance() as u64
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// How many bytes before or after the memory, in the pages that it shares with nobody, something was
    /// written, if it was.
    pub fn overrun(&self) -> Option<String> {
        let (before, after) = self.around();
        if let Some(at) = before.iter().position(|&byte| byte != POISON) {
            return Some(format!("{} bytes before its beginning", before.len() - at));
        }
        let at = after.iter().position(|&byte| byte != POISON)?;
        Some(format!("{at} bytes past its end"))
    }

    /// What is open but belongs to nobody.
    fn around(&self) -> (&[u8], &[u8]) {
        let end = self.mapping.addr() + self.mapped - GUARD;
        // SAFETY: from the open pages' beginning to the memory, and from its end to theirs.
        unsafe {
            let middle = self.mapping.add(GUARD);
            let before = self.start.addr() - middle.addr();
            let after = self.start.add(self.len);
            (
                std::slice::from_raw_parts(middle, before),
                std::slice::from_raw_parts(after, end - after.addr()),
            )
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made.
        unsafe { libc::munmap(self.mapping.cast(), self.mapped) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_not_a_number_until_written_and_what_is_around_it_is_watched() {
        for len in [0usize, 1, 16, 17, 4096, 5000] {
            let memory = Guarded::new(len).unwrap();
            // SAFETY: its own bytes, and the open ones around it.
            unsafe {
                assert!((0..len).all(|i| *memory.start.add(i) == POISON));
                assert_eq!(memory.start.addr() % ALIGNMENT, 0);
                memory.start.write_bytes(1, len);
                assert_eq!(memory.overrun(), None);
                if !len.is_multiple_of(ALIGNMENT) {
                    memory.start.add(len).write(0);
                    assert_eq!(memory.overrun().unwrap(), "0 bytes past its end");
                }
                if len == 17 {
                    memory.start.sub(3).write(0);
                    assert_eq!(memory.overrun().unwrap(), "3 bytes before its beginning");
                }
            }
        }
    }
}

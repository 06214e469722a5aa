//! Out of memory ends in a line and an exit code of its own instead of an abort.
//!
//! A binary that wants it names [`OrExit`] as its `#[global_allocator]`. Plugins bring their own
//! allocator, and where the kernel promises more than it has, it kills a program without a word
//! before any allocation fails: then there are only the checkpoints.

use crate::ErrorKind;
use signal_hook::low_level;
use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::io::Write;
use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The system's allocator; where that has no memory left, the process ends.
pub struct OrExit;

// SAFETY: everything is the system allocator's, whose contract is the same; what it gives is passed
// on unless it is null.
unsafe impl GlobalAlloc for OrExit {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are passed on, here and below.
        or_exit(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        or_exit(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        or_exit(unsafe { System.realloc(pointer, layout, size) }, size)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

fn or_exit(pointer: *mut u8, bytes: usize) -> *mut u8 {
    if pointer.is_null() { out_of_memory(bytes) } else { pointer }
}

/// Says that so many bytes are not to be had, and ends the process without asking for memory again.
#[cold]
pub fn out_of_memory(bytes: usize) -> ! {
    static SAID: AtomicBool = AtomicBool::new(false);
    while SAID.swap(true, Ordering::SeqCst) {
        // Another thread is at it.
        std::thread::sleep(Duration::from_secs(1));
    }
    let mut line = [0; 256];
    let mut rest = line.as_mut_slice();
    let _ = writeln!(
        rest,
        "error: out of memory: {bytes} bytes more are not to be had; lower micro_tokens or max_length \
         of [train], or use a machine with more; a run's checkpoints are whole, train --resume goes on from them"
    );
    let unused = rest.len();
    // Not std::io::stderr, whose lock another thread, or this one, may hold.
    // SAFETY: descriptor 2 is stderr, and it is not closed here.
    let mut stderr = ManuallyDrop::new(unsafe { File::from_raw_fd(2) });
    let _ = stderr.write_all(&line[..line.len() - unused]);
    // Without destructors, which might ask for memory.
    low_level::exit(ErrorKind::OutOfMemory.exit_code());
}

//! For `LD_PRELOAD`: counts the calls that write below a folder, and makes one of them fail.
//!
//! - `FAIL_BELOW`: the folder; unset, everything goes through.
//! - `FAIL_AT`: the number of the call that fails, from 1. `FAIL_ERRNO`: the error it gives.
//! - `FAIL_HOW`: `once`; `onwards`, every later call too, as on a disk that stays full; `short`, a
//!   write that takes half of its bytes before the next one fails.
//! - `FAIL_LOG`: a file that gets a line for every call: its number, name and path.
//!
//! What std on Linux calls is here: opening for writing, writing, syncing, renaming, making and
//! removing. Nothing allocates, because an allocator may be what calls.

#![cfg(target_os = "linux")]

use libc::{c_char, c_int, c_void, iovec, mode_t, off64_t, size_t, ssize_t};
use std::ffi::CStr;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

static CALLS: AtomicU64 = AtomicU64::new(0);

/// What becomes of a call.
enum Verdict {
    Passes,
    Fails,
    /// A write takes half of its bytes.
    Halves,
}

/// What a call touches.
enum Place {
    Path(*const c_char),
    Open(c_int),
    /// A name below an open folder.
    In(c_int, *const c_char),
}

/// A text of limited length on the stack.
struct Text {
    bytes: [u8; 4096],
    len: usize,
}

impl Text {
    fn new() -> Self {
        Self { bytes: [0; 4096], len: 0 }
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn push(&mut self, bytes: &[u8]) {
        let count = bytes.len().min(self.bytes.len() - 1 - self.len);
        self.bytes[self.len..self.len + count].copy_from_slice(&bytes[..count]);
        self.len += count;
    }

    /// Takes the path of an open file as the kernel knows it.
    fn push_open(&mut self, fd: c_int) {
        let mut link = Text::new();
        let _ = write!(link, "/proc/self/fd/{fd}");
        let rest = &mut self.bytes[self.len..];
        // SAFETY: `link` ends with a zero, and `rest` has the length that is given.
        let count = unsafe {
            libc::readlink(link.bytes.as_ptr().cast(), rest.as_mut_ptr().cast(), rest.len())
        };
        self.len += usize::try_from(count).unwrap_or(0);
    }
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.push(text.as_bytes());
        Ok(())
    }
}

fn setting(name: &CStr) -> Option<&'static [u8]> {
    // SAFETY: `name` ends with a zero, and nobody changes the environment of the process under test.
    let value = unsafe { libc::getenv(name.as_ptr()) };
    // SAFETY: a variable's value ends with a zero.
    (!value.is_null()).then(|| unsafe { CStr::from_ptr(value) }.to_bytes())
}

fn number(name: &CStr) -> Option<u64> {
    std::str::from_utf8(setting(name)?).ok()?.parse().ok()
}

/// Counts a call, and decides on it.
fn verdict(name: &str, place: &Place) -> Verdict {
    let Some(below) = setting(c"FAIL_BELOW") else { return Verdict::Passes };
    let mut path = Text::new();
    // SAFETY: what the caller passes as a path ends with a zero.
    let bytes = |path: &*const c_char| unsafe { CStr::from_ptr(*path) }.to_bytes();
    match place {
        Place::Path(name) => path.push(bytes(name)),
        Place::Open(fd) => path.push_open(*fd),
        Place::In(_, name) if bytes(name).starts_with(b"/") => path.push(bytes(name)),
        Place::In(fd, name) => {
            path.push_open(*fd);
            path.push(b"/");
            path.push(bytes(name));
        }
    }
    if !path.as_bytes().starts_with(below) {
        return Verdict::Passes;
    }
    let call = CALLS.fetch_add(1, Ordering::SeqCst) + 1;
    if let Some(file) = setting(c"FAIL_LOG") {
        log(file, call, name, path.as_bytes());
    }
    let Some(at) = number(c"FAIL_AT") else { return Verdict::Passes };
    match setting(c"FAIL_HOW") {
        Some(b"onwards") if call >= at => Verdict::Fails,
        Some(b"short") if call == at && name == "write" => Verdict::Halves,
        Some(b"short") if call == at + 1 => Verdict::Fails,
        Some(b"once") if call == at => Verdict::Fails,
        _ => Verdict::Passes,
    }
}

fn log(file: &[u8], call: u64, name: &str, path: &[u8]) {
    let mut line = Text::new();
    let _ = write!(line, "{call} {name} ");
    line.push(path);
    line.push(b"\n");
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND;
    // SAFETY: the log's name comes from the environment and ends with a zero, the buffer is valid.
    unsafe {
        let fd = next_open64(file.as_ptr().cast(), flags, 0o644);
        next_write(fd, line.bytes.as_ptr().cast(), line.len);
        libc::close(fd);
    }
}

fn fail() -> c_int {
    let errno = number(c"FAIL_ERRNO").map_or(libc::EIO, |errno| errno as c_int);
    // SAFETY: it is this thread's own.
    unsafe { *libc::__errno_location() = errno };
    -1
}

/// Functions of libc that are counted, each with what it touches; a condition says whether it
/// writes. Variable arguments are fixed ones, which on Linux are passed alike.
macro_rules! counted {
    ($($name:ident as $next:ident($($arg:ident: $type:ty),*) -> $ret:ty, $place:expr, $writes:expr;)*) => {$(
        /// The function that this library stands before.
        unsafe fn $next($($arg: $type),*) -> $ret {
            let name = concat!(stringify!($name), "\0");
            // SAFETY: libc has a function of this name and type.
            unsafe {
                let found = libc::dlsym(libc::RTLD_NEXT, name.as_ptr().cast());
                let found: unsafe extern "C" fn($($type),*) -> $ret = std::mem::transmute(found);
                found($($arg),*)
            }
        }

        /// # Safety
        /// As libc's function of this name.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> $ret {
            if $writes && matches!(verdict(stringify!($name), &$place), Verdict::Fails) {
                return fail() as $ret;
            }
            // SAFETY: passed on as it came.
            unsafe { $next($($arg),*) }
        }
    )*};
}

fn writes(flags: c_int) -> bool {
    flags & (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT) != 0
}

counted! {
    open as next_open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int, Place::Path(path), writes(flags);
    open64 as next_open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int, Place::Path(path), writes(flags);
    openat as next_openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int, Place::In(dir, path), writes(flags);
    openat64 as next_openat64(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int, Place::In(dir, path), writes(flags);
    writev as next_writev(fd: c_int, parts: *const iovec, count: c_int) -> ssize_t, Place::Open(fd), true;
    pwrite64 as next_pwrite64(fd: c_int, from: *const c_void, count: size_t, at: off64_t) -> ssize_t, Place::Open(fd), true;
    sendfile64 as next_sendfile64(fd: c_int, from: c_int, at: *mut off64_t, count: size_t) -> ssize_t, Place::Open(fd), true;
    copy_file_range as next_copy_file_range(from: c_int, from_at: *mut off64_t, fd: c_int, at: *mut off64_t, count: size_t, flags: u32) -> ssize_t, Place::Open(fd), true;
    ftruncate64 as next_ftruncate64(fd: c_int, length: off64_t) -> c_int, Place::Open(fd), true;
    fsync as next_fsync(fd: c_int) -> c_int, Place::Open(fd), true;
    fdatasync as next_fdatasync(fd: c_int) -> c_int, Place::Open(fd), true;
    rename as next_rename(from: *const c_char, to: *const c_char) -> c_int, Place::Path(to), true;
    mkdir as next_mkdir(path: *const c_char, mode: mode_t) -> c_int, Place::Path(path), true;
    rmdir as next_rmdir(path: *const c_char) -> c_int, Place::Path(path), true;
    unlink as next_unlink(path: *const c_char) -> c_int, Place::Path(path), true;
    unlinkat as next_unlinkat(dir: c_int, path: *const c_char, flags: c_int) -> c_int, Place::In(dir, path), true;
}

unsafe fn next_write(fd: c_int, from: *const c_void, count: size_t) -> ssize_t {
    // SAFETY: libc has a function of this name and type.
    unsafe {
        let found = libc::dlsym(libc::RTLD_NEXT, c"write".as_ptr());
        let found: unsafe extern "C" fn(c_int, *const c_void, size_t) -> ssize_t =
            std::mem::transmute(found);
        found(fd, from, count)
    }
}

/// # Safety
/// As libc's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(fd: c_int, from: *const c_void, count: size_t) -> ssize_t {
    let count = match verdict("write", &Place::Open(fd)) {
        Verdict::Fails => return fail() as ssize_t,
        Verdict::Halves => count / 2,
        Verdict::Passes => count,
    };
    // SAFETY: passed on as it came, or less of it.
    unsafe { next_write(fd, from, count) }
}

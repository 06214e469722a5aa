//! Reading what a library in C points to.

use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;

/// Longest text of a table, with its zero byte.
const LONGEST: usize = 4096;

/// A struct that begins with its size, or that has it as its second number (`at` in bytes).
///
/// # Safety
/// `T` is `repr(C)` and may be all zeros; `from` is null or points to as many bytes as the size says.
pub unsafe fn sized<T>(from: *const T, at: usize, smallest: usize) -> Result<T, String> {
    if from.is_null() {
        return Err("is NULL".into());
    }
    let bytes = from.cast::<u8>();
    // SAFETY: the caller's promise; alignment is not relied on.
    let size = unsafe { bytes.add(at).cast::<u32>().read_unaligned() } as usize;
    if size < smallest {
        return Err(format!(
            "has a size of {size} bytes, less than the {smallest} of revision 1; `size` must be its sizeof"
        ));
    }
    let mut own = MaybeUninit::<T>::zeroed();
    // Fields that the library does not know yet stay 0, those that this host does not know are left.
    let known = size.min(size_of::<T>());
    // SAFETY: `known` bytes are there on both sides; `T` may be any bytes that C wrote, and zeros.
    unsafe {
        bytes.copy_to_nonoverlapping(own.as_mut_ptr().cast(), known);
        Ok(own.assume_init())
    }
}

/// A text that ends with a zero byte.
///
/// # Safety
/// `from` is null or points to such a text.
pub unsafe fn text(from: *const c_char) -> Result<String, String> {
    if from.is_null() {
        return Err("is NULL".into());
    }
    // SAFETY: nothing is read behind the zero byte.
    let end = (0..LONGEST).find(|i| unsafe { *from.add(*i) } == 0);
    if end.is_none() {
        return Err(format!("does not end within {LONGEST} bytes"));
    }
    // SAFETY: it was just seen to end.
    let text = unsafe { CStr::from_ptr(from) };
    text.to_str().map(str::to_owned).map_err(|_| "is not UTF-8".into())
}

/// The text in a buffer of the host's; None if it does not end there.
pub fn buffer(chars: &[c_char]) -> Option<&[u8]> {
    // SAFETY: `c_char` is a byte.
    let bytes = unsafe { std::slice::from_raw_parts(chars.as_ptr().cast::<u8>(), chars.len()) };
    CStr::from_bytes_until_nul(bytes).ok().map(CStr::to_bytes)
}

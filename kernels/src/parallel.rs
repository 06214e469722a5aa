//! How work is cut into tasks. The pieces depend on shapes alone, never on timing, so results do not
//! depend on which thread ran what.

use std::marker::PhantomData;
use std::ops::Range;

/// Elements that one task of a memory-bound op takes: enough to outweigh handing it to another
/// thread, small enough that the pieces stay in the second-level cache.
const GRAIN: usize = 16 * 1024;

/// Rows of `width` elements per task.
pub(crate) fn rows_per_task(width: usize) -> usize {
    (GRAIN / width.max(1)).max(1)
}

/// Elements per task.
pub(crate) const fn elements_per_task() -> usize {
    GRAIN
}

/// A slice into which several tasks write at places that do not overlap, for outputs whose parts are
/// strided and so cannot be split with `chunks_mut`.
pub(crate) struct Scattered<'a> {
    start: *mut f32,
    len: usize,
    slice: PhantomData<&'a mut [f32]>,
}

// SAFETY: `range_mut` is the only access, and its caller promises that ranges do not overlap.
unsafe impl Send for Scattered<'_> {}
// SAFETY: as above.
unsafe impl Sync for Scattered<'_> {}

impl<'a> Scattered<'a> {
    pub(crate) fn new(slice: &'a mut [f32]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// While the result lives, no other call may be given a range that overlaps this one.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn range_mut(&self, range: Range<usize>) -> &mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

//! How work is cut into tasks. The pieces depend on shapes alone, never on timing, so results do not
//! depend on which thread ran what.

use rayon::Yield;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

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

/// How long a thread looks for tasks before it falls asleep after all: longer than what comes between two
/// products, and short enough not to matter where it is in the way of other work on the same threads.
const PATIENCE: Duration = Duration::from_millis(2);

/// Does `work` on one of the threads that its tasks run on, and keeps the others from falling asleep in between.
/// A pass through a model is thousands of products, each cut into tasks several times: to put a thread to
/// sleep and wake it for every one of them takes longer than what it waits for. A thread without a task gives way to
/// whatever else wants the processor.
pub fn awake<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    let done = AtomicBool::new(false);
    rayon::scope(|scope| {
        let (here, done) = (rayon::current_thread_index(), &done);
        scope.spawn_broadcast(move |_, thread| {
            if Some(thread.index()) != here {
                look_for_tasks(done);
            }
        });
        // Also if the work panics.
        let _done = Done(done);
        work()
    })
}

fn look_for_tasks(done: &AtomicBool) {
    let mut busy = Instant::now();
    while !done.load(Ordering::Relaxed) && busy.elapsed() < PATIENCE {
        match rayon::yield_now() {
            Some(Yield::Executed) => busy = Instant::now(),
            _ => std::thread::yield_now(),
        }
    }
}

struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    #[test]
    fn work_in_tasks_is_done_while_threads_are_awake() {
        let sum = || (0..1000u64).into_par_iter().map(|n| n * n).sum::<u64>();
        assert_eq!(awake(|| (sum(), awake(sum))), (332_833_500, 332_833_500));
        let many: Vec<u64> = (0..64).into_par_iter().map(|_| awake(sum)).collect();
        assert_eq!(many, [332_833_500; 64]);
    }

    #[test]
    #[should_panic(expected = "no numbers")]
    fn a_panic_ends_the_waiting() {
        awake(|| panic!("no numbers"));
    }
}

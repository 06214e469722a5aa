//! Memory of the program that a device copies from and to by itself, while the program goes on.

use std::collections::VecDeque;
use std::collections::vec_deque::Drain;
use std::ops::Range;

/// A piece of memory that numbers go through on their way to the device, a stretch after the other and round and
/// round. `M` marks a moment on the device: what was told before it is done then.
pub(super) struct Ring<M> {
    memory: *mut u8,
    bytes: usize,
    /// Where the next stretch begins, if it fits before the end.
    next: usize,
    /// Stretches that the device may not have read yet, oldest first.
    busy: VecDeque<(Range<usize>, M)>,
}

// SAFETY: the memory is the ring's alone.
unsafe impl<M: Send> Send for Ring<M> {}

impl<M> Ring<M> {
    /// # Safety
    /// `memory` has so many bytes as long as the ring is used, and nobody else uses them.
    pub unsafe fn new(memory: *mut u8, bytes: usize) -> Self {
        Self { memory, bytes, next: 0, busy: VecDeque::new() }
    }

    /// Bytes of a stretch at most.
    pub fn stretch(&self) -> usize {
        self.bytes / 4
    }

    /// Where so many bytes lie next, and the marks, oldest first, of what they lay in: the last has to be waited
    /// for before they are written.
    pub fn take(&mut self, bytes: usize) -> (Range<usize>, Drain<'_, (Range<usize>, M)>) {
        assert!(bytes <= self.stretch(), "a stretch of {bytes} bytes in a ring of {}", self.bytes);
        let start = if self.next + bytes > self.bytes { 0 } else { self.next };
        let taken = start..start + bytes;
        self.next = taken.end;
        let overlaps =
            |(busy, _): &(Range<usize>, M)| busy.start < taken.end && taken.start < busy.end;
        // What is older than one that is done is done too.
        let done = self.busy.iter().rposition(overlaps).map_or(0, |last| last + 1);
        (taken, self.busy.drain(..done))
    }

    /// Writes into what [`Self::take`] gave; where it lies.
    pub fn write(&mut self, taken: &Range<usize>, from: &[u8]) -> *const u8 {
        assert!(taken.len() == from.len() && taken.end <= self.bytes, "a stretch of the ring");
        // SAFETY: within the memory, which nobody else uses.
        unsafe {
            let to = self.memory.add(taken.start);
            std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len());
            to
        }
    }

    /// The device is told to read a stretch; at `mark` it has.
    pub fn mark(&mut self, taken: Range<usize>, mark: M) {
        self.busy.push_back((taken, mark));
    }

    /// The memory, and the marks that are left.
    pub fn take_apart(&mut self) -> (*mut u8, impl Iterator<Item = M>) {
        (self.memory, std::mem::take(&mut self.busy).into_iter().map(|(_, mark)| mark))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stretch_waits_for_what_lay_there() {
        let mut memory = vec![0; 100];
        // SAFETY: the vector's memory, used through the ring alone.
        let mut ring = unsafe { Ring::new(memory.as_mut_ptr(), 100) };
        let mut taken = |bytes: usize, mark: u32| {
            let (taken, marks) = ring.take(bytes);
            let waited: Vec<u32> = marks.map(|(_, mark)| mark).collect();
            ring.mark(taken.clone(), mark);
            (taken, waited)
        };
        for (mark, start) in [0, 25, 50].into_iter().enumerate() {
            assert_eq!(taken(25, mark as u32), (start..start + 25, vec![]));
        }
        assert_eq!(taken(20, 3), (75..95, vec![]));
        assert_eq!(taken(10, 4), (0..10, vec![0]), "not enough room before the end");
        assert_eq!(taken(15, 5), (10..25, vec![]), "the rest of what is done already");
        assert_eq!(taken(1, 6), (25..26, vec![1]));
        assert_eq!(taken(25, 7), (26..51, vec![2]));
        assert_eq!(ring.stretch(), 25);
    }
}

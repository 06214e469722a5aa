//! Memory for activations: an arena that buffers are taken from and given back to.
//!
//! Where a buffer lies depends on nothing but the buffers taken and given back before, so a pool that
//! only counts ([`Pool::counting`]) finds out beforehand how much memory a pass will take, to the byte.
//! After the first pass over the largest batch nothing is allocated or zeroed any more, and smaller
//! batches lie in the same memory.

use crate::allocator;
use memmap2::{MmapOptions, MmapRaw};
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, MutexGuard};

/// Elements per unit of the arena: a cache line of them.
const UNIT: usize = 16;
/// Units of the smallest segment, 64 MiB: addresses only, memory comes with the first write.
const SEGMENT: usize = 1 << 20;

/// Memory for buffers. A clone is the same pool.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    arena: Arc<Mutex<Arena>>,
}

/// Memory of a [`Pool`], which takes it back on drop.
#[derive(Debug)]
pub struct Buffer {
    /// Null in a pool that only counts.
    start: *mut f32,
    len: usize,
    segment: usize,
    units: Range<usize>,
    pool: Pool,
}

// SAFETY: a buffer's range of the arena is its own until it is dropped, and the arena lives as long as
// the buffer, which holds its pool.
unsafe impl Send for Buffer {}
// SAFETY: as above; shared access is to `&[f32]` only.
unsafe impl Sync for Buffer {}

#[derive(Debug, Default)]
struct Arena {
    segments: Vec<Segment>,
}

/// One stretch of memory. Places are counted in units.
#[derive(Debug)]
struct Segment {
    /// None in a pool that only counts.
    memory: Option<MmapRaw>,
    len: usize,
    /// Everything from here on is free.
    top: usize,
    /// The highest that `top` ever was: memory beyond it was never touched.
    high: usize,
    /// Free ranges below `top`, rising; neither neighbours of each other nor of `top`.
    holes: Vec<Range<usize>>,
}

impl Pool {
    /// A pool whose buffers hold no memory, to find out how much a pass would take.
    pub fn counting() -> Self {
        let pool = Self::default();
        pool.arena().segments.push(Segment::new(None, usize::MAX));
        pool
    }

    /// Sets aside addresses for `bytes`, so that up to there everything lies in one piece, as it does in
    /// a pool that only counts. Without effect once anything was taken.
    pub fn reserve(&self, bytes: usize) {
        let mut arena = self.arena();
        if arena.segments.is_empty() {
            arena.grow(bytes.div_ceil(size_of::<f32>() * UNIT).max(1));
        }
    }

    /// Most memory that was ever in use, in bytes.
    pub fn high_water(&self) -> usize {
        let units: usize = self.arena().segments.iter().map(|segment| segment.high).sum();
        units * UNIT * size_of::<f32>()
    }

    /// `len` elements with anything in them: every op overwrites its outputs.
    pub fn take(&self, len: usize) -> Buffer {
        let units = len.div_ceil(UNIT).max(1);
        let (segment, range, start) = self.arena().take(units);
        let mut buffer = Buffer { start, len, segment, units: range, pool: self.clone() };
        if cfg!(debug_assertions) && !start.is_null() {
            buffer.fill(f32::NAN);
        }
        buffer
    }

    /// As [`Self::take`], filled with zeros.
    pub fn zeros(&self, len: usize) -> Buffer {
        let mut buffer = self.take(len);
        buffer.fill(0.0);
        buffer
    }

    /// A copy of `from`.
    pub fn copy(&self, from: &[f32]) -> Buffer {
        let mut buffer = self.take(from.len());
        buffer.copy_from_slice(from);
        buffer
    }

    fn arena(&self) -> MutexGuard<'_, Arena> {
        self.arena.lock().expect("no panic while the lock is held")
    }
}

impl Arena {
    /// The smallest hole that is large enough, otherwise fresh memory.
    fn take(&mut self, units: usize) -> (usize, Range<usize>, *mut f32) {
        let holes = self.segments.iter().enumerate().flat_map(|(segment, s)| {
            s.holes.iter().enumerate().map(move |(hole, range)| (range.len(), segment, hole))
        });
        let smallest = holes.filter(|(len, ..)| *len >= units).min();
        let (segment, range) = match smallest {
            Some((_, segment, hole)) => (segment, self.segments[segment].take_hole(hole, units)),
            None => {
                let room = self.segments.iter().position(|s| s.len - s.top >= units);
                let segment = room.unwrap_or_else(|| self.grow(units));
                (segment, self.segments[segment].take_top(units))
            }
        };
        let memory = self.segments[segment].memory.as_ref();
        let start = memory.map_or(std::ptr::null_mut(), |memory| {
            memory.as_mut_ptr().cast::<f32>().wrapping_add(range.start * UNIT)
        });
        (segment, range, start)
    }

    /// Adds a segment with room for `units`, as large as all others together.
    fn grow(&mut self, units: usize) -> usize {
        let all: usize = self.segments.iter().map(|segment| segment.len).sum();
        let len = units.max(all).max(SEGMENT);
        self.segments.push(Segment::new(Some(map(len * UNIT * size_of::<f32>())), len));
        self.segments.len() - 1
    }
}

impl Segment {
    fn new(memory: Option<MmapRaw>, len: usize) -> Self {
        Self { memory, len, top: 0, high: 0, holes: Vec::new() }
    }

    fn take_hole(&mut self, hole: usize, units: usize) -> Range<usize> {
        let Range { start, end } = self.holes[hole];
        match start + units == end {
            true => drop(self.holes.remove(hole)),
            false => self.holes[hole].start += units,
        }
        start..start + units
    }

    fn take_top(&mut self, units: usize) -> Range<usize> {
        let start = self.top;
        self.top += units;
        self.high = self.high.max(self.top);
        start..self.top
    }

    /// Takes a range back and joins it with what is free on both sides.
    fn give(&mut self, mut range: Range<usize>) {
        let mut at = self.holes.partition_point(|hole| hole.end <= range.start);
        if self.holes.get(at).is_some_and(|after| after.start == range.end) {
            range.end = self.holes.remove(at).end;
        }
        if at > 0 && self.holes[at - 1].end == range.start {
            at -= 1;
            range.start = self.holes.remove(at).start;
        }
        match range.end == self.top {
            true => self.top = range.start,
            false => self.holes.insert(at, range),
        }
    }
}

fn map(bytes: usize) -> MmapRaw {
    let memory = MmapOptions::new().len(bytes).no_reserve_swap().map_anon();
    let memory = memory.unwrap_or_else(|_| allocator::out_of_memory(bytes));
    memory.into()
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Ok(mut arena) = self.pool.arena.lock() {
            arena.segments[self.segment].give(self.units.clone());
        }
    }
}

impl Buffer {
    /// Number of elements, also in a pool that only counts.
    pub fn count(&self) -> usize {
        self.len
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        assert!(!self.start.is_null(), "a buffer of a pool that only counts");
        // SAFETY: the range holds `len` initialised elements (fresh memory is zero) and is this
        // buffer's own.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        assert!(!self.start.is_null(), "a buffer of a pool that only counts");
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// High-water mark in units.
    fn high(pool: &Pool) -> usize {
        pool.high_water() / (UNIT * size_of::<f32>())
    }

    #[test]
    fn buffers_are_apart_and_hold_what_is_written() {
        let pool = Pool::default();
        let (mut a, b) = (pool.take(100), pool.zeros(10));
        a.fill(1.0);
        let c = pool.copy(&[2.0; 60]);
        assert_eq!((a.len(), b.len()), (100, 10));
        assert!(a.iter().all(|x| *x == 1.0) && *b == [0.0; 10] && *c == [2.0; 60]);
        assert_eq!(high(&pool), 7 + 1 + 4);
        drop((a, b, c));
        assert!(pool.arena().segments.iter().all(|s| s.top == 0 && s.holes.is_empty()));
    }

    #[test]
    fn what_is_given_back_is_used_again() {
        for pool in [Pool::default(), Pool::counting()] {
            let units = |n| pool.take(n * UNIT);
            let (a, b, c, _last) = (units(5), units(3), units(4), units(1));
            drop(b);
            drop(units(2));
            let smaller = units(3);
            assert_eq!(smaller.units, 5..8, "the hole that fits");
            drop((a, smaller));
            assert_eq!(units(8).units, 0..8, "neighbours are joined");
            assert_eq!(units(9).units, 13..22, "no hole is large enough");
            drop(c);
            assert_eq!(units(12).units, 0..12);
            assert_eq!(high(&pool), 22);
        }
    }

    #[test]
    fn a_pool_grows_by_segments() {
        let pool = Pool::default();
        pool.reserve(1);
        let large = pool.take((SEGMENT + 1) * UNIT);
        assert_eq!((large.segment, large.len()), (1, (SEGMENT + 1) * UNIT));
        let small = pool.take(1);
        assert_eq!(small.segment, 0);
        let lens: Vec<usize> = pool.arena().segments.iter().map(|s| s.len).collect();
        assert_eq!(lens, [SEGMENT, SEGMENT + 1]);
    }

    #[test]
    #[should_panic(expected = "only counts")]
    fn counting_holds_no_memory() {
        let _ = Pool::counting().take(1)[0];
    }
}

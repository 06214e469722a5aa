//! One allocation that buffers are taken from and given back to, so that a step allocates nothing.
//!
//! Where a buffer lies depends on nothing but the buffers taken and given back before. [`Ranges`] is that
//! bookkeeping alone: going through a step with it finds out beforehand how large the arena has to be, to
//! the byte.

use super::memory::{DeviceBuffer, Owner};
use super::{Gpu, Plain, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Buffers begin at multiples of this, as those of the driver do.
const ALIGNMENT: usize = 256;

/// Which ranges of `capacity` bytes are taken: first fit.
#[derive(Debug)]
pub struct Ranges {
    capacity: usize,
    /// Start and length, rising; neighbours are one.
    free: Vec<(usize, usize)>,
    taken: usize,
    high_water: usize,
}

impl Ranges {
    pub fn new(capacity: usize) -> Self {
        let capacity = capacity / ALIGNMENT * ALIGNMENT;
        Self { capacity, free: vec![(0, capacity)], taken: 0, high_water: 0 }
    }

    /// Ranges without end, to find out how many bytes a step needs: [`Ranges::high_water`].
    pub fn counting() -> Self {
        Self::new(usize::MAX)
    }

    /// Where `bytes` lie, or nothing if there is no such stretch.
    pub fn take(&mut self, bytes: usize) -> Option<usize> {
        let bytes = rounded(bytes);
        let slot = self.free.iter().position(|&(_, len)| len >= bytes)?;
        let (start, len) = self.free[slot];
        if len == bytes {
            self.free.remove(slot);
        } else {
            self.free[slot] = (start + bytes, len - bytes);
        }
        self.taken += bytes;
        self.high_water = self.high_water.max(start + bytes);
        Some(start)
    }

    /// Gives back what [`Ranges::take`] gave.
    pub fn give_back(&mut self, start: usize, bytes: usize) {
        let bytes = rounded(bytes);
        let slot = self.free.partition_point(|&(other, _)| other < start);
        self.free.insert(slot, (start, bytes));
        // With the neighbour behind it, then with the one before it.
        for left in (slot.saturating_sub(1)..=slot).rev() {
            let end = self.free[left].0 + self.free[left].1;
            if self.free.get(left + 1).is_some_and(|right| right.0 == end) {
                self.free[left].1 += self.free.remove(left + 1).1;
            }
        }
        self.taken -= bytes;
    }

    /// Bytes from the beginning to the end of the farthest range that was ever taken.
    pub fn high_water(&self) -> usize {
        self.high_water
    }
}

/// At least one unit: two buffers never have the same place.
fn rounded(bytes: usize) -> usize {
    bytes.max(1).div_ceil(ALIGNMENT) * ALIGNMENT
}

/// Where an arena's memory is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// On the device, used by launches, which are in order.
    Device,
    /// The host's, page-locked, used by copies beside launches, which are in order too.
    Pinned,
}

/// What a buffer that is a mapping of its own stands for: a range of an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    /// Which arena and segment.
    of: (usize, usize),
    start: usize,
    end: usize,
}

impl Spot {
    /// Whether two would have bytes in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.of == other.of && self.start < other.end && other.start < self.end
    }
}

/// Memory of a device for buffers of any type. A clone is the same arena.
#[derive(Clone)]
pub struct Arena(Arc<Inner>);

struct Inner {
    gpu: Gpu,
    kind: Kind,
    /// What was set aside, and what had to be added because that was not enough.
    segments: Mutex<Vec<Segment>>,
}

struct Segment {
    /// None on the emulated device, where every buffer is a mapping of its own with guards around it, and
    /// where memory is only counted.
    memory: Option<DeviceBuffer<u8>>,
    ranges: Ranges,
}

/// Bytes of the smallest segment that is added, and of the largest that no buffer needs.
const SEGMENT: usize = 64 << 20;
const MOST: usize = 1 << 30;

/// A buffer's place in an arena, and the arena.
pub(super) struct Place {
    arena: Arena,
    segment: usize,
    start: usize,
    bytes: usize,
}

impl Arena {
    /// With `bytes` set aside.
    ///
    /// # Errors
    /// The device has no `bytes` left.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Self> {
        Self::of(Kind::Device, gpu, bytes)
    }

    pub(super) fn of(kind: Kind, gpu: &Gpu, bytes: usize) -> Result<Self> {
        let segments = Mutex::new(vec![Segment::new(kind, gpu, bytes)?]);
        Ok(Self(Arc::new(Inner { gpu: gpu.clone(), kind, segments })))
    }

    /// Without end, on a device that counts.
    pub fn counting(gpu: &Gpu) -> Self {
        Self::counting_of(Kind::Device, gpu)
    }

    pub(super) fn counting_of(kind: Kind, gpu: &Gpu) -> Self {
        let segments = Mutex::new(vec![Segment { memory: None, ranges: Ranges::counting() }]);
        Self(Arc::new(Inner { gpu: gpu.clone(), kind, segments }))
    }

    /// Memory for `len` numbers, until it is dropped. Launches are in order, so what was given back may be
    /// taken again while the launches that use it are still under way. Where what was set aside is not
    /// enough, memory is added, which then stays the arena's.
    ///
    /// # Errors
    /// No stretch of that length is free, and the device has none either.
    pub fn take<T: Plain>(&self, len: usize) -> Result<DeviceBuffer<T>> {
        let bytes = len * size_of::<T>();
        let (segment, start, memory) = self.place(bytes)?;
        // From here on the place is given back whatever happens.
        let mut place = Place { arena: self.clone(), segment, start, bytes };
        let address = match memory {
            Some(memory) => Ok(memory + start as u64),
            None => self.0.gpu.place_apart(bytes, place.spot()),
        };
        match address {
            Ok(address) => {
                #[cfg_attr(not(test), expect(unused_mut))]
                let mut buffer = DeviceBuffer::new(address, len, Owner::Arena(place));
                #[cfg(test)]
                if self.0.kind == Kind::Device {
                    self.0.gpu.poison(&mut buffer)?;
                }
                Ok(buffer)
            }
            Err(error) => {
                place.give_back_range();
                Err(error)
            }
        }
    }

    /// A segment with a free stretch, where the stretch begins, and where the segment lies.
    fn place(&self, bytes: usize) -> Result<(usize, usize, Option<u64>)> {
        let mut segments = self.segments();
        let address = |segment: &Segment| segment.memory.as_ref().map(|memory| memory.address());
        for (index, segment) in segments.iter_mut().enumerate() {
            if let Some(start) = segment.ranges.take(bytes) {
                return Ok((index, start, address(segment)));
            }
        }
        // As much again as there is, within reason, if the device has it.
        let all: usize = segments.iter().map(|segment| segment.ranges.capacity).sum();
        let new = |bytes| Segment::new(self.0.kind, &self.0.gpu, bytes);
        let larger = new(all.clamp(SEGMENT, MOST).max(rounded(bytes)));
        let mut segment = larger.or_else(|_| new(rounded(bytes)))?;
        let start = segment.ranges.take(bytes).expect("the segment is large enough");
        let address = address(&segment);
        segments.push(segment);
        Ok((segments.len() - 1, start, address))
    }

    /// Bytes that were ever needed.
    pub fn high_water(&self) -> usize {
        self.segments().iter().map(|segment| segment.ranges.high_water()).sum()
    }

    pub(super) fn gpu(&self) -> &Gpu {
        &self.0.gpu
    }

    fn segments(&self) -> MutexGuard<'_, Vec<Segment>> {
        self.0.segments.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Segment {
    fn new(kind: Kind, gpu: &Gpu, bytes: usize) -> Result<Self> {
        let memory = match kind {
            _ if !gpu.lends_pieces() || bytes == 0 => None,
            Kind::Device => Some(gpu.alloc(bytes)?),
            Kind::Pinned => Some(gpu.alloc_pinned(bytes)?),
        };
        Ok(Self { memory, ranges: Ranges::new(bytes) })
    }
}

impl Place {
    pub(super) fn give_back(&mut self, address: u64) {
        let Inner { gpu, kind, .. } = &*self.arena.0;
        if !gpu.lends_pieces() {
            gpu.give_back_apart(address, *kind);
        }
        self.give_back_range();
    }

    fn spot(&self) -> Spot {
        let of = (Arc::as_ptr(&self.arena.0).addr(), self.segment);
        Spot { of, start: self.start, end: self.start + rounded(self.bytes) }
    }

    fn give_back_range(&mut self) {
        self.arena.segments()[self.segment].ranges.give_back(self.start, self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_one_stretch_again() {
        let mut ranges = Ranges::new(4 * ALIGNMENT + 7);
        let starts: Vec<_> = (0..4).map(|_| ranges.take(ALIGNMENT).unwrap()).collect();
        assert_eq!(starts, [0, 256, 512, 768]);
        assert_eq!(ranges.take(1), None);
        for i in [1, 3, 0, 2] {
            ranges.give_back(starts[i], ALIGNMENT);
        }
        assert_eq!(ranges.free, [(0, 4 * ALIGNMENT)]);
        assert_eq!((ranges.taken, ranges.high_water()), (0, 4 * ALIGNMENT));
    }

    #[test]
    fn counting_finds_what_the_arena_must_hold() {
        let step = |ranges: &mut Ranges| -> Option<()> {
            let a = ranges.take(1000)?;
            let b = ranges.take(5000)?;
            ranges.give_back(a, 1000);
            let c = ranges.take(300)?;
            let d = ranges.take(900)?;
            assert!(c == 0 && d == 6144, "first fit: {c} {d}");
            ranges.give_back(b, 5000);
            Some(())
        };
        let mut counting = Ranges::counting();
        step(&mut counting).unwrap();
        let needed = counting.high_water();
        assert_eq!(step(&mut Ranges::new(needed)), Some(()));
        assert_eq!(step(&mut Ranges::new(needed - 1)), None);
    }

    #[test]
    fn buffers_come_from_the_arena_and_go_back() {
        let gpu = crate::testing::gpu(0);
        let arena = Arena::new(&gpu, 1024).unwrap();
        let a = arena.take::<f32>(100).unwrap();
        let b = arena.take::<half::bf16>(100).unwrap();
        assert_ne!(a.address(), b.address());
        assert_eq!(arena.high_water(), 768);
        drop(a);
        let c = arena.take::<u32>(100).unwrap();
        assert_eq!(arena.high_water(), 768, "what was given back is used again");
        // More than was set aside.
        let d = arena.take::<u32>(200).unwrap();
        assert_eq!(arena.high_water(), 768 + 1024);
        drop((b, c, d));
        arena.take::<u32>(SEGMENT / 4).unwrap();
        assert_eq!(arena.high_water(), 768 + SEGMENT, "the segment that was added stays");
    }
}

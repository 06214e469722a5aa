//! The device that computes nothing and holds nothing: going through a step on it finds out beforehand how
//! much memory the step takes on a real one, since it is the very same code that goes through.

use super::{Device, Gpu, Kernel, Properties};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(super) struct Counter {
    pub properties: Properties,
    memory: Mutex<Memory>,
    /// Each once.
    launched: Mutex<Vec<Kernel>>,
    launches: AtomicUsize,
}

#[derive(Default)]
struct Memory {
    /// Bytes by address.
    held: HashMap<u64, usize>,
    /// Where the next allocation seems to lie: beyond all others, so that an address is never met twice.
    next: u64,
    bytes: usize,
    most: usize,
}

/// What allocations begin at multiples of, as the driver's do.
const ALIGNMENT: u64 = 256;

impl Counter {
    pub fn new(properties: Properties) -> Self {
        let (memory, launched) = (Mutex::default(), Mutex::default());
        Self { properties, memory, launched, launches: AtomicUsize::new(0) }
    }

    pub fn allocate(&self, bytes: usize) -> u64 {
        let memory = &mut *self.memory();
        memory.next += ALIGNMENT;
        let address = memory.next;
        memory.next += (bytes as u64).next_multiple_of(ALIGNMENT);
        memory.held.insert(address, bytes);
        memory.bytes += bytes;
        memory.most = memory.most.max(memory.bytes);
        address
    }

    pub fn free(&self, address: u64) {
        let memory = &mut *self.memory();
        memory.bytes -= memory.held.remove(&address).unwrap_or(0);
    }

    pub fn launch(&self, kernel: &Kernel) {
        self.launches.fetch_add(1, Ordering::Relaxed);
        let mut launched = self.launched.lock().unwrap_or_else(PoisonError::into_inner);
        if !launched.contains(kernel) {
            launched.push(*kernel);
        }
    }

    pub fn launched(&self) -> Vec<Kernel> {
        self.launched.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Most bytes that were held at a time.
    pub fn most(&self) -> usize {
        self.memory().most
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gpu {
    /// A device that holds and computes nothing, to find out how much memory something takes on one like
    /// `properties`: [`Gpu::most_allocated`], and of an arena [`Arena::high_water`]. What is downloaded from it
    /// stays as it was.
    pub fn counting(properties: Properties) -> Self {
        Self(Arc::new(Device::Counter(Counter::new(properties))))
    }

    /// Of a device that counts: most bytes that were allocated at a time, what arenas lend not included.
    pub fn most_allocated(&self) -> Option<usize> {
        match &*self.0 {
            Device::Counter(device) => Some(device.most()),
            _ => None,
        }
    }

    /// Of a device that counts: every kernel that was launched, for [`Gpu::prepare`] of another.
    pub fn launched(&self) -> Vec<Kernel> {
        match &*self.0 {
            Device::Counter(device) => device.launched(),
            _ => Vec::new(),
        }
    }

    /// Of a device that counts: launches so far.
    pub fn launches(&self) -> usize {
        match &*self.0 {
            Device::Counter(device) => device.launches.load(Ordering::Relaxed),
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Arena;
    use super::*;

    #[test]
    fn what_would_be_held_is_counted() {
        let gpu = Gpu::counting(Properties {
            name: "none".into(),
            compute_capability: (8, 0),
            memory: 1 << 40,
            multiprocessors: 1,
            shared_bytes: 0,
        });
        let weights = gpu.uploaded(&[1.0f32; 100]).unwrap();
        drop(gpu.alloc::<u8>(1000).unwrap());
        let more = gpu.alloc::<u32>(10).unwrap();
        assert_ne!(weights.address(), more.address());
        assert_eq!(gpu.most_allocated(), Some(1400));
        let arena = Arena::counting(&gpu);
        let held = arena.take::<f32>(1 << 30).unwrap();
        drop(arena.take::<f32>(64).unwrap());
        drop(held);
        assert_eq!(arena.high_water(), (4 << 30) + 256);
        assert_eq!(gpu.most_allocated(), Some(1400), "the arena counts its own");
        assert_eq!(gpu.downloaded(&weights).unwrap(), [0.0; 100], "nothing is held");
    }
}

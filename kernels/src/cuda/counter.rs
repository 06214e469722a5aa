//! The device that computes nothing and holds nothing: going through a step on it finds out beforehand how
//! much memory the step takes on a real one, since it is the very same code that goes through.

use super::{Kernel, Properties};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(super) struct Counter {
    pub properties: Properties,
    memory: Mutex<Memory>,
    /// Each once.
    launched: Mutex<Vec<Kernel>>,
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
        Self { properties, memory: Mutex::default(), launched: Mutex::default() }
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

#[cfg(test)]
mod tests {
    use super::super::{Arena, Gpu, Properties};

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

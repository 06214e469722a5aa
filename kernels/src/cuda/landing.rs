//! Numbers on their way from a device while the program goes on.

use super::arena::Ranges;
use super::driver::Event;
use super::{Device, DeviceSlice, Gpu, Plain, Result};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Memory of the program that a device copies to by itself.
pub(super) struct Landing {
    memory: *mut u8,
    ranges: Mutex<Ranges>,
}

// SAFETY: the memory is the landing's alone, and every range of it one transfer's.
unsafe impl Send for Landing {}
// SAFETY: as above.
unsafe impl Sync for Landing {}

impl Landing {
    /// # Safety
    /// `memory` has so many bytes as long as the landing is used, and nobody else uses them.
    pub unsafe fn new(memory: *mut u8, bytes: usize) -> Self {
        Self { memory, ranges: Mutex::new(Ranges::new(bytes)) }
    }

    /// All of it, to give it back.
    pub fn memory(&self) -> *mut u8 {
        self.memory
    }

    fn ranges(&self) -> MutexGuard<'_, Ranges> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Numbers that a device sends: see [`Gpu::downloading`].
pub struct Downloading<T: Plain>(State<T>);

enum State<T: Plain> {
    There(Vec<T>),
    Coming(Transfer, usize),
}

/// A stretch of the landing, which is given back on drop, when the device has written it.
struct Transfer {
    gpu: Gpu,
    start: usize,
    bytes: usize,
    mark: Mark,
}

/// A moment on the device.
enum Mark {
    Event(Event),
    Task(u64),
}

impl Gpu {
    /// As [`Gpu::downloaded`], without waiting: what `buffer` holds when all launches so far are done. It may be given
    /// back, and written by later launches. Where too much is on its way already, the call waits.
    ///
    /// # Errors
    /// As [`Gpu::download`].
    pub fn downloading<T: Plain>(&self, buffer: &DeviceSlice<T>) -> Result<Downloading<T>> {
        let bytes = buffer.len() * size_of::<T>();
        let place = self.landing().filter(|_| bytes > 0).and_then(|l| l.ranges().take(bytes));
        let (Some(start), Some(landing)) = (place, self.landing()) else {
            return Ok(Downloading(State::There(self.downloaded(buffer)?)));
        };
        // SAFETY: within the landing.
        let to = unsafe { landing.memory.add(start) };
        let told = match &*self.0 {
            Device::Driver(device) => device.send(buffer.address(), to, bytes).map(Mark::Event),
            Device::Emulator(device) => device.send(buffer.address(), to, bytes).map(Mark::Task),
            Device::Counter(_) => unreachable!("it has no landing"),
        };
        match told {
            Ok(mark) => {
                let transfer = Transfer { gpu: self.clone(), start, bytes, mark };
                Ok(Downloading(State::Coming(transfer, buffer.len())))
            }
            Err(error) => {
                landing.ranges().give_back(start, bytes);
                Err(error)
            }
        }
    }

    fn landing(&self) -> Option<&Landing> {
        match &*self.0 {
            Device::Driver(device) => Some(&device.landing),
            Device::Emulator(device) => Some(&device.landing),
            Device::Counter(_) => None,
        }
    }
}

impl<T: Plain> Downloading<T> {
    /// Numbers that are there already.
    pub fn there(numbers: Vec<T>) -> Self {
        Self(State::There(numbers))
    }

    /// The numbers, when they have come; what was launched after them may go on.
    ///
    /// # Errors
    /// The driver's, or the failure of an earlier launch.
    pub fn wait(self) -> Result<Vec<T>> {
        let (transfer, len) = match self.0 {
            State::There(numbers) => return Ok(numbers),
            State::Coming(transfer, len) => (transfer, len),
        };
        transfer.wait()?;
        // SAFETY: all bits are a number of every plain type.
        let mut numbers: Vec<T> = vec![unsafe { std::mem::zeroed() }; len];
        // SAFETY: a stretch of the landing that is this transfer's alone, which the device has written.
        unsafe {
            let from = transfer.memory();
            std::ptr::copy_nonoverlapping(from, numbers.as_mut_ptr().cast(), transfer.bytes);
            if transfer.gpu.is_emulated() {
                // So that what is read too early shows.
                from.write_bytes(0xff, transfer.bytes);
            }
        }
        Ok(numbers)
    }
}

impl Transfer {
    fn landing(&self) -> &Landing {
        self.gpu.landing().expect("a transfer lands somewhere")
    }

    fn memory(&self) -> *mut u8 {
        // SAFETY: within the landing.
        unsafe { self.landing().memory.add(self.start) }
    }

    fn wait(&self) -> Result<()> {
        match (&*self.gpu.0, &self.mark) {
            (Device::Driver(device), Mark::Event(event)) => device.wait_for(event),
            (Device::Emulator(device), Mark::Task(task)) => device.wait_for(*task),
            _ => unreachable!("a transfer of another device"),
        }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        // The device may still be writing, if nobody waited. A failure is the next call's to say.
        let _ = self.wait();
        self.landing().ranges().give_back(self.start, self.bytes);
    }
}

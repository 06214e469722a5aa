//! Buffers that wait for their next use in the host's memory: it is page-locked, and a second stream copies them there
//! and back beside what is launched.
//!
//! Such a copy begins when all that was launched before it is done: what it reads is written by then, and nobody uses what it
//! writes over. Launches wait for a copy only where they need what it leaves, [`Copying::wait`]. The host waits for nothing.

use super::arena::{Arena, Kind};
use super::memory::{DeviceBuffer, Owner};
use super::{Device, Gpu, Plain, Result};

/// Each of a device's streams does what it is told in order, and waits for the other only where that is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    /// All that is not said to be beside launches.
    Launches,
    Copies,
}

/// The end of a copy beside launches; how a device knows it is its own affair.
pub(super) struct Moment(pub u64);

/// Page-locked memory for buffers of a device. A clone is the same.
#[derive(Clone)]
pub struct Offload(Arena);

/// Numbers that are there.
pub struct Offloaded<T: Plain>(DeviceBuffer<T>);

impl<T: Plain> Offloaded<T> {
    /// How many.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a shape's product, never asked whether it is 0"
    )]
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// A buffer on the device which a copy beside launches reads or writes.
pub struct Copying<T: Plain> {
    gpu: Gpu,
    /// Until it has been waited for.
    busy: Option<(DeviceBuffer<T>, Moment)>,
}

impl<T: Plain> Copying<T> {
    /// The buffer, for launches from now on: they come after the copy.
    ///
    /// # Errors
    /// The driver's.
    pub fn wait(mut self) -> Result<DeviceBuffer<T>> {
        let (buffer, end) = self.busy.take().expect("waited for once");
        match self.gpu.after(end) {
            Ok(()) => Ok(buffer),
            Err(error) => {
                // Nobody else may have memory that is still copied.
                std::mem::forget(buffer);
                Err(error)
            }
        }
    }
}

impl<T: Plain> Drop for Copying<T> {
    fn drop(&mut self) {
        if let Some((buffer, end)) = self.busy.take()
            && self.gpu.after(end).is_err()
        {
            std::mem::forget(buffer);
        }
    }
}

impl Offload {
    /// With `bytes` set aside; where that is not enough, memory is added.
    ///
    /// # Errors
    /// The machine has no such memory left.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Self> {
        Arena::of(Kind::Pinned, gpu, bytes).map(Self)
    }

    /// Without end, on a device that counts.
    pub fn counting(gpu: &Gpu) -> Self {
        Self(Arena::counting_of(Kind::Pinned, gpu))
    }

    /// Bytes that were ever needed.
    pub fn high_water(&self) -> usize {
        self.0.high_water()
    }

    /// Has a buffer copied to the host's memory. Its own memory is free when that has been waited for.
    ///
    /// # Errors
    /// The machine has no such memory left, or the driver's.
    pub fn send<T: Plain>(&self, buffer: DeviceBuffer<T>) -> Result<(Offloaded<T>, Copying<T>)> {
        let held = self.0.take(buffer.len())?;
        let copying = self.copy(buffer.address(), held.address(), buffer)?;
        Ok((Offloaded(held), copying))
    }

    /// Has it copied back into a buffer of the same length. What it took of the host's memory is free at once: whoever
    /// gets it writes it with a later copy.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn fetch<T: Plain>(
        &self,
        Offloaded(held): Offloaded<T>,
        into: DeviceBuffer<T>,
    ) -> Result<Copying<T>> {
        assert_eq!(held.len(), into.len(), "fetch: as many numbers as there is room for");
        self.copy(held.address(), into.address(), into)
    }

    /// `buffer` is where it copies from or to.
    fn copy<T: Plain>(&self, from: u64, to: u64, buffer: DeviceBuffer<T>) -> Result<Copying<T>> {
        let gpu = self.0.gpu().clone();
        let end = gpu.copy_beside(from, to, buffer.len() * size_of::<T>())?;
        Ok(Copying { gpu, busy: Some((buffer, end)) })
    }
}

impl Gpu {
    /// Page-locked memory. Only of a device that lends pieces of it.
    pub(super) fn alloc_pinned(&self, bytes: usize) -> Result<DeviceBuffer<u8>> {
        let address = match &*self.0 {
            Device::Driver(device) => device.allocate_pinned(bytes)?,
            Device::Emulator(_) | Device::Counter(_) => unreachable!("no pieces are lent"),
        };
        Ok(DeviceBuffer::new(address, bytes, Owner::Pinned(self.clone())))
    }

    pub(super) fn free_pinned(&self, address: u64) {
        match &*self.0 {
            Device::Driver(device) => device.free_pinned(address),
            Device::Emulator(_) | Device::Counter(_) => unreachable!("no pieces are lent"),
        }
    }

    /// Copies beside launches, after those so far.
    fn copy_beside(&self, from: u64, to: u64, bytes: usize) -> Result<Moment> {
        match &*self.0 {
            Device::Driver(device) => device.copy_beside(from, to, bytes),
            Device::Emulator(device) => device.copy_beside(from, to, bytes),
            Device::Counter(_) => Ok(Moment(0)),
        }
    }

    /// Launches from now on come after the end of a copy.
    fn after(&self, end: Moment) -> Result<()> {
        match &*self.0 {
            Device::Driver(device) => device.after(end),
            Device::Emulator(device) => device.after(end),
            Device::Counter(_) => Ok(()),
        }
    }
}

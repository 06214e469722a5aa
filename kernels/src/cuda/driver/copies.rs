//! The second stream: copies between the device and page-locked memory, beside what is launched.

use super::super::offload::Moment;
use super::{Driver, Error, Result, failed};
use cudarc::driver::{DriverError, result, sys};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

const WAIT: sys::CUevent_wait_flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;

pub(super) struct Copies {
    stream: sys::CUstream,
    /// Recorded among the launches where a copy may begin: who waits for an event waits for what it marks at the
    /// time of the call, so one is enough.
    begin: sys::CUevent,
    /// Events that mark nothing now.
    events: Vec<sys::CUevent>,
}

fn event() -> Result<sys::CUevent> {
    result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
        .map_err(|e| failed("event", e))
}

impl Copies {
    pub fn new() -> Result<Self> {
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|e| failed("stream", e))?;
        Ok(Self { stream, begin: event()?, events: Vec::new() })
    }

    fn synchronize(&self) -> std::result::Result<(), DriverError> {
        // SAFETY: a stream that lives as long as self.
        unsafe { result::stream::synchronize(self.stream) }
    }

    /// # Safety
    /// Nothing is told any more, and the context is the current one.
    pub unsafe fn destroy(&mut self) {
        let _ = self.synchronize();
        // SAFETY: as the caller says.
        unsafe {
            for event in self.events.drain(..).chain([self.begin]) {
                let _ = result::event::destroy(event);
            }
            let _ = result::stream::destroy(self.stream);
        }
    }
}

impl Driver {
    /// Page-locked memory, whose address is the same for the device and the program.
    pub fn allocate_pinned(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        self.allocated.fetch_add(1, Ordering::Relaxed);
        // SAFETY: given back by `free_pinned`.
        let memory = unsafe { result::malloc_host(bytes.max(1), 0) }.map_err(|e| match e.0 {
            sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory(format!(
                "the machine has no {bytes} bytes of memory left that can be page-locked"
            )),
            _ => failed(&format!("{bytes} bytes of page-locked memory"), e),
        })?;
        Ok(memory.expose_provenance() as u64)
    }

    /// Waits for all copies first.
    pub fn free_pinned(&self, address: u64) {
        let copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        if self.enter().is_ok() && copies.synchronize().is_ok() {
            // SAFETY: came from `allocate_pinned`, and nothing is copied any more.
            let _ = unsafe { result::free_host(super::super::here(address).cast()) };
        }
    }

    /// Copies when all launches so far are done.
    pub fn copy_beside(&self, from: u64, to: u64, bytes: usize) -> Result<Moment> {
        self.enter()?;
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        let end = match copies.events.pop() {
            Some(event) => event,
            None => event()?,
        };
        let tell = || {
            // SAFETY: both have `bytes`, as the caller checked, and stay until launches that wait for `end` have;
            // streams and events exist.
            unsafe {
                result::event::record(copies.begin, self.stream)?;
                result::stream::wait_event(copies.stream, copies.begin, WAIT)?;
                if bytes > 0 {
                    sys::cuMemcpyAsync(to, from, bytes, copies.stream).result()?;
                }
                result::event::record(end, copies.stream)
            }
        };
        match tell() {
            Ok(()) => Ok(Moment(end.expose_provenance() as u64)),
            Err(e) => {
                copies.events.push(end);
                Err(failed("a copy beside launches", e))
            }
        }
    }

    /// Launches from now on come after the end of a copy.
    pub fn after(&self, Moment(end): Moment) -> Result<()> {
        self.enter()?;
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        let end: sys::CUevent = std::ptr::with_exposed_provenance_mut(end as usize);
        // SAFETY: recorded by `copy_beside`.
        let told = unsafe { result::stream::wait_event(self.stream, end, WAIT) };
        copies.events.push(end);
        told.map_err(|e| failed("waiting for a copy", e))
    }
}

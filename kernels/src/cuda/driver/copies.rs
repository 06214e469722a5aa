//! Copies among the launches, and in a second stream beside them.

use super::super::offload::Moment;
use super::{Driver, Error, Result, Uploads, failed};
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
    pub fn upload(&self, from: &[u8], to: u64) -> Result<()> {
        self.enter()?;
        let mut uploads = self.uploads.lock().unwrap_or_else(PoisonError::into_inner);
        let Uploads { ring, events } = &mut *uploads;
        let mut to = to;
        for piece in from.chunks(ring.stretch()) {
            let (taken, marks) = ring.take(piece.len());
            let before = events.len();
            events.extend(marks.map(|(_, event)| event));
            if let Some(&event) = events[before..].last() {
                // SAFETY: an event that was recorded.
                unsafe { result::event::synchronize(event) }
                    .map_err(|e| failed("a kernel before this upload", e))?;
            }
            let memory = ring.write(&taken, piece);
            let event = match events.pop() {
                Some(event) => event,
                None => result::event::create(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING)
                    .map_err(|e| failed("event", e))?,
            };
            // SAFETY: `to` has room, as the caller checked, and the stretch of the ring stays as it is until the
            // event has come.
            unsafe {
                let numbers = std::slice::from_raw_parts(memory, piece.len());
                let told = result::memcpy_htod_async(to, numbers, self.stream)
                    .and_then(|()| result::event::record(event, self.stream));
                told.map_err(|e| failed("upload", e))?;
            }
            ring.mark(taken, event);
            to += piece.len() as u64;
        }
        Ok(())
    }

    pub fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: as above; `to` is not touched any more once the stream is through.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream) }
            .map_err(|e| failed("download", e))?;
        self.synchronize()
    }

    pub fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: both have `bytes`, as the caller checked.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }
            .map_err(|e| failed("copy", e))
    }

    pub fn zero(&self, to: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: `to` has `bytes`.
        unsafe { result::memset_d8_async(to, 0, bytes, self.stream) }.map_err(|e| failed("zero", e))
    }

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

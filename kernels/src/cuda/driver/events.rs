//! How long launches take, by the device's own clock.

use super::{Driver, Error, Result, failed};
use cudarc::driver::{result::event, sys};

/// `cuEventElapsedTime_v2` is in drivers of CUDA 12.8 and newer.
const TELLS_TIME: i32 = 12_080;

struct Event(sys::CUevent);

impl Event {
    fn new() -> Result<Self> {
        event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
            .map(Self)
            .map_err(|e| failed("event", e))
    }

    fn record(&self, stream: sys::CUstream) -> Result<()> {
        // SAFETY: an event that exists, in the stream's context, which is the current one.
        unsafe { event::record(self.0, stream) }.map_err(|e| failed("event", e))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created above and not used any more.
        let _ = unsafe { event::destroy(self.0) };
    }
}

impl Driver {
    /// Milliseconds from the start to the end of what `work` launches, when it is done.
    pub fn timed(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        if self.driver_version < TELLS_TIME {
            return Err(Error::Missing("times need a driver of CUDA 12.8 or newer".into()));
        }
        self.enter()?;
        let (start, end) = (Event::new()?, Event::new()?);
        start.record(self.stream)?;
        work()?;
        end.record(self.stream)?;
        self.synchronize()?;
        // SAFETY: both were recorded in the same stream and are done.
        let milliseconds = unsafe { event::elapsed(start.0, end.0) };
        milliseconds.map(f64::from).map_err(|e| failed("event", e))
    }
}

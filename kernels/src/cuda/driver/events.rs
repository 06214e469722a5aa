//! Moments on the device: how long launches take, by its own clock, and when what it sends has come.

use super::{Driver, Error, Result, Traced, failed};
use cudarc::driver::result::{self, event};
use cudarc::driver::sys;
use std::sync::PoisonError;

/// `cuEventElapsedTime_v2` is in drivers of CUDA 12.8 and newer.
const TELLS_TIME: i32 = 12_080;

pub(in crate::cuda) struct Event(sys::CUevent);

// SAFETY: a handle of the driver's, which any thread may use.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    fn new(flags: sys::CUevent_flags) -> Result<Self> {
        event::create(flags).map(Self).map_err(|e| failed("event", e))
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
        self.enter()?;
        let start = self.moment()?;
        work()?;
        let end = self.moment()?;
        self.synchronize()?;
        Self::between(&start, &end)
    }

    /// Name and milliseconds of every launch of `work`, in their order, when all are done.
    pub fn traced(&self, work: impl FnOnce() -> Result<()>) -> Result<Vec<(&'static str, f64)>> {
        self.enter()?;
        let set = |list| {
            let mut traced = self.traced.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *traced, list)
        };
        set(Some(Vec::new()));
        let done = work();
        let launches = set(None).unwrap_or_default();
        done?;
        self.synchronize()?;
        let time = |(name, [start, end]): &Traced| Ok((*name, Self::between(start, end)?));
        launches.iter().map(time).collect()
    }

    /// Notes the moments before and after a launch, where they are asked for.
    pub(super) fn trace(
        &self,
        name: &'static str,
        launch: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut traced = self.traced.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(list) = &mut *traced else {
            drop(traced);
            return launch();
        };
        let start = self.moment()?;
        launch()?;
        list.push((name, [start, self.moment()?]));
        Ok(())
    }

    /// When the stream comes to where it is now.
    fn moment(&self) -> Result<Event> {
        if self.driver_version < TELLS_TIME {
            return Err(Error::Missing("times need a driver of CUDA 12.8 or newer".into()));
        }
        let moment = Event::new(sys::CUevent_flags::CU_EVENT_DEFAULT)?;
        moment.record(self.stream)?;
        Ok(moment)
    }

    /// Milliseconds between two moments that are over.
    fn between(start: &Event, end: &Event) -> Result<f64> {
        // SAFETY: both were recorded in the same stream and are done.
        let milliseconds = unsafe { event::elapsed(start.0, end.0) };
        milliseconds.map(f64::from).map_err(|e| failed("event", e))
    }

    /// Tells the device to copy `bytes` to page-locked memory; the event comes when it has.
    pub fn send(&self, from: u64, to: *mut u8, bytes: usize) -> Result<Event> {
        self.enter()?;
        let sent = Event::new(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        // SAFETY: both have so many bytes, and those of the program are nobody else's until the event has come.
        unsafe {
            let to = std::slice::from_raw_parts_mut(to, bytes);
            result::memcpy_dtoh_async(to, from, self.stream).map_err(|e| failed("download", e))?;
        }
        sent.record(self.stream)?;
        Ok(sent)
    }

    /// Returns when an event has come.
    pub fn wait_for(&self, event: &Event) -> Result<()> {
        self.enter()?;
        // SAFETY: an event that was recorded.
        unsafe { event::synchronize(event.0) }
            .map_err(|e| failed("a kernel before this download", e))
    }
}

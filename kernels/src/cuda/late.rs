//! What the emulated device is told to do: at once, or, to prove that nothing relies on that, put off until it is
//! waited for. Copies beside launches stand in a queue of their own, and are done as late as they may, when launches
//! wait for them, or as early as they may, when the launches are done that they wait for.

use super::emulator::{Checked, Emulator};
use super::offload::{Moment, Stream};
use super::{Device, Error, Gpu, Result, here};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One thing to do. Addresses are of this process, as the emulated device's are.
pub(super) enum Task {
    Launch(Box<Checked>),
    Copy {
        from: *const u8,
        to: *mut u8,
        bytes: usize,
    },
    /// The same beside launches, between buffers.
    CopyBeside {
        from: u64,
        to: u64,
        bytes: usize,
    },
    Zero {
        to: *mut u8,
        bytes: usize,
    },
    Free(u64),
    /// Nothing, once so many tasks of the stream are done.
    Await(Stream, u64),
}

// SAFETY: addresses that stay valid until the task is done; what overlaps is ordered by the queues.
unsafe impl Send for Task {}

/// Tasks that are put off.
pub(super) struct Late {
    queues: Mutex<Queues>,
    early_copies: bool,
}

#[derive(Default)]
struct Queues {
    launches: Queue,
    copies: Queue,
    /// As on a GPU, the first failure is every later wait's.
    failed: Option<Error>,
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    /// Tasks that are done, or dropped after a failure.
    done: u64,
}

impl Late {
    pub fn new(early_copies: bool) -> Self {
        Self { queues: Mutex::default(), early_copies }
    }

    /// Puts a task off. Gives the number of tasks told so far.
    fn tell(&self, device: &Emulator, stream: Stream, task: Task) -> u64 {
        let mut queues = self.queues();
        queues.of(stream).tasks.push_back(task);
        let told = queues.told(stream);
        if self.early_copies {
            queues.do_copies(device);
        }
        told
    }

    /// Does tasks until so many of a stream are done.
    fn wait(&self, device: &Emulator, stream: Stream, done: u64) -> Result<()> {
        let mut queues = self.queues();
        queues.advance(device, stream, done, self.early_copies);
        queues.failed.clone().map_or(Ok(()), Err)
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queues {
    fn of(&mut self, stream: Stream) -> &mut Queue {
        match stream {
            Stream::Launches => &mut self.launches,
            Stream::Copies => &mut self.copies,
        }
    }

    fn told(&mut self, stream: Stream) -> u64 {
        let queue = self.of(stream);
        queue.done + queue.tasks.len() as u64
    }

    fn advance(&mut self, device: &Emulator, stream: Stream, done: u64, early_copies: bool) {
        while self.of(stream).done < done {
            match self.waits_for(stream) {
                Some((other, done)) => self.advance(device, other, done, early_copies),
                None if self.of(stream).tasks.is_empty() => break,
                None => self.do_next(device, stream),
            }
            if early_copies && stream == Stream::Launches {
                self.do_copies(device);
            }
        }
    }

    /// All copies that wait for nothing.
    fn do_copies(&mut self, device: &Emulator) {
        while !self.copies.tasks.is_empty() && self.waits_for(Stream::Copies).is_none() {
            self.do_next(device, Stream::Copies);
        }
    }

    /// The tasks of the other stream that a stream's next waits for.
    fn waits_for(&mut self, stream: Stream) -> Option<(Stream, u64)> {
        let Some(&Task::Await(other, done)) = self.of(stream).tasks.front() else { return None };
        (self.of(other).done < done).then_some((other, done))
    }

    fn do_next(&mut self, device: &Emulator, stream: Stream) {
        let queue = self.of(stream);
        let Some(task) = queue.tasks.pop_front() else { return };
        queue.done += 1;
        let free = matches!(task, Task::Free(_));
        if (free || self.failed.is_none())
            && let Err(error) = device.perform(task)
        {
            self.failed = Some(error);
        }
    }
}

impl Gpu {
    /// The emulated device, which puts every launch and every copy off until it is waited for: what relies on
    /// something that it has not waited for gets wrong numbers. Copies beside launches come as late as they may.
    ///
    /// # Errors
    /// As [`Gpu::emulated`].
    pub fn emulated_late(seed: u64) -> Result<Self> {
        Self::emulated_in_streams(seed, false)
    }

    /// The same with copies beside launches as early as they may.
    ///
    /// # Errors
    /// As [`Gpu::emulated`].
    pub fn emulated_with_early_copies(seed: u64) -> Result<Self> {
        Self::emulated_in_streams(seed, true)
    }

    fn emulated_in_streams(seed: u64, early_copies: bool) -> Result<Self> {
        let mut emulator = Emulator::new(seed, false)?;
        emulator.late = Some(Late::new(early_copies));
        Ok(Self(Arc::new(Device::Emulator(emulator))))
    }

    /// [`Gpu::emulated_late`], or with early copies, where once a stream does not wait for the other as it is told.
    #[cfg(test)]
    pub(super) fn emulated_without_order(early_copies: bool, forgotten: usize) -> Result<Self> {
        let mut emulator = Emulator::new(1, false)?;
        emulator.late = Some(Late::new(early_copies));
        emulator.forgotten = Some(forgotten);
        Ok(Self(Arc::new(Device::Emulator(emulator))))
    }
}

impl Emulator {
    /// Does a task, or puts it off. Gives what [`Self::wait_for`] takes.
    pub fn tell(&self, task: Task) -> Result<u64> {
        self.tell_in(Stream::Launches, task)
    }

    fn tell_in(&self, stream: Stream, task: Task) -> Result<u64> {
        match &self.late {
            Some(late) => Ok(late.tell(self, stream, task)),
            None => self.perform(task).map(|()| 0),
        }
    }

    fn perform(&self, task: Task) -> Result<()> {
        match task {
            Task::Launch(launch) => return self.run(&launch),
            // SAFETY: whoever told it made sure that both have the bytes, and do not overlap.
            Task::Copy { from, to, bytes } => unsafe {
                std::ptr::copy_nonoverlapping(from, to, bytes);
            },
            Task::CopyBeside { from, to, bytes } => return self.copy_between(from, to, bytes),
            // SAFETY: as above.
            Task::Zero { to, bytes } => unsafe { to.write_bytes(0, bytes) },
            Task::Free(address) => self.release(address),
            Task::Await(..) => {}
        }
        Ok(())
    }

    /// Neither buffer may have been given back, or lie where one does that is given back by what was told before.
    fn copy_between(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        let allocations = self.allocations();
        let failed = |what: &str| Err(Error::Failed(format!("a copy beside launches: {what}")));
        for address in [from, to] {
            let Some(buffer) = allocations.get(&address).filter(|a| bytes <= a.memory.len()) else {
                return failed("its buffer has been given back");
            };
            let Some((spot, number)) = buffer.spot else { continue };
            let before = |(other, earlier): (_, usize)| earlier < number && spot.overlaps(&other);
            if allocations.values().filter_map(|a| a.spot).any(before) {
                return failed("its buffer's memory is still in use as another's");
            }
        }
        // SAFETY: both have the bytes, as was just seen, and two buffers do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(here(from), here(to), bytes) };
        Ok(())
    }

    /// Returns when so many tasks are done.
    pub fn wait_for(&self, tasks: u64) -> Result<()> {
        match &self.late {
            Some(late) => late.wait(self, Stream::Launches, tasks),
            None => Ok(()),
        }
    }

    pub fn synchronize(&self) -> Result<()> {
        self.waits.fetch_add(1, Ordering::Relaxed);
        self.wait_for(u64::MAX)
    }

    /// Times that everything was waited for.
    pub fn waits(&self) -> usize {
        self.waits.load(Ordering::Relaxed)
    }

    /// The numbers may change once the call has returned: they wait in a ring.
    pub fn upload(&self, from: &[u8], to: u64) -> Result<()> {
        let mut ring = self.uploads.lock().unwrap_or_else(PoisonError::into_inner);
        let mut to = here(to);
        for piece in from.chunks(ring.stretch()) {
            let (taken, mut marks) = ring.take(piece.len());
            if let Some((_, mark)) = marks.next_back() {
                self.wait_for(mark)?;
            }
            drop(marks);
            let from = ring.write(&taken, piece);
            let mark = self.tell(Task::Copy { from, to, bytes: piece.len() })?;
            ring.mark(taken, mark);
            // SAFETY: within the slice that is uploaded to, or at its end.
            to = unsafe { to.add(piece.len()) };
        }
        Ok(())
    }

    pub fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.tell(Task::Copy { from: here(from), to: to.as_mut_ptr(), bytes: to.len() })?;
        self.synchronize()
    }

    /// Gives what [`Self::wait_for`] takes.
    pub fn send(&self, from: u64, to: *mut u8, bytes: usize) -> Result<u64> {
        self.tell(Task::Copy { from: here(from), to, bytes })
    }

    pub fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.tell(Task::Copy { from: here(from), to: here(to), bytes }).map(drop)
    }

    pub fn zero(&self, to: u64, bytes: usize) -> Result<()> {
        self.tell(Task::Zero { to: here(to), bytes }).map(drop)
    }

    pub fn free(&self, address: u64) {
        // Freeing does not fail.
        let _ = self.tell(Task::Free(address));
    }

    /// Of memory that only copies beside launches use.
    pub fn free_pinned(&self, address: u64) {
        let _ = self.tell_in(Stream::Copies, Task::Free(address));
    }

    /// Copies when all launches so far are done.
    pub fn copy_beside(&self, from: u64, to: u64, bytes: usize) -> Result<Moment> {
        self.order(Stream::Copies, Stream::Launches, u64::MAX)?;
        self.tell_in(Stream::Copies, Task::CopyBeside { from, to, bytes }).map(Moment)
    }

    /// Launches from now on come after the end of a copy.
    pub fn after(&self, Moment(end): Moment) -> Result<()> {
        self.order(Stream::Launches, Stream::Copies, end)
    }

    /// A stream goes on when so many of the tasks of another, as far as they have been told, are done.
    fn order(&self, stream: Stream, other: Stream, done: u64) -> Result<()> {
        #[cfg(test)]
        if self.forgotten == Some(self.orders.fetch_add(1, Ordering::Relaxed)) {
            return Ok(());
        }
        let Some(late) = &self.late else { return Ok(()) };
        let done = done.min(late.queues().told(other));
        late.tell(self, stream, Task::Await(other, done));
        Ok(())
    }
}

//! What the emulated device is told to do: at once, or, to prove that nothing relies on that, put off until it is
//! waited for.

use super::emulator::{Checked, Emulator};
use super::{Error, Result, here};
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// One thing to do. Addresses are of this process, as the emulated device's are.
pub(super) enum Task {
    Launch(Box<Checked>),
    Copy { from: *const u8, to: *mut u8, bytes: usize },
    Zero { to: *mut u8, bytes: usize },
    Free(u64),
}

// SAFETY: addresses that stay valid until the task is done; what overlaps is ordered by the queue.
unsafe impl Send for Task {}

/// Tasks that are put off.
#[derive(Default)]
pub(super) struct Late(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    /// Tasks that are done, or dropped after a failure.
    done: u64,
    /// As on a GPU, the first failure is every later wait's.
    failed: Option<Error>,
}

impl Late {
    /// Puts a task off. Gives the number of tasks told so far.
    pub fn tell(&self, task: Task) -> u64 {
        let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        queue.tasks.push_back(task);
        queue.done + queue.tasks.len() as u64
    }

    /// Does tasks until so many are done.
    pub fn wait(&self, device: &Emulator, done: u64) -> Result<()> {
        let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while queue.done < done
            && let Some(task) = queue.tasks.pop_front()
        {
            queue.done += 1;
            let free = matches!(task, Task::Free(_));
            if (free || queue.failed.is_none())
                && let Err(error) = device.perform(task)
            {
                queue.failed = Some(error);
            }
        }
        queue.failed.clone().map_or(Ok(()), Err)
    }
}

impl Emulator {
    /// Does a task, or puts it off. Gives what [`Self::wait_for`] takes.
    pub fn tell(&self, task: Task) -> Result<u64> {
        match &self.late {
            Some(late) => Ok(late.tell(task)),
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
            // SAFETY: as above.
            Task::Zero { to, bytes } => unsafe { to.write_bytes(0, bytes) },
            Task::Free(address) => self.release(address),
        }
        Ok(())
    }

    /// Returns when so many tasks are done.
    pub fn wait_for(&self, tasks: u64) -> Result<()> {
        match &self.late {
            Some(late) => late.wait(self, tasks),
            None => Ok(()),
        }
    }

    pub fn synchronize(&self) -> Result<()> {
        self.wait_for(u64::MAX)
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
}

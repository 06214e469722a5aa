//! Reusable memory for activations: after the first step of a run nothing is allocated or zeroed any
//! more, as long as batches don't grow.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

/// Buffers that nobody uses at the moment.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    /// Sorted by length.
    free: Arc<Mutex<Vec<Vec<f32>>>>,
}

/// Memory of a [`Pool`], which takes it back on drop.
#[derive(Debug)]
pub struct Buffer {
    /// At least `len` elements.
    data: Vec<f32>,
    len: usize,
    pool: Pool,
}

impl Pool {
    /// `len` elements with anything in them: every op overwrites its outputs.
    ///
    /// The smallest free buffer that is large enough, unless it would be wasted on so few elements.
    /// Otherwise a new one, which replaces a free one that is a little too small, so that growing
    /// batches don't leave a trail of buffers behind.
    pub fn take(&self, len: usize) -> Buffer {
        let mut free = self.free.lock().expect("no panic while the lock is held");
        let fitting = free.partition_point(|buffer| buffer.len() < len);
        let reused = match free.get(fitting) {
            Some(buffer) if buffer.len() <= 2 * len => Some(free.remove(fitting)),
            _ => {
                if fitting > 0 && free[fitting - 1].len() >= len / 2 {
                    free.remove(fitting - 1);
                }
                None
            }
        };
        drop(free);
        let mut data = reused.unwrap_or_else(|| vec![0.0; len]);
        if cfg!(debug_assertions) {
            data.fill(f32::NAN);
        }
        Buffer { data, len, pool: self.clone() }
    }

    /// As [`Self::take`], filled with zeros.
    pub fn zeros(&self, len: usize) -> Buffer {
        let mut buffer = self.take(len);
        buffer.fill(0.0);
        buffer
    }

    /// A copy of `from`.
    pub fn copy(&self, from: &[f32]) -> Buffer {
        let mut buffer = self.take(from.len());
        buffer.copy_from_slice(from);
        buffer
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        if let Ok(mut free) = self.pool.free.lock() {
            let at = free.partition_point(|buffer| buffer.len() < data.len());
            free.insert(at, data);
        }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.data[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free(pool: &Pool) -> Vec<usize> {
        pool.free.lock().unwrap().iter().map(Vec::len).collect()
    }

    #[test]
    fn memory_comes_back_and_is_used_again() {
        let pool = Pool::default();
        let (a, b) = (pool.take(100), pool.zeros(10));
        assert_eq!((a.len(), b.len()), (100, 10));
        assert!(b.iter().all(|x| *x == 0.0));
        drop((a, b));
        assert_eq!(free(&pool), [10, 100]);
        let smaller = pool.copy(&[1.0; 60]);
        assert_eq!(free(&pool), [10], "60 of 100 elements are in use");
        assert_eq!(*smaller, [1.0; 60]);
        drop(smaller);
        assert_eq!(free(&pool), [10, 100]);
    }

    #[test]
    fn growing_requests_replace_what_became_too_small() {
        let pool = Pool::default();
        drop(pool.take(100));
        drop(pool.take(150));
        assert_eq!(free(&pool), [150]);
        drop(pool.take(7));
        assert_eq!(free(&pool), [7, 150], "a large buffer is not wasted on a small request");
    }
}

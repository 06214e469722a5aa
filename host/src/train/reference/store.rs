//! The file of a reference's log-probs.
//!
//! ```text
//! file     magic [8], hash of the reference [32], records
//! record   hash of the row [16], count u32, log-probs f32 [count], hash of all that [8]
//! ```
//!
//! Records are appended under the file's lock. One that is not whole (its writer was killed) is cut
//! off by whoever comes next, and one that does not have its hash where it is looked for is not used.

use super::bytes;
use crate::{Error, Result};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"uftlogp1";
/// Bytes before the first record.
pub const HEADER: u64 = 8 + 32;

/// The hash of a row.
pub type Key = [u8; 16];

/// A file of records.
pub struct Store {
    pub path: PathBuf,
    file: File,
    hash: [u8; 32],
    /// Of every known row: where its record begins, and how many log-probs it has.
    pub places: HashMap<Key, (u64, u32)>,
    /// Up to here the file's records are in `places`.
    end: u64,
}

type Io<T> = std::io::Result<T>;

impl Store {
    /// Opens or makes the file, and reads which rows it has.
    pub fn open(path: &Path, hash: &[u8; 32]) -> Io<Self> {
        let file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        let (path, places) = (path.to_owned(), HashMap::new());
        let mut store = Self { path, file, hash: *hash, places, end: 0 };
        store.locked(Self::catch_up)?;
        Ok(store)
    }

    /// Does something while no other run appends.
    fn locked<T>(&mut self, work: impl FnOnce(&mut Self) -> Io<T>) -> Io<T> {
        self.file.lock()?;
        let done = work(self);
        self.file.unlock()?;
        done
    }

    /// Takes in what the file has beyond `end`, and cuts off what is no whole record.
    fn catch_up(&mut self) -> Io<()> {
        let len = self.file.metadata()?.len();
        if len == self.end && len > 0 {
            return Ok(());
        }
        if len < self.end || self.end == 0 {
            // New to this run, or another one began it anew.
            self.places.clear();
            self.begin(len)?;
        }
        let len = self.file.metadata()?.len();
        let mut reader = BufReader::with_capacity(1 << 20, &self.file);
        reader.seek(SeekFrom::Start(self.end))?;
        while let Some((key, count)) = read_record(&mut reader, len - self.end)? {
            self.places.insert(key, (self.end, count));
            self.end += record_len(count);
        }
        if self.end < len {
            log::warn!(
                "{}: {} bytes at its end are no whole record, and are cut off",
                self.path.display(),
                len - self.end
            );
            self.file.set_len(self.end)?;
        }
        Ok(())
    }

    /// Checks the header of a file of `len` bytes; a file without one gets it.
    fn begin(&mut self, len: u64) -> Io<()> {
        let header = [&MAGIC[..], &self.hash].concat();
        let mut found = vec![0; header.len()];
        if len < HEADER || self.file.read_exact_at(&mut found, 0).is_err() || found != header {
            if len > 0 {
                log::warn!("{}: damaged; its rows are computed anew", self.path.display());
                self.file.set_len(0)?;
            }
            (&self.file).write_all(&header)?;
        }
        self.end = HEADER;
        Ok(())
    }

    pub fn get(&self, key: &Key) -> Result<Option<Box<[f32]>>> {
        let Some((at, count)) = self.places.get(key) else { return Ok(None) };
        let mut record = vec![0; record_len(*count) as usize];
        match self.file.read_exact_at(&mut record, *at) {
            Ok(()) => {}
            // Another run cut it off.
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(e) => {
                let path = self.path.display();
                return Err(Error::other(format!("{path}: cannot be read: {e}")));
            }
        }
        let (content, expected) = record.split_at(record.len() - 8);
        if content[..16] != *key || check(content) != *expected {
            return Ok(None);
        }
        let values = content[20..].as_chunks::<4>().0;
        Ok(Some(values.iter().map(|b| f32::from_le_bytes(*b)).collect()))
    }

    pub fn append<'r>(&mut self, rows: impl Iterator<Item = (Key, &'r [f32])>) -> Result<()> {
        let (mut records, mut added) = (Vec::new(), Vec::new());
        for (key, logps) in rows {
            let start = records.len();
            records.extend_from_slice(&key);
            records.extend_from_slice(&(logps.len() as u32).to_le_bytes());
            records.extend_from_slice(&bytes(logps));
            let check = check(&records[start..]);
            records.extend_from_slice(&check);
            added.push((key, start as u64, logps.len() as u32));
        }
        let written = self.locked(|store| {
            store.catch_up()?;
            (&store.file).write_all(&records).inspect_err(|_| {
                // What was written of it is cut off now, or by whoever comes next.
                let _ = store.file.set_len(store.end);
            })
        });
        written.map_err(|e| {
            Error::other(format!(
                "{}: cannot be written: {e}; [train] reference_cache can name another directory",
                self.path.display()
            ))
        })?;
        let places = added.into_iter().map(|(key, start, count)| (key, (self.end + start, count)));
        self.places.extend(places);
        self.end += records.len() as u64;
        Ok(())
    }

    /// Another run that reads the old file goes on with it.
    pub fn start_anew(&mut self) -> Result<()> {
        let removed = match std::fs::remove_file(&self.path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        };
        *self = removed.and_then(|()| Self::open(&self.path, &self.hash)).map_err(|e| {
            Error::other(format!("{}: cannot be made anew: {e}", self.path.display()))
        })?;
        Ok(())
    }
}

/// Bytes of a record with `count` log-probs.
pub fn record_len(count: u32) -> u64 {
    16 + 4 + 4 * u64::from(count) + 8
}

fn check(record: &[u8]) -> [u8; 8] {
    blake3::hash(record).as_bytes()[..8].try_into().expect("a hash has 32 bytes")
}

/// The next record's key and count; none if there is no whole one in the `left` bytes.
fn read_record(reader: &mut impl Read, left: u64) -> Io<Option<(Key, u32)>> {
    if left < record_len(0) {
        return Ok(None);
    }
    let mut bytes = vec![0; 20];
    reader.read_exact(&mut bytes)?;
    let count = u32::from_le_bytes([bytes[16], bytes[17], bytes[18], bytes[19]]);
    if record_len(count) > left {
        return Ok(None);
    }
    bytes.resize(20 + 4 * count as usize, 0);
    reader.read_exact(&mut bytes[20..])?;
    let mut expected = [0; 8];
    reader.read_exact(&mut expected)?;
    let key = bytes[..16].try_into().expect("sixteen bytes");
    Ok((check(&bytes) == expected).then_some((key, count)))
}

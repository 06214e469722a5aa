//! Reference log-probs, computed once: kept in a file that all runs, stages and epochs share.
//!
//! A file belongs to one reference, by a hash of everything that decides its numbers: the model's
//! files, the adapter that the reference has (none for the base model), and the bits that this
//! program on this machine gives for a text made up. Within it a row is found by a hash of its token
//! ids and of which of them are trained; the template is in the token ids. Numbers do not depend on
//! what a row is packed with, so a row read back has the bits that it would be computed with.
//!
//! ```text
//! file     magic [8], hash of the reference [32], records
//! record   hash of the row [16], count u32, log-probs f32 [count], hash of all that [8]
//! ```
//!
//! Records are appended under the file's lock. One that is not whole (its writer was killed) is cut
//! off by whoever comes next, and one that does not have its hash where it is looked for is not used.

use super::identity::Identity;
use super::setup::Run;
use crate::config::Gain;
use crate::config::schema::Config;
use crate::data::Source;
use crate::group::{Branch, Group, Segment};
use crate::model::{Adapter, Lora, Model, Packed, files};
use crate::{Error, Result};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use uft_core::Feedback;

const MAGIC: &[u8; 8] = b"uftlogp1";
const HEADER: u64 = 8 + 32;
/// Known rows that are computed again when a stage starts.
const SAMPLE: usize = 3;

type Key = [u8; 16];

/// Where a run keeps what it knows of its references.
pub struct Cache {
    place: Place,
    /// Of the model and of what this program makes of it.
    model: blake3::Hasher,
}

enum Place {
    Nowhere,
    /// For this run only.
    Memory,
    Directory {
        /// Of the base model's files.
        shared: PathBuf,
        /// Of other references': only this run meets them again.
        own: PathBuf,
        /// Whether the configuration names `shared`, so that failing is an error.
        configured: bool,
    },
}

impl Cache {
    /// The directory of the configuration, or the user's cache directory.
    ///
    /// # Errors
    /// If the configured one cannot be made, or a signal arrives. Without the user's, log-probs are kept for
    /// this run only, which is said.
    pub fn of(run: &Run, identity: &Identity) -> Result<Self> {
        let place = match run.sources.iter().any(Source::needs_reference) {
            true => Place::of(&run.config)?,
            false => Place::Memory,
        };
        let mut model = blake3::Hasher::new();
        if matches!(place, Place::Directory { .. }) {
            for (name, hash) in &identity.model {
                model.update(name.as_bytes()).update(b" ").update(hash.as_bytes()).update(b"\n");
            }
            let fingerprint = run.model.logps(&Packed::new(&[&made_up(&run.model)]), None)?;
            model.update(&bytes(&fingerprint));
        }
        Ok(Self { place, model })
    }

    /// What is known of a reference: the base model, or the base model with an adapter.
    ///
    /// # Errors
    /// If its file cannot be read or written.
    pub fn open(&self, adapter: Option<&Lora>) -> Result<ReferenceLogps> {
        let (shared, own, configured) = match &self.place {
            Place::Nowhere => return Ok(ReferenceLogps::nowhere()),
            Place::Memory => return Ok(ReferenceLogps::in_memory()),
            Place::Directory { shared, own, configured } => (shared, own, *configured),
        };
        let mut hasher = self.model.clone();
        // An adapter that adds nothing gives the base model's bits.
        let adds = |lora: &&Lora| lora.adapters.iter().any(|a| a.b.iter().any(|b| *b != 0.0));
        let adapter = adapter.filter(adds);
        for Adapter { name, scale, a, b, .. } in adapter.into_iter().flat_map(|l| &l.adapters) {
            hasher.update(name.as_bytes()).update(&scale.to_le_bytes());
            hasher.update(&bytes(a)).update(&bytes(b));
        }
        let hash = *hasher.finalize().as_bytes();
        let name = blake3::Hash::from_bytes(hash).to_hex();
        let dir = if adapter.is_some() { own } else { shared };
        let known = files::create_dir(dir).and_then(|()| {
            ReferenceLogps::open(&dir.join(format!("{}.logps", &name[..32])), &hash)
        });
        match known {
            Ok(known) => Ok(ReferenceLogps { configured, ..known }),
            Err(why) if !configured => Ok(for_this_run_only(&why)),
            Err(why) => Err(why),
        }
    }
}

impl Place {
    fn of(config: &Config) -> Result<Self> {
        let without = &config.train.without;
        if without.contains(&Gain::ReferenceCache) {
            return Ok(Self::Nowhere);
        }
        if !without.is_empty() {
            // Without a gain, the last bits may be others.
            return Ok(Self::Memory);
        }
        let own = Path::new(&config.train.output).join("reference");
        if let Some(dir) = &config.train.reference_cache {
            let shared = PathBuf::from(dir);
            files::create_dir(&shared).map_err(|e| e.at("[train] reference_cache"))?;
            return Ok(Self::Directory { shared, own, configured: true });
        }
        match user_cache() {
            Some(shared) => Ok(Self::Directory { shared, own, configured: false }),
            None => {
                for_this_run_only(&Error::other("neither XDG_CACHE_HOME nor HOME is set"));
                Ok(Self::Memory)
            }
        }
    }
}

/// `uft/reference` in the user's cache directory.
fn user_cache() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(cache.join("uft/reference"))
}

fn for_this_run_only(why: &Error) -> ReferenceLogps {
    log::warn!("reference log-probs are kept for this run only: {why}");
    ReferenceLogps::in_memory()
}

/// A text of token ids all over the vocabulary, whose log-probs tell one arithmetic from another.
fn made_up(model: &Model) -> Group {
    let ids =
        |count: u32| (0..count).map(|i| i.wrapping_mul(2_654_435_761) % model.config.vocab as u32);
    let segment = Segment { feedback: Feedback::Demonstration, trained: vec![0..64] };
    Group {
        prompt: ids(64).collect(),
        branches: vec![Branch { tokens: ids(128).skip(64).collect(), segments: vec![segment] }],
    }
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The log-probs of one reference, by row.
pub struct ReferenceLogps {
    kept: Kept,
    /// Whether its place was asked for, so that a file that cannot be written is an error.
    configured: bool,
    verified: bool,
}

enum Kept {
    Nothing,
    Memory(HashMap<Key, Box<[f32]>>),
    File(Store),
}

impl ReferenceLogps {
    /// Keeps them as long as it lives.
    pub fn in_memory() -> Self {
        Self { kept: Kept::Memory(HashMap::new()), configured: false, verified: true }
    }

    /// Keeps nothing: every pass computes what it needs.
    pub fn nowhere() -> Self {
        Self { kept: Kept::Nothing, configured: false, verified: true }
    }

    /// What the file of a reference with this hash holds; a file that is not there is made.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn open(path: &Path, hash: &[u8; 32]) -> Result<Self> {
        let store = Store::open(path, hash).map_err(|e| {
            let path = path.display();
            Error::other(format!("{path}: {e}; [train] reference_cache can name another directory"))
        })?;
        Ok(Self { kept: Kept::File(store), configured: true, verified: false })
    }

    /// The log-probs of a group's trained tokens, if they are known.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn get(&self, group: &Group) -> Result<Option<Box<[f32]>>> {
        match &self.kept {
            Kept::Nothing => Ok(None),
            Kept::Memory(known) => Ok(known.get(&key(group)).cloned()),
            Kept::File(store) => store.get(&key(group)),
        }
    }

    /// Keeps the log-probs of some groups.
    ///
    /// # Errors
    /// If they cannot be written where the configuration wants them.
    pub fn insert(&mut self, rows: &[(&Group, &[f32])]) -> Result<()> {
        let keyed = || rows.iter().map(|(group, logps)| (key(group), *logps));
        if let Kept::File(store) = &mut self.kept {
            match store.append(keyed()) {
                Ok(()) => return Ok(()),
                Err(why) if self.configured => return Err(why),
                Err(why) => *self = for_this_run_only(&why),
            }
        }
        if let Kept::Memory(known) = &mut self.kept {
            known.extend(keyed().map(|(key, logps)| (key, Box::from(logps))));
        }
        Ok(())
    }

    /// Computes a sample of the known rows of some sources again, the first time that it is called. Where a
    /// bit differs, nothing of the file is used: it is started anew, with a warning.
    ///
    /// # Errors
    /// If the file cannot be read or written, or a signal arrives.
    pub fn verify(
        &mut self,
        model: &Model,
        adapter: Option<&Lora>,
        sources: &[Source],
    ) -> Result<()> {
        let Kept::File(store) = &mut self.kept else { return Ok(()) };
        if std::mem::replace(&mut self.verified, true) {
            return Ok(());
        }
        let rows = sources.iter().filter(|s| s.needs_reference()).flat_map(|s| &s.train);
        let all: Vec<&Group> = rows.map(|example| &example.group).collect();
        let known: Vec<&Group> =
            all.iter().copied().filter(|g| store.places.contains_key(&key(g))).collect();
        if known.is_empty() {
            return Ok(());
        }
        // Other rows every time.
        let first = std::process::id() as usize % known.len();
        let sample = known.iter().cycle().skip(first).step_by(known.len().div_ceil(SAMPLE));
        for &group in sample.take(SAMPLE) {
            let computed = model.logps(&Packed::new(&[group]), adapter)?;
            if store.get(&key(group))?.is_some_and(|kept| *kept != *computed) {
                log::warn!(
                    "{}: what it holds is not what this model computes; all of it is computed anew",
                    store.path.display()
                );
                return store.start_anew();
            }
        }
        log::info!(
            "reference log-probs of {} of {} rows are known from {}",
            known.len(),
            all.len(),
            store.path.display()
        );
        Ok(())
    }
}

/// The hash of a group's token ids and of which are trained, not of its feedback.
fn key(group: &Group) -> Key {
    let mut hasher = blake3::Hasher::new();
    let mut bytes = Vec::with_capacity(4 * group.rows() + 64);
    let mut number = |n: usize| bytes.extend_from_slice(&(n as u32).to_le_bytes());
    number(group.prompt.len());
    group.prompt.iter().for_each(|id| number(*id as usize));
    for branch in &group.branches {
        number(branch.tokens.len());
        branch.tokens.iter().for_each(|id| number(*id as usize));
        number(branch.segments.len());
        for segment in &branch.segments {
            number(segment.trained.len());
            segment.trained.iter().flat_map(|r| [r.start, r.end]).for_each(&mut number);
        }
    }
    hasher.update(&bytes);
    hasher.finalize().as_bytes()[..16].try_into().expect("a hash has 32 bytes")
}

/// A file of records.
struct Store {
    path: PathBuf,
    file: File,
    hash: [u8; 32],
    /// Of every known row: where its record begins, and how many log-probs it has.
    places: HashMap<Key, (u64, u32)>,
    /// Up to here the file's records are in `places`.
    end: u64,
}

type Io<T> = std::io::Result<T>;

impl Store {
    /// Opens or makes the file, and reads which rows it has.
    fn open(path: &Path, hash: &[u8; 32]) -> Io<Self> {
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

    fn get(&self, key: &Key) -> Result<Option<Box<[f32]>>> {
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

    fn append<'r>(&mut self, rows: impl Iterator<Item = (Key, &'r [f32])>) -> Result<()> {
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
    fn start_anew(&mut self) -> Result<()> {
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
fn record_len(count: u32) -> u64 {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn group(tokens: &[u32]) -> Group {
        let segment = Segment { feedback: Feedback::Demonstration, trained: vec![1..tokens.len()] };
        let branches = vec![Branch { tokens: tokens.to_vec(), segments: vec![segment] }];
        Group { prompt: vec![7], branches }
    }

    fn open(path: &Path) -> ReferenceLogps {
        ReferenceLogps::open(path, &[3; 32]).unwrap()
    }

    fn path(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("uft-logps-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    #[test]
    fn what_is_written_is_read_by_every_later_run() {
        let path = path("written");
        let (a, b, c) = (group(&[1, 2, 3]), group(&[1, 2]), group(&[5, 6]));
        let mut first = open(&path);
        assert_eq!(first.get(&a).unwrap(), None);
        first.insert(&[(&a, &[-1.0, -2.5]), (&b, &[-0.5])]).unwrap();
        // A second run at the same time: it knows what was there when it began, and adds its own.
        let mut second = open(&path);
        second.insert(&[(&c, &[-9.0])]).unwrap();
        first.insert(&[(&c, &[-9.0])]).unwrap();
        for known in [first, second, open(&path)] {
            assert_eq!(known.get(&a).unwrap().as_deref(), Some(&[-1.0, -2.5][..]));
            assert_eq!(known.get(&b).unwrap().as_deref(), Some(&[-0.5][..]));
            assert_eq!(known.get(&c).unwrap().as_deref(), Some(&[-9.0][..]));
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn feedback_is_no_part_of_a_row_but_what_is_trained_is() {
        let (a, mut b, mut c) = (group(&[1, 2, 3]), group(&[1, 2, 3]), group(&[1, 2, 3]));
        b.branches[0].segments[0].feedback = Feedback::Binary(false);
        c.branches[0].segments[0].trained = vec![1..2];
        assert_eq!(key(&a), key(&b));
        assert_ne!(key(&a), key(&c));
    }

    /// A record that another run writes where this one's was is not taken for it.
    #[test]
    fn another_run_may_cut_the_file_under_this_one() {
        let path = path("cut");
        let (a, b, c) = (group(&[1, 2, 3]), group(&[4, 5, 6]), group(&[7, 8, 9]));
        let mut first = open(&path);
        first.insert(&[(&a, &[-1.0, -2.0])]).unwrap();
        first.insert(&[(&b, &[-3.0, -4.0])]).unwrap();
        let half = HEADER + record_len(2) + 9;
        OpenOptions::new().write(true).open(&path).unwrap().set_len(half).unwrap();
        assert_eq!(first.get(&b).unwrap(), None, "cut off");
        open(&path).insert(&[(&c, &[-5.0, -6.0])]).unwrap();
        assert_eq!(first.get(&b).unwrap(), None, "overwritten");
        assert_eq!(first.get(&a).unwrap().as_deref(), Some(&[-1.0, -2.0][..]));
        // A half record of a run that was killed does not spoil what comes behind it.
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(&[7; 11]).unwrap();
        first.insert(&[(&b, &[-3.0, -4.0])]).unwrap();
        for known in [first, open(&path)] {
            assert_eq!(known.get(&b).unwrap().as_deref(), Some(&[-3.0, -4.0][..]));
        }
        std::fs::remove_file(path).unwrap();
    }

    /// Wherever a file is cut, the records before it are used and those after it are not.
    #[test]
    fn only_whole_records_are_used() {
        let path = path("torn");
        let (a, b) = (group(&[1, 2, 3]), group(&[4, 5]));
        let mut store = open(&path);
        store.insert(&[(&a, &[-1.0, -2.0])]).unwrap();
        store.insert(&[(&b, &[-3.0])]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let first = (HEADER + record_len(2)) as usize;
        for len in 0..=bytes.len() {
            std::fs::write(&path, &bytes[..len]).unwrap();
            let mut known = open(&path);
            assert_eq!(known.get(&a).unwrap().is_some(), len >= first, "{len}");
            assert_eq!(known.get(&b).unwrap().is_some(), len == bytes.len(), "{len}");
            known.insert(&[(&b, &[-4.0])]).unwrap();
            assert_eq!(open(&path).get(&b).unwrap().as_deref(), Some(&[-4.0][..]), "{len}");
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 4;
            std::fs::write(&path, &damaged).unwrap();
            let known = open(&path);
            assert_eq!(known.get(&a).unwrap().is_some(), at >= first, "{at}");
            assert!(known.get(&b).unwrap().is_none(), "{at}");
        }
        std::fs::remove_file(path).unwrap();
    }
}

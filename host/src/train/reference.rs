//! Reference log-probs, computed once: kept in a file that all runs, stages and epochs share.
//!
//! A file belongs to one reference, by a hash of everything that decides its numbers: the model's
//! files, the adapter that the reference has (none for the base model), and the bits that this
//! program on this machine gives for a text made up. Within it a row is found by a hash of its token
//! ids and of which of them are trained; the template is in the token ids. Numbers do not depend on
//! what a row is packed with, so a row read back has the bits that it would be computed with.

mod store;
#[cfg(test)]
mod tests;

use super::identity::Identity;
use super::setup::Run;
use crate::config::Gain;
use crate::config::schema::Config;
use crate::data::Source;
use crate::group::{Branch, Group, Segment};
use crate::model::{Adapter, Adapters, Model, Packed, files};
use crate::{Error, Result};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use store::{Key, Store};
use uft_core::Feedback;

/// Known rows that are computed again when a stage starts.
const SAMPLE: usize = 3;

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
    pub fn open(&self, adapter: Option<&Adapters>) -> Result<ReferenceLogps> {
        let (shared, own, configured) = match &self.place {
            Place::Nowhere => return Ok(ReferenceLogps::nowhere()),
            Place::Memory => return Ok(ReferenceLogps::in_memory()),
            Place::Directory { shared, own, configured } => (shared, own, *configured),
        };
        let mut hasher = self.model.clone();
        // An adapter that adds nothing gives the base model's bits.
        let adapter = match adapter {
            Some(adapter) if !adapter.add_nothing()? => Some(adapter.read()?),
            _ => None,
        };
        for Adapter { name, scale, a, b, .. } in adapter.iter().flat_map(|lora| &lora.adapters) {
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
    let ids = |count: u32| {
        (0..count).map(|i| i.wrapping_mul(2_654_435_761) % model.config().vocab as u32)
    };
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
        adapter: Option<&Adapters>,
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

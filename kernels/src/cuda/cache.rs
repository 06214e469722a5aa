//! Compiled kernels on the disk. A file's name holds the hash of all that it was made from, so that one
//! that is there is right; it is renamed into place when all of it is written. Files may be deleted at
//! any time.

use super::{Error, Result};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

/// Where compiled kernels are kept: `kernels` in $UFT_CACHE_DIR, by default `uft` in the user's cache
/// directory ($XDG_CACHE_HOME or ~/.cache).
///
/// # Errors
/// None of the three variables is set.
pub fn folder() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("UFT_CACHE_DIR")
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("uft")))
        .or_else(|| Some(set("HOME")?.join(".cache/uft")));
    let nowhere = "no place to keep compiled kernels: set UFT_CACHE_DIR to a folder";
    Ok(cache.ok_or_else(|| Error::Missing(nowhere.into()))?.join("kernels"))
}

/// The file `STEM-HASH.EXTENSION`, hash of `parts`. Where it is not there, `make` writes it, at the path
/// that it gets; several threads that want the same one wait for one of them.
///
/// # Errors
/// The folder cannot be written, or what `make` says.
pub(super) fn get_or_make(
    stem: &str,
    parts: &[&[u8]],
    extension: &str,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    static MAKING: LazyLock<Mutex<HashMap<PathBuf, Arc<Mutex<()>>>>> =
        LazyLock::new(Mutex::default);
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        // The length first: the same bytes divided otherwise are another thing.
        hasher.update(&part.len().to_le_bytes()).update(part);
    }
    let hash = hasher.finalize().to_hex();
    let folder = folder()?;
    let path = folder.join(format!("{stem}-{}.{extension}", &hash[..24]));
    let turn = {
        let mut making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
        making.entry(path.clone()).or_default().clone()
    };
    let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
    if path.exists() {
        return Ok(path);
    }
    let failed = |what: &Path, e: std::io::Error| {
        Error::Failed(format!("{}: {e}; UFT_CACHE_DIR names another folder", what.display()))
    };
    std::fs::create_dir_all(&folder).map_err(|e| failed(&folder, e))?;
    let unfinished = folder.join(format!("{stem}-{}.{}.part", &hash[..24], std::process::id()));
    let made = make(&unfinished)
        .and_then(|()| std::fs::rename(&unfinished, &path).map_err(|e| failed(&path, e)));
    if made.is_err() {
        let _ = std::fs::remove_file(&unfinished);
    }
    made.map(|()| path)
}

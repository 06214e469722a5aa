//! Writing files so that they are there whole or not at all, and still there after a power cut.

use super::lora::LoraTensor;
use crate::{Error, Result};
use safetensors::View;
use safetensors::tensor::Dtype;
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// A file that is written and on the disk, but not yet under its name. Dropped, it is removed.
#[must_use]
pub struct Pending {
    path: PathBuf,
    /// The neighbour that holds the bytes.
    partial: PathBuf,
    placed: bool,
}

impl Pending {
    /// Puts the file under its name. That it is found there after a power cut takes a [`sync_dir`].
    ///
    /// # Errors
    /// If it cannot be renamed.
    pub fn place(mut self) -> Result<()> {
        fs::rename(&self.partial, &self.path).map_err(|e| write_error(&self.path, &e))?;
        self.placed = true;
        Ok(())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.placed {
            // What is left of a failed attempt is of no use; that it cannot be removed is no news.
            let _ = fs::remove_file(&self.partial);
        }
    }
}

/// Writes what is to become `path`.
///
/// # Errors
/// If it cannot be written.
pub fn prepare(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<Pending> {
    let failed = |e: io::Error| write_error(path, &e);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.partial"));
    let pending = Pending { path: path.to_owned(), partial, placed: false };
    let mut writer = BufWriter::new(File::create(&pending.partial).map_err(failed)?);
    write(&mut writer)?;
    let file = writer.into_inner().map_err(|e| failed(e.into_error()))?;
    file.sync_all().map_err(failed)?;
    Ok(pending)
}

/// As [`prepare`], all at once.
///
/// # Errors
/// As [`prepare`].
pub fn prepare_bytes(path: &Path, bytes: &[u8]) -> Result<Pending> {
    prepare(path, |file| file.write_all(bytes).map_err(|e| write_error(path, &e)))
}

/// Whether a name that stands in a file leads to no other folder.
pub fn is_plain_name(name: &str) -> bool {
    Path::new(name).file_name().is_some_and(|plain| plain == name)
}

/// As [`prepare`], matrices as a safetensors file of `f32`, as PEFT writes them.
///
/// # Errors
/// As [`prepare`].
pub fn prepare_tensors<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = LoraTensor<'a>>,
) -> Result<Pending> {
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let named = tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor));
    let bytes = safetensors::serialize(named, Some(metadata))
        .map_err(|e| Error::other(e.to_string()).at(path.display()))?;
    prepare_bytes(path, &bytes)
}

/// Writes `path` through a neighbour that is renamed into place once it is on the disk.
///
/// # Errors
/// If it cannot be written; what was there before then stays as it was.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<()> {
    put(path, prepare(path, write)?)
}

/// As [`write_atomically`], all at once.
///
/// # Errors
/// As [`write_atomically`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    put(path, prepare_bytes(path, bytes)?)
}

/// As [`write_atomically`], matrices as [`prepare_tensors`] writes them.
///
/// # Errors
/// As [`write_atomically`].
pub fn write_tensors<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = LoraTensor<'a>>,
) -> Result<()> {
    put(path, prepare_tensors(path, tensors)?)
}

fn put(path: &Path, pending: Pending) -> Result<()> {
    pending.place()?;
    sync_dir(parent(path))
}

/// Makes a directory and those above it, found there after a power cut too. One that is there is
/// left as it is.
///
/// # Errors
/// If it cannot be made.
pub fn create_dir(dir: &Path) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    create_dir(parent(dir))?;
    match fs::create_dir(dir) {
        Err(e) if !dir.is_dir() => Err(write_error(dir, &e)),
        _ => sync_dir(parent(dir)),
    }
}

/// Puts a directory's entries on the disk: names of new files, renamings, removals.
///
/// # Errors
/// If it cannot.
pub fn sync_dir(dir: &Path) -> Result<()> {
    match File::open(dir).and_then(|dir| dir.sync_all()) {
        // Some network file systems cannot, and then do not have to.
        Err(e) if !matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {
            Err(write_error(dir, &e))
        }
        _ => Ok(()),
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

/// Something that cannot be written, and what to do where that is known.
pub fn write_error(path: &Path, e: &io::Error) -> Error {
    let remedy = match e.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "; make room on that disk",
        ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => {
            "; make it writable, or choose another place"
        }
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
            "; something else stands there, choose another place"
        }
        _ => "",
    };
    Error::other(format!("cannot be written: {e}{remedy}")).at(path.display())
}

impl View for LoraTensor<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.data.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    fn data_len(&self) -> usize {
        4 * self.data.len()
    }
}

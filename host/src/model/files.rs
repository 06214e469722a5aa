//! Writing files so that they are there whole or not at all.

use super::lora::LoraTensor;
use crate::{Error, Result};
use safetensors::View;
use safetensors::tensor::Dtype;
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

/// Writes `path` through a neighbour that is renamed into place once it is on the disk.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<()> {
    let failed = |e: std::io::Error| Error::other(format!("cannot write: {e}")).at(path.display());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.partial"));
    let result = (|| {
        let mut writer = BufWriter::new(File::create(&partial).map_err(failed)?);
        write(&mut writer)?;
        let file = writer.into_inner().map_err(|e| failed(e.into_error()))?;
        file.sync_all().map_err(failed)?;
        fs::rename(&partial, path).map_err(failed)
    })();
    if result.is_err() {
        // What is left of a failed attempt is of no use; that it cannot be removed is no news.
        let _ = fs::remove_file(&partial);
    }
    result
}

/// As [`write_atomically`], all at once.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomically(path, |file| file.write_all(bytes).map_err(|e| write_error(path, &e)))
}

/// Whether a name that stands in a file leads to no other folder.
pub fn is_plain_name(name: &str) -> bool {
    Path::new(name).file_name().is_some_and(|plain| plain == name)
}

/// Writes matrices as a safetensors file of `f32`, as PEFT does.
pub fn write_tensors<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = LoraTensor<'a>>,
) -> Result<()> {
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let named = tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor));
    let bytes = safetensors::serialize(named, Some(metadata))
        .map_err(|e| Error::other(e.to_string()).at(path.display()))?;
    write_bytes(path, &bytes)
}

pub(super) fn write_error(path: &Path, e: &std::io::Error) -> Error {
    Error::other(format!("cannot write: {e}")).at(path.display())
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

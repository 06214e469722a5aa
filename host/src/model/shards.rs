//! The safetensors files of a directory, memory-mapped: one file, or several with an index.

use super::files::is_plain_name;
use super::json::{Keys, model_error};
use crate::{Error, ErrorKind, Result};
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Elements converted by one task.
const TASK: usize = 1 << 16;

/// One safetensors file.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Where the tensors' bytes begin.
    data: usize,
}

/// One tensor as it lies in its file.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    pub name: &'a str,
    pub file: &'a Path,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

impl TensorFile {
    /// Maps a file and checks that its header describes it.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| model_error(path, e.to_string()))?;
        // SAFETY: the map is only read. A file that another process shortens meanwhile would raise
        // SIGBUS, the price that every reader of mapped weights pays.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| match e.kind() {
            io::ErrorKind::OutOfMemory => {
                Error::new(ErrorKind::OutOfMemory, format!("cannot be mapped: {e}"))
                    .at(path.display())
            }
            _ => model_error(path, e.to_string()),
        })?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| {
            model_error(path, format!("not a whole safetensors file ({e}); was it cut off?"))
        })?;
        Ok(Self { path: path.to_path_buf(), map, metadata, data: header + 8 })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Everything before the tensors' bytes: the header's length and the header.
    pub fn header(&self) -> &[u8] {
        &self.map[..self.data]
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Where a tensor of this file lies in [`Self::bytes`].
    pub fn place(&self, tensor: &Tensor) -> Range<usize> {
        let start = tensor.bytes.as_ptr() as usize - self.map.as_ptr() as usize;
        start..start + tensor.bytes.len()
    }

    /// The tensors in the order of their bytes.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    pub fn tensor<'a>(&'a self, name: &'a str) -> Option<Tensor<'a>> {
        let info = self.metadata.info(name)?;
        let (start, end) = info.data_offsets;
        let bytes = &self.map[self.data + start..self.data + end];
        Some(Tensor { name, file: &self.path, dtype: info.dtype, shape: &info.shape, bytes })
    }
}

/// All tensors of a model directory.
pub struct Shards {
    pub files: Vec<Arc<TensorFile>>,
    /// Which of `files` holds a tensor.
    places: BTreeMap<String, usize>,
}

/// The index of a directory with several files.
pub const INDEX: &str = "model.safetensors.index.json";
/// The file of a directory with one.
pub const SINGLE: &str = "model.safetensors";

impl Shards {
    /// Opens `model.safetensors`, or the files that `model.safetensors.index.json` lists.
    pub fn open(dir: &Path) -> Result<Self> {
        let single = dir.join(SINGLE);
        let index = dir.join(INDEX);
        match (single.exists(), index.exists()) {
            (true, _) => Self::from_files(vec![TensorFile::open(&single)?]),
            (false, true) => Self::open_indexed(dir, &index),
            (false, false) => Err(Error::model(format!(
                "{}: neither {SINGLE} nor {INDEX}; weights in other formats (.bin, .gguf) must be converted to safetensors first",
                dir.display()
            ))),
        }
    }

    fn open_indexed(dir: &Path, index: &Path) -> Result<Self> {
        let keys = Keys::read(index)?;
        let map = keys.object("weight_map")?.ok_or_else(|| keys.missing("weight_map"))?;
        let mut listed: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, file) in map {
            let name = file.as_str().filter(|name| is_plain_name(name));
            let name = name.ok_or_else(|| {
                model_error(index, format!("weight_map: {tensor}: {file} is not a file name"))
            })?;
            listed.entry(name).or_default().push(tensor);
        }
        let files: Vec<TensorFile> = listed
            .iter()
            .map(|(name, tensors)| match dir.join(name) {
                path if path.exists() => TensorFile::open(&path),
                _ => Err(model_error(
                    index,
                    format!("{name}, which holds {} and others, does not exist", tensors[0]),
                )),
            })
            .collect::<Result<_>>()?;
        for (file, tensors) in files.iter().zip(listed.values()) {
            if let Some(tensor) = tensors.iter().find(|tensor| file.tensor(tensor).is_none()) {
                let message = format!("{tensor} is not in {}", file.path.display());
                return Err(model_error(index, message));
            }
        }
        let shards = Self::from_files(files)?;
        match shards.places.keys().find(|tensor| !map.contains_key(*tensor)) {
            None => Ok(shards),
            Some(tensor) => {
                let file = shards.files[shards.places[tensor]].path.display();
                Err(model_error(index, format!("{tensor} of {file} is not listed")))
            }
        }
    }

    fn from_files(files: Vec<TensorFile>) -> Result<Self> {
        let files: Vec<_> = files.into_iter().map(Arc::new).collect();
        let mut places = BTreeMap::new();
        for (at, file) in files.iter().enumerate() {
            for tensor in file.names() {
                if let Some(other) = places.insert(tensor.clone(), at) {
                    let other = files[other].path.display();
                    return Err(model_error(&file.path, format!("{tensor} is also in {other}")));
                }
            }
        }
        Ok(Self { files, places })
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    pub fn tensor<'a>(&'a self, name: &str) -> Option<Tensor<'a>> {
        let (name, place) = self.places.get_key_value(name)?;
        self.files[*place].tensor(name)
    }

    /// The file that holds a tensor.
    pub fn file_of(&self, tensor: &Tensor) -> &Arc<TensorFile> {
        &self.files[self.places[tensor.name]]
    }
}

impl Tensor<'_> {
    /// Checks the shape.
    pub fn expect_shape(&self, shape: &[usize]) -> Result<()> {
        if self.shape == shape {
            return Ok(());
        }
        Err(self.error(format!("shape {:?}, expected {shape:?}", self.shape)))
    }

    /// `file: tensor: message`.
    pub fn error(&self, message: impl std::fmt::Display) -> Error {
        model_error(self.file, format!("{}: {message}", self.name))
    }

    /// The elements, widened; each dtype's values are exact in `f32`.
    ///
    /// # Errors
    /// As [`Self::expect_finite`].
    pub fn to_f32(self) -> Result<Vec<f32>> {
        self.expect_finite()?;
        let mut values = vec![0.0; self.shape.iter().product()];
        match self.dtype {
            Dtype::F16 => widen(self.bytes, &mut values, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => widen(self.bytes, &mut values, |b| bf16::from_le_bytes(b).to_f32()),
            _ => widen(self.bytes, &mut values, f32::from_le_bytes),
        }
        Ok(values)
    }

    /// Reads all elements and makes sure that each is a number: NaN and infinity would make every
    /// log-prob NaN.
    ///
    /// # Errors
    /// If one is not finite, or if the dtype is not one of F32, F16 and BF16.
    pub fn expect_finite(&self) -> Result<()> {
        // All bits of the exponent set.
        let finite = match self.dtype {
            Dtype::F32 => all(self.bytes, |b| u32::from_le_bytes(b) & 0x7f80_0000 != 0x7f80_0000),
            Dtype::F16 => all(self.bytes, |b| u16::from_le_bytes(b) & 0x7c00 != 0x7c00),
            Dtype::BF16 => all(self.bytes, |b| u16::from_le_bytes(b) & 0x7f80 != 0x7f80),
            other => {
                let message = format!("dtype {other:?}; supported are F32, F16 and BF16");
                return Err(self.error(message));
            }
        };
        match finite {
            true => Ok(()),
            false => {
                Err(self
                    .error("holds NaN or infinity; the file is damaged or its training diverged"))
            }
        }
    }
}

fn widen<const N: usize>(bytes: &[u8], values: &mut [f32], one: impl Fn([u8; N]) -> f32 + Sync) {
    assert_eq!(bytes.len(), values.len() * N, "the header's shape was checked on opening");
    let tasks = bytes.par_chunks(TASK * N).zip(values.par_chunks_mut(TASK));
    tasks.for_each(|(bytes, values)| {
        for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<N>().0) {
            *value = one(*bytes);
        }
    });
}

/// Whether `good` holds of all elements.
fn all<const N: usize>(bytes: &[u8], good: impl Fn([u8; N]) -> bool + Sync) -> bool {
    // Within a task all are looked at: a loop without a way out becomes vector code.
    let task = |bytes: &[u8]| bytes.as_chunks::<N>().0.iter().fold(true, |ok, b| ok & good(*b));
    bytes.par_chunks(TASK * N).all(task)
}

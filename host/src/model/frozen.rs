//! Frozen tensors as they are held in memory: where their file allows it, they stay in the file.

use super::shards::{Tensor, TensorFile};
use crate::Result;
use half::{bf16, f16};
use safetensors::tensor::Dtype;
use std::ops::Range;
use std::sync::Arc;
use uft_kernels::matmul::Weight;

/// A frozen tensor. A mapped one has no copy in memory of its own: the operating system keeps the
/// file's pages, gives them to every process that maps them, and may drop them for others.
#[derive(Debug)]
pub enum Frozen {
    /// Widened to `f32`, or copied because its place in the file is not aligned.
    Owned(Vec<f32>),
    /// In its file.
    Mapped { file: Arc<TensorFile>, bytes: Range<usize>, dtype: Dtype },
}

impl Frozen {
    /// Holds a tensor of `file`: mapped if its elements are aligned, as those of common writers are.
    ///
    /// # Errors
    /// If the dtype is not one of F32, F16 and BF16, or an element is not finite.
    pub fn hold(file: &Arc<TensorFile>, tensor: &Tensor) -> Result<Self> {
        tensor.expect_finite()?;
        if !Self::stays_mapped(tensor) {
            return Ok(Self::Owned(tensor.to_f32()?));
        }
        Ok(Self::Mapped { file: file.clone(), bytes: file.place(tensor), dtype: tensor.dtype })
    }

    /// Whether a tensor can be read where it lies.
    pub fn stays_mapped(tensor: &Tensor) -> bool {
        weight(tensor.bytes, tensor.dtype).is_some()
    }
}

/// The elements where they lie; none if they are not aligned, or of another type.
fn weight(bytes: &[u8], dtype: Dtype) -> Option<Weight<'_>> {
    // SAFETY (all three): every pattern of bits is a number of these types.
    match dtype {
        Dtype::F32 => whole(unsafe { bytes.align_to::<f32>() }).map(Weight::F32),
        Dtype::F16 => whole(unsafe { bytes.align_to::<f16>() }).map(Weight::F16),
        Dtype::BF16 => whole(unsafe { bytes.align_to::<bf16>() }).map(Weight::Bf16),
        _ => None,
    }
}

/// The middle of [`slice::align_to`] if it is all there is.
fn whole<'a, T>((before, middle, after): (&'a [u8], &'a [T], &'a [u8])) -> Option<&'a [T]> {
    (before.is_empty() && after.is_empty() && cfg!(target_endian = "little")).then_some(middle)
}

impl<'a> From<&'a Frozen> for Weight<'a> {
    fn from(frozen: &'a Frozen) -> Self {
        match frozen {
            Frozen::Owned(values) => Weight::F32(values),
            Frozen::Mapped { file, bytes, dtype } => weight(&file.bytes()[bytes.clone()], *dtype)
                .expect("only an aligned tensor is held mapped"),
        }
    }
}

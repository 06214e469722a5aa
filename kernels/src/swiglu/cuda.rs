//! The gated activation on a device: see `swiglu.cu`.

use crate::args;
use crate::cuda::{DeviceSlice, Gpu, Kernel, Result, Source, TILE, assert_aligned, blocks};
use half::bf16;

pub(crate) const HEADER: (&str, &str) = ("swiglu.cuh", include_str!("../swiglu.cuh"));
static SOURCE: Source =
    Source { name: "swiglu.cu", text: include_str!("../swiglu.cu"), headers: &[TILE, HEADER] };
const FORWARD: Kernel = Kernel::new(&SOURCE, "swiglu_forward", 256);
const BACKWARD: Kernel = Kernel::new(&SOURCE, "swiglu_backward", 256);

/// Every kernel of this file.
pub const KERNELS: &[Kernel] = &[FORWARD, BACKWARD];

/// Elements of one thread.
const EACH: usize = 8;

/// [`super::forward`] in bf16: `out = silu(gate) up`. Overwrites `out`.
///
/// # Errors
/// The launch fails.
pub fn forward(
    gpu: &Gpu,
    gate: &DeviceSlice<bf16>,
    up: &DeviceSlice<bf16>,
    out: &mut DeviceSlice<bf16>,
) -> Result<()> {
    let n = out.len();
    assert_eq!([gate.len(), up.len()], [n; 2], "swiglu: lengths differ from out's");
    assert_aligned("swiglu", [gate, up, out]);
    if n == 0 {
        return Ok(());
    }
    gpu.launch(&FORWARD, [blocks(n, 256 * EACH), 1, 1], 0, args![gate, up, out, n])
}

/// [`super::backward`] in bf16: `gate` and `up` become their gradients. Where `out` is given it is what [`forward`] made it, once
/// more: who needs that on the way back has no need to keep it.
///
/// # Errors
/// The launch fails.
pub fn backward(
    gpu: &Gpu,
    dout: &DeviceSlice<bf16>,
    gate: &mut DeviceSlice<bf16>,
    up: &mut DeviceSlice<bf16>,
    out: Option<&mut DeviceSlice<bf16>>,
) -> Result<()> {
    let n = dout.len();
    let out_len = out.as_ref().map_or(n, |out| out.len());
    assert_eq!([gate.len(), up.len(), out_len], [n; 3], "swiglu: lengths differ from dout's");
    assert_aligned("swiglu", [dout, &*gate, &*up]);
    if let Some(out) = &out {
        assert_aligned("swiglu", [&**out]);
    }
    if n == 0 {
        return Ok(());
    }
    gpu.launch(&BACKWARD, [blocks(n, 256 * EACH), 1, 1], 0, args![dout, gate, up, out, n])
}

#[cfg(test)]
mod tests;

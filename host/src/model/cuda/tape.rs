//! What a forward pass leaves of one block for the way back; the twin of what stands in [`super::super::layer`].

use super::Context;
use crate::Result;
use half::bf16;
use uft_kernels::cuda::{DeviceBuffer, DeviceSlice};

type Buffer = DeviceBuffer<bf16>;

/// What the way back needs of one block.
pub struct LayerTape {
    pub x: Buffer, // [T, H]
    pub inputs: AttentionInputs,
    pub attended: Buffer,       // [T, Q]
    pub lse: DeviceBuffer<f32>, // [T, heads]
    pub outputs: Outputs,
}

impl LayerTape {
    /// k and v, `[T, K]` each.
    pub fn keys_and_values(&self) -> [&DeviceSlice<bf16>; 2] {
        [&self.inputs.k, &self.inputs.v]
    }

    /// The block's input alone, `[T, H]`.
    pub fn into_input(self) -> Buffer {
        self.x
    }

    /// The tape without gate and up, its largest part.
    pub fn without_gate_and_up(mut self) -> Self {
        self.outputs.gate_and_up = None;
        self
    }

    /// The tape of some of the rows alone, which attend to none of the others; `needed` are those of them
    /// that go on after the attention, counted among all that do.
    pub fn of_rows(
        self,
        rows: &DeviceSlice<u32>,
        needed: &DeviceSlice<u32>,
        with: Context,
    ) -> Result<Self> {
        let (total, going_on) = (self.inputs.inv_rms.len(), self.outputs.inv_rms.len());
        let of_all = |buffer: Buffer| with.gather(&buffer, rows, total);
        let roots_of_all = |buffer: DeviceBuffer<f32>| with.gather_f32(&buffer, rows, total);
        let of_going_on = |buffer: Buffer| with.gather(&buffer, needed, going_on);
        // Given back and taken in the order in which they were taken.
        let x = of_all(self.x)?;
        let AttentionInputs { inv_rms, q, k, v, head_norms, u } = self.inputs;
        let inv_rms = roots_of_all(inv_rms)?;
        let (q, k, v) = (of_all(q)?, of_all(k)?, of_all(v)?);
        let u = each(u, of_all)?;
        let head_norms = match head_norms {
            None => None,
            Some([q, k]) => {
                let part = |HeadNorm { before, inv_rms }: HeadNorm| -> Result<HeadNorm> {
                    Ok(HeadNorm { before: of_all(before)?, inv_rms: roots_of_all(inv_rms)? })
                };
                Some([part(q)?, part(k)?])
            }
        };
        let inputs = AttentionInputs { inv_rms, q, k, v, head_norms, u };
        let (attended, lse) = (of_all(self.attended)?, roots_of_all(self.lse)?);
        let Outputs { mid, inv_rms, gate_and_up, u } = self.outputs;
        let mid = of_going_on(mid)?;
        let inv_rms = with.gather_f32(&inv_rms, needed, going_on)?;
        let gate_and_up = match gate_and_up {
            None => None,
            Some([gate, up]) => Some([of_going_on(gate)?, of_going_on(up)?]),
        };
        let outputs = Outputs { mid, inv_rms, gate_and_up, u: each(u, of_going_on)? };
        Ok(Self { x, inputs, attended, lse, outputs })
    }
}

/// `part` of each that is there.
fn each<const N: usize>(
    buffers: [Option<Buffer>; N],
    part: impl Fn(Buffer) -> Result<Buffer>,
) -> Result<[Option<Buffer>; N]> {
    let mut parts = [const { None }; N];
    for (to, from) in parts.iter_mut().zip(buffers) {
        *to = from.map(&part).transpose()?;
    }
    Ok(parts)
}

/// Queries, keys and values, ready for attention.
pub struct AttentionInputs {
    pub inv_rms: DeviceBuffer<f32>, // [T]
    pub q: Buffer,                  // [T, Q]
    pub k: Buffer,                  // [T, K]
    pub v: Buffer,                  // [T, K]
    pub head_norms: Option<[HeadNorm; 2]>,
    pub u: [Option<Buffer>; 3], // [T, R] of q, k, v
}

/// The norm of q's or k's heads.
pub struct HeadNorm {
    pub before: Buffer,             // [T, heads, D]
    pub inv_rms: DeviceBuffer<f32>, // [T, heads]
}

/// What follows the attention.
pub struct Outputs {
    pub mid: Buffer,                // [N, H]
    pub inv_rms: DeviceBuffer<f32>, // [N]
    /// `[N, I]` each; none while they wait to be computed again.
    pub gate_and_up: Option<[Buffer; 2]>,
    pub u: [Option<Buffer>; 4], // [N, R] of o, gate, up, down
}

//! Generation on a device; the twin of [`super::super::generate`].

use super::adapters::Adapters;
use super::decoder::Decoder;
use super::layer::KeyValues;
use super::linear::Product;
use super::{Context, sent};
use crate::Result;
use crate::model::packed::{Packed, Targets};
use half::bf16;
use uft_kernels::cuda::{DeviceBuffer, DeviceSlice};
use uft_kernels::logprob::cuda::{self as logprob, padded as padded_vocabulary};
use uft_kernels::{embedding, rmsnorm};

/// A text in the making.
pub struct Continuation<'m> {
    model: &'m Decoder,
    lora: Option<&'m Adapters>,
    /// `[L]`: keys and values of all positions so far, with room for as many as there are going to be.
    caches: Vec<KeyValues>,
    /// n: positions so far.
    positions: usize,
    /// `[V]`: what may come next.
    logits: Vec<f32>,
}

impl<'m> Continuation<'m> {
    /// Reads a prompt, in one pass; it is not empty, and its tokens are the model's. There is room for `more` tokens
    /// behind it.
    pub fn new(
        model: &'m Decoder,
        lora: Option<&'m Adapters>,
        prompt: &[u32],
        more: usize,
    ) -> Result<Self> {
        // The last row alone goes through the top of the model; its target doesn't matter.
        let targets = Targets { rows: vec![prompt.len() as u32 - 1], tokens: vec![0] };
        let packed = Packed { targets, ..Packed::prompt(prompt) };
        let (batch, angles) = model.batch(&packed)?;
        let with = model.context(&angles);
        let positions = prompt.len();
        let capacity = positions + more;
        let mut caches = Vec::with_capacity(model.layers.len());
        let top = model.run(
            &batch,
            lora,
            |tape| {
                let [keys, values] = tape.keys_and_values();
                let keys = with_room(keys, capacity, with)?;
                caches.push(KeyValues { keys, values: with_room(values, capacity, with)? });
                Ok(())
            },
            with,
        )?;
        let mut logits = vec![0.0; model.config.vocab];
        read_logits(model, &top.hidden, lora, &mut logits)?;
        drop((batch, top));
        Ok(Self { model, lora, caches, positions, logits })
    }

    /// `[V]`: the logits of the next token.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Appends a token, which is one of the model's; there must be room for it.
    pub fn push(&mut self, token: u32) -> Result<()> {
        let Self { model, lora, caches, positions, logits } = self;
        let (gpu, arena, n) = (&model.gpu, &model.arena, *positions);
        let angles = model.angles(n + 1)?;
        let with = Context { product: Product::Token, ..model.context(&angles) };
        let (token, position) = (sent(gpu, arena, &[token])?, sent(gpu, arena, &[n as u32])?);
        let mut x = with.take(model.config.hidden)?;
        embedding::cuda::gather(gpu, &model.embedding, &token, &mut x)?;
        for (layer, cache) in model.layers.iter().zip(caches) {
            x = layer.decode(x, n, &position, cache, *lora, with)?;
        }
        let (mut hidden, mut inv_rms) = (with.take(x.len())?, with.take_f32(1)?);
        let eps = model.config.norm_eps;
        rmsnorm::cuda::forward(gpu, &x, &model.norm, eps, &mut hidden, &mut inv_rms)?;
        *positions += 1;
        read_logits(model, &hidden, *lora, logits)
    }
}

/// What `cache` holds, with room for `capacity` positions.
fn with_room(
    cache: &DeviceSlice<bf16>,
    capacity: usize,
    with: Context,
) -> Result<DeviceBuffer<bf16>> {
    let mut larger = with.take(capacity * with.config.key_width())?;
    with.gpu.copy(cache, &mut larger[..cache.len()])?;
    Ok(larger)
}

/// `hidden`: `[1, H]`.
fn read_logits(
    model: &Decoder,
    hidden: &DeviceSlice<bf16>,
    lora: Option<&Adapters>,
    logits: &mut [f32],
) -> Result<()> {
    let (gpu, arena) = (&model.gpu, &model.arena);
    let mut on_device = arena.take(padded_vocabulary(logits.len()))?;
    logprob::forward_logits(gpu, arena, hidden, &model.head(lora), &mut on_device)?;
    let on_device: Vec<bf16> = gpu.downloaded(&on_device)?;
    logits.iter_mut().zip(on_device).for_each(|(logit, bf16)| *logit = bf16.to_f32());
    Ok(())
}

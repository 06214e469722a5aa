//! The decoder on a device: token log-probs of a packed batch, and the way back to the adapters; the twin of
//! [`super::super::decoder`].
//!
//! T rows, N needed rows (those that targets read), M targets, H hidden width, V vocabulary.

use super::adapters::{Adapters, Gradients};
use super::batch::Batch;
use super::layer::Layer;
use super::linear::Product;
use super::tape::LayerTape;
use super::{Context, sent};
use crate::model::config::ModelConfig;
use crate::model::decoder::Options;
use crate::model::packed::{NeededRows, Packed, WithOthers};
use crate::model::targets::Site;
use crate::{Result, signals};
use half::bf16;
use std::sync::{Arc, Mutex, PoisonError};
use uft_kernels::cuda::{
    Arena, Copying, DeviceBuffer, DeviceSlice, Downloading, Gpu, Kernel, Offload, Offloaded,
};
use uft_kernels::logprob::cuda::{self as logprob, Head, LowRank};
use uft_kernels::rope::{Rope, cuda::Table};
use uft_kernels::{embedding, rmsnorm};

/// Tokens of which the head has logits at a time.
const HEAD_TOKENS: usize = 1024;

/// A decoder with its frozen weights on a device; see [`super::super::Model::load`].
pub struct Decoder {
    pub config: ModelConfig,
    pub options: Options,
    pub(super) gpu: Gpu,
    pub(super) arena: Arena,
    /// Where blocks' inputs wait for the way back, if not in the arena.
    pub(super) offload: Offload,
    /// `[P, H]`, zeros beyond V.
    pub(super) embedding: DeviceBuffer<bf16>,
    /// `[P, H]`, or the embedding where they are tied.
    pub(super) head: Option<DeviceBuffer<bf16>>,
    /// `[H]`, before the head.
    pub(super) norm: DeviceBuffer<bf16>,
    pub(super) layers: Vec<Layer>,
    pub(super) rope: Rope,
    /// Angles for as many positions as were met.
    pub(super) angles: Mutex<Option<Arc<Table>>>,
}

/// A forward pass, kept for [`Decoder::backward`].
pub struct Tape {
    batch: Batch,
    /// From the lowest layer with an adapter upwards.
    layers: Vec<Kept>,
    /// `[N, H]`: what the final norm got.
    last: DeviceBuffer<bf16>,
    /// `[N]`.
    inv_rms: DeviceBuffer<f32>,
    /// `[M, H]`: what the head got; kept only where the head has an adapter.
    hidden: Option<DeviceBuffer<bf16>>,
    /// `[M, H]`: the gradient of each log-prob to `hidden`.
    unit_grad: DeviceBuffer<bf16>,
    angles: Arc<Table>,
    /// `[M]`.
    logps: Vec<f32>,
}

/// What a forward pass leaves of one block.
enum Kept {
    /// Of some with gate and up, of others without: those are computed again on the way back.
    Tape(Box<LayerTape>),
    /// `[T, H]`: the block is computed again on the way back.
    Input(DeviceBuffer<bf16>),
    /// The same in the host's memory.
    Offloaded(Offloaded<bf16>),
    /// The same on its way back from there.
    Fetched(Copying<bf16>),
}

impl Tape {
    /// `[M]`: the log-prob of every target, in the order of the batch's targets.
    pub fn logps(&self) -> &[f32] {
        &self.logps
    }
}

/// The top of the model.
pub(super) struct Top {
    /// `[N, H]`.
    last: DeviceBuffer<bf16>,
    /// `[N]`.
    inv_rms: DeviceBuffer<f32>,
    /// `[M, H]`.
    pub hidden: DeviceBuffer<bf16>,
}

impl Decoder {
    /// Sets so many bytes of the device aside for activations, and of the host for what is offloaded, for texts of at most
    /// `positions` tokens, and compiles kernels.
    pub fn reserve(
        &mut self,
        bytes: usize,
        offloaded: usize,
        positions: usize,
        kernels: &[Kernel],
    ) -> Result<()> {
        self.gpu.prepare(kernels)?;
        self.angles(positions)?;
        self.arena = Arena::new(&self.gpu, bytes)?;
        self.offload = Offload::new(&self.gpu, offloaded)?;
        Ok(())
    }

    /// Most bytes of activations so far.
    pub fn activations(&self) -> usize {
        self.arena.high_water()
    }

    /// Most bytes that were offloaded at a time so far.
    pub fn offloaded(&self) -> usize {
        self.offload.high_water()
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// As [`super::super::decoder::Decoder::logps`].
    pub fn logps(&self, packed: &Packed, lora: Option<&Adapters>) -> Result<Vec<f32>> {
        Ok(self.logps_later(packed, lora)?.wait()?)
    }

    /// As [`Self::logps`], without waiting for the device.
    pub fn logps_later(
        &self,
        packed: &Packed,
        lora: Option<&Adapters>,
    ) -> Result<Downloading<f32>> {
        if packed.targets.rows.is_empty() {
            return Ok(Downloading::there(Vec::new()));
        }
        let (batch, angles) = self.batch(packed)?;
        let with = self.context(&angles);
        let top = self.run(&batch, lora, |_| Ok(()), with)?;
        self.head_logps(&top.hidden, &batch.targets, lora)
    }

    /// `hidden`: `[M, H]`, what the head gets, `tokens`: `[M]`.
    fn head_logps(
        &self,
        hidden: &DeviceSlice<bf16>,
        tokens: &DeviceSlice<u32>,
        lora: Option<&Adapters>,
    ) -> Result<Downloading<f32>> {
        let mut logps = self.arena.take(tokens.len())?;
        logprob::forward(&self.gpu, &self.arena, hidden, tokens, &self.head(lora), &mut logps)?;
        Ok(self.gpu.downloading(&logps)?)
    }

    /// As [`super::super::decoder::Decoder::forward`].
    pub fn forward(&self, packed: &Packed, lora: &Adapters) -> Result<Tape> {
        let (batch, angles) = self.batch(packed)?;
        let mut layers = Vec::new();
        let keep = self.keep(lora, &mut layers, Ok);
        let top = self.run(&batch, Some(lora), keep, self.context(&angles))?;
        self.tape(batch, layers, top, lora, angles)
    }

    /// As [`super::super::decoder::Decoder::forward_with_others`].
    pub fn forward_with_others(
        &self,
        batch: WithOthers,
        lora: &Adapters,
    ) -> Result<(Tape, Vec<f32>)> {
        let WithOthers { own, all, rows, targets, .. } = batch;
        let (gpu, arena, h) = (&self.gpu, &self.arena, self.config.hidden);
        let needed = self.needed(&own);
        // Where a row of `own` that goes on is among those of `all`.
        let all_needed = self.needed(&all).rows;
        let going_on: Vec<u32> = needed
            .rows
            .iter()
            .map(|&row| all_needed.binary_search(&rows[row as usize]).expect("of both") as u32)
            .collect();
        let others: Vec<u32> = (0..all.targets.rows.len() as u32)
            .filter(|target| targets.binary_search(target).is_err())
            .collect();
        let tokens: Vec<u32> = others.iter().map(|&t| all.targets.tokens[t as usize]).collect();

        let (all, angles) = self.batch(&all)?;
        let own = Batch::new(&own, &needed, &self.config, gpu, arena)?;
        let with = self.context(&angles);
        let (rows, going_on) = (sent(gpu, arena, &rows)?, sent(gpu, arena, &going_on)?);
        let last_layer = self.layers.len() - 1;
        let mut layers = Vec::new();
        let mut index = 0..;
        let own_rows = |tape: LayerTape| {
            let last = index.next() == Some(last_layer);
            let after = if last { &going_on } else { &rows };
            tape.of_rows(&rows, after, with)
        };
        let top = self.run(&all, Some(lora), self.keep(lora, &mut layers, own_rows), with)?;

        let (targets, others) = (sent(gpu, arena, &targets)?, sent(gpu, arena, &others)?);
        let (going_on_of_all, targets_of_all) = (all.needed, all.targets.len());
        let own_top = Top {
            last: with.gather(&top.last, &going_on, going_on_of_all)?,
            inv_rms: with.gather_f32(&top.inv_rms, &going_on, going_on_of_all)?,
            hidden: with.gather(&top.hidden, &targets, targets_of_all)?,
        };
        let mut hidden = arena.take(others.len() * h)?;
        embedding::cuda::gather(gpu, &top.hidden, &others, &mut hidden)?;
        drop((top, all));
        let tokens = sent(gpu, arena, &tokens)?;
        let logps = self.head_logps(&hidden, &tokens, Some(lora))?;
        drop(hidden);
        Ok((self.tape(own, layers, own_top, lora, angles)?, logps.wait()?))
    }

    /// What to do with the blocks' tapes, lowest first: none is kept below the lowest adapter, the lowest of those
    /// above leave only their input, and the next all but gate and up. An input that is offloaded leaves the device
    /// while the next block is computed.
    fn keep<'t>(
        &'t self,
        lora: &Adapters,
        layers: &'t mut Vec<Kept>,
        mut part: impl FnMut(LayerTape) -> Result<LayerTape> + 't,
    ) -> impl FnMut(LayerTape) -> Result<()> + 't {
        let mut below = self.options.lowest_layer(lora.shape());
        let Options { recomputed_layers, recomputed_gates, offloaded_layers, .. } = self.options;
        let mut leaving: Option<Copying<bf16>> = None;
        move |tape| {
            let tape = part(tape)?;
            leaving.take().map(Copying::wait).transpose()?;
            match below {
                0 if layers.len() < offloaded_layers.min(recomputed_layers) => {
                    let (input, copying) = self.offload.send(tape.into_input())?;
                    layers.push(Kept::Offloaded(input));
                    leaving = Some(copying);
                }
                0 if layers.len() < recomputed_layers => {
                    layers.push(Kept::Input(tape.into_input()));
                }
                0 if layers.len() < recomputed_layers + recomputed_gates => {
                    layers.push(Kept::Tape(Box::new(tape.without_gate_and_up())));
                }
                0 => layers.push(Kept::Tape(Box::new(tape))),
                _ => below -= 1,
            }
            Ok(())
        }
    }

    /// The log-probs of a batch's targets, and everything together for the way back.
    fn tape(
        &self,
        batch: Batch,
        layers: Vec<Kept>,
        top: Top,
        lora: &Adapters,
        angles: Arc<Table>,
    ) -> Result<Tape> {
        let (gpu, arena, targets) = (&self.gpu, &self.arena, &batch.targets);
        assert!(targets.len() > 0, "a batch without trained tokens");
        let Top { last, inv_rms, hidden } = top;
        let mut logps = arena.take(targets.len())?;
        let mut unit_grad = arena.take(hidden.len())?;
        let head = self.head(Some(lora));
        let has_adapter = head.adapter.is_some();
        logprob::forward_with_gradient(
            gpu,
            arena,
            &hidden,
            targets,
            &head,
            &mut logps,
            &mut unit_grad,
        )?;
        let hidden = Some(hidden).filter(|_| has_adapter);
        let logps = gpu.downloaded(&logps)?;
        Ok(Tape { batch, layers, last, inv_rms, hidden, unit_grad, angles, logps })
    }

    /// The rows that go on after the last block's attention.
    fn needed(&self, packed: &Packed) -> NeededRows {
        match self.options.skipped_gradients {
            true => NeededRows::of(&packed.targets),
            false => NeededRows::all(packed),
        }
    }

    /// A batch on the device, and the angles of its positions.
    pub(super) fn batch(&self, packed: &Packed) -> Result<(Batch, Arc<Table>)> {
        let last = packed.layout.positions.iter().max().map_or(0, |&last| last as usize);
        let angles = self.angles(last + 1)?;
        let needed = self.needed(packed);
        let batch = Batch::new(packed, &needed, &self.config, &self.gpu, &self.arena)?;
        Ok((batch, angles))
    }

    /// Embedding, blocks and final norm; every block's tape goes to `keep`, lowest first.
    pub(super) fn run(
        &self,
        batch: &Batch,
        lora: Option<&Adapters>,
        mut keep: impl FnMut(LayerTape) -> Result<()>,
        with: Context,
    ) -> Result<Top> {
        let (gpu, h) = (&self.gpu, self.config.hidden);
        let mut x = with.take(batch.rows * h)?;
        embedding::cuda::gather(gpu, &self.embedding, &batch.tokens, &mut x)?;
        for layer in &self.layers {
            signals::check()?;
            let (y, tape) = layer.forward(x, batch, lora, with)?;
            keep(tape)?;
            x = y;
        }
        let (mut normed, mut inv_rms) = (with.take(x.len())?, with.take_f32(batch.needed)?);
        let eps = self.config.norm_eps;
        rmsnorm::cuda::forward(gpu, &x, &self.norm, eps, &mut normed, &mut inv_rms)?;
        let hidden = with.gather(&normed, &batch.of_target.ids, batch.needed)?;
        Ok(Top { last: x, inv_rms, hidden })
    }

    /// As [`super::super::decoder::Decoder::backward`].
    pub fn backward(
        &self,
        tape: Tape,
        dlogp: &[f32],
        lora: &Adapters,
        grads: &mut Gradients,
    ) -> Result<()> {
        let Tape { batch, mut layers, last, inv_rms, hidden, unit_grad, angles, .. } = tape;
        let (gpu, arena, with) = (&self.gpu, &self.arena, self.context(&angles));
        assert_eq!(dlogp.len(), batch.targets.len(), "dlogp must have one entry per target");
        let dlogp = sent(gpu, arena, dlogp)?;
        if let (Some(hidden), Some(at)) = (hidden, lora.shape().index(Site::Head)) {
            let (head, grad) = (self.head(Some(lora)), grads.at(at));
            let tokens = &batch.targets;
            logprob::adapter_backward(gpu, arena, &hidden, tokens, &head, &dlogp, grad.a, grad.b)?;
        }
        if layers.is_empty() {
            return Ok(());
        }
        // Of each needed row the sum over the targets that read it.
        let mut dnormed = with.take(last.len())?;
        let readers = &batch.of_target.readers;
        embedding::cuda::scatter(gpu, &unit_grad, readers, Some(&dlogp), &mut dnormed)?;
        drop(unit_grad);
        let mut d = with.zeros(last.len())?;
        rmsnorm::cuda::backward(gpu, &dnormed, &last, &self.norm, &inv_rms, &mut d)?;
        drop((dnormed, last, inv_rms));

        let lowest = self.layers.len() - layers.len();
        // A block's tape is given back as soon as the way back has passed it.
        let mut next = self.fetched(layers.pop())?;
        for layer in self.layers[lowest..].iter().rev() {
            signals::check()?;
            let kept =
                next.expect("every block from the lowest adapter upwards has left something");
            // What the block below left in the host's memory comes while this one is on its way back.
            next = self.fetched(layers.pop())?;
            let input_needed = layer.index > lowest || !self.options.skipped_gradients;
            let mut tape = match kept {
                Kept::Tape(mut tape) => {
                    layer.gate_and_up_again(&mut tape, lora, with)?;
                    *tape
                }
                Kept::Input(x) => layer.again(x, &batch, lora, with)?,
                Kept::Fetched(copying) => layer.again(copying.wait()?, &batch, lora, with)?,
                Kept::Offloaded(_) => unreachable!("it is fetched before its turn"),
            };
            match layer.backward(d, &mut tape, &batch, input_needed, lora, grads, with)? {
                Some(below) => d = below,
                None => break,
            }
        }
        Ok(())
    }

    /// Has a block's input fetched, if that is where it is.
    fn fetched(&self, kept: Option<Kept>) -> Result<Option<Kept>> {
        let Some(Kept::Offloaded(input)) = kept else { return Ok(kept) };
        let room = self.arena.take(input.len())?;
        Ok(Some(Kept::Fetched(self.offload.fetch(input, room)?)))
    }

    pub(super) fn context<'a>(&'a self, angles: &'a Table) -> Context<'a> {
        Context {
            gpu: &self.gpu,
            arena: &self.arena,
            config: &self.config,
            rope: angles,
            product: Product::Batch,
        }
    }

    /// The rotation's angles for at least so many positions.
    pub(super) fn angles(&self, positions: usize) -> Result<Arc<Table>> {
        let mut known = self.angles.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = known.as_ref().filter(|table| table.positions() >= positions) {
            return Ok(table.clone());
        }
        // What was planned is the first; a text that outgrows it goes on to grow.
        let positions = match &*known {
            None => positions,
            Some(_) => positions.next_power_of_two(),
        };
        let table = Arc::new(Table::new(&self.gpu, &self.rope, positions)?);
        *known = Some(table.clone());
        Ok(table)
    }

    pub(super) fn head<'a>(&'a self, lora: Option<&'a Adapters>) -> Head<'a> {
        let adapter = lora.and_then(|lora| lora.get(Site::Head));
        Head {
            weight: self.head.as_ref().unwrap_or(&self.embedding),
            vocab: self.config.vocab,
            hidden: self.config.hidden,
            adapter: adapter.map(|adapter| LowRank {
                a: adapter.a,
                b: adapter.b,
                rank: adapter.rank,
                scale: adapter.scale,
            }),
            tokens: match self.options.fused_log_probs {
                true => HEAD_TOKENS,
                false => usize::MAX,
            },
        }
    }
}

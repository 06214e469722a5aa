//! The decoder: token log-probs of a packed batch, and the way back to the adapters.
//!
//! T rows, N needed rows (those that targets read), M targets, H hidden width, V vocabulary.

use super::buffers::{Buffer, Pool};
use super::config::ModelConfig;
use super::frozen::Frozen;
use super::layer::{Context, Layer, LayerTape};
use super::linear::Product;
use super::lora::{Adapter, Lora, LoraGrads};
use super::packed::{NeededRows, Others, Packed, Read, WithOthers};
use super::targets::Site;
use crate::config::Gain;
use crate::{Result, signals};
use uft_kernels::logprob::{self, Chunk, Head, LowRank};
use uft_kernels::rope::Rope;
use uft_kernels::{elementwise, embedding, rmsnorm};

/// A decoder with its frozen weights in memory; see [`super::Model::load`].
#[derive(Debug)]
pub struct Decoder {
    pub config: ModelConfig,
    /// `[V, H]`.
    pub(super) embedding: Frozen,
    /// `[V, H]`, or the embedding where they are tied.
    pub(super) head: Option<Frozen>,
    /// `[H]`, before the head.
    pub(super) norm: Vec<f32>,
    pub(super) layers: Vec<Layer>,
    pub(super) rope: Rope,
    pub(super) pool: Pool,
    pub options: Options,
}

/// How a decoder computes. Every choice gives the same numbers but for their last bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The head takes the logits in chunks; without, all of them are in memory at once.
    pub fused_log_probs: bool,
    /// Gradients that nothing reads are left out: below the lowest adapter, and at the top of the model
    /// in rows without targets, which are not even computed on the way forward.
    pub skipped_gradients: bool,
    /// Of the layers that the way back reaches, so many of the lowest keep only their input and are
    /// computed again on the way back, bit for bit.
    pub recomputed_layers: usize,
    /// On a GPU, so many of the layers above those keep all but gate and up, the largest part of their memory,
    /// which are computed again alone, bit for bit.
    pub recomputed_gates: usize,
    /// On a GPU, so many of the lowest layers that keep only their input keep it in the host's memory until the way back
    /// comes near.
    pub offloaded_layers: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            fused_log_probs: true,
            skipped_gradients: true,
            recomputed_layers: 0,
            recomputed_gates: 0,
            offloaded_layers: 0,
        }
    }
}

impl Options {
    /// Everything but what is switched off, and nothing computed again.
    pub fn new(without: &[Gain]) -> Self {
        Self {
            fused_log_probs: !without.contains(&Gain::FusedLogProbs),
            skipped_gradients: !without.contains(&Gain::SkippedGradients),
            ..Self::default()
        }
    }

    /// The lowest layer that the way back has to reach.
    pub fn lowest_layer(&self, lora: &Lora) -> usize {
        match self.skipped_gradients {
            true => lora.lowest_layer(),
            false => 0,
        }
    }

    pub fn chunk(&self) -> Chunk {
        match self.fused_log_probs {
            true => Chunk::FUSED,
            false => Chunk::WHOLE,
        }
    }
}

/// A forward pass, kept for [`Decoder::backward`].
#[derive(Debug)]
pub struct Tape {
    packed: Packed,
    needed: NeededRows,
    /// From the lowest layer with an adapter upwards.
    layers: Vec<Kept>,
    /// `[N, H]`: what the final norm got.
    last: Buffer,
    /// `[N]`.
    inv_rms: Buffer,
    /// `[M, H]`: what the head got; kept only where the head has an adapter.
    hidden: Option<Buffer>,
    /// `[M, H]`: the gradient of each log-prob to `hidden`.
    unit_grad: Buffer,
    /// `[M]`.
    logps: Vec<f32>,
}

/// What a forward pass leaves of one block.
#[derive(Debug)]
enum Kept {
    Tape(Box<LayerTape>),
    /// `[T, H]`: the block is computed again on the way back.
    Input(Buffer),
}

impl Tape {
    /// `[M]`: the log-prob of every target, in the order of the batch's targets.
    pub fn logps(&self) -> &[f32] {
        &self.logps
    }
}

/// The top of the model.
pub(super) struct Top {
    needed: NeededRows,
    /// `[N, H]`.
    last: Buffer,
    /// `[N]`.
    inv_rms: Buffer,
    /// `[M, H]`.
    pub hidden: Buffer,
}

impl Decoder {
    /// Sets addresses aside for so many bytes of activations, so that they lie in one piece.
    pub fn reserve(&self, bytes: usize) {
        self.pool.reserve(bytes);
    }

    /// Most bytes of activations so far.
    pub fn activations(&self) -> usize {
        self.pool.high_water()
    }

    /// The log-prob of every target, `[M]`, without what a way back would need. The same bits as
    /// [`Self::forward`] gives, and with adapters whose B is zero the same bits as without any.
    ///
    /// # Errors
    /// If a signal arrives (see [`signals`]), which is asked for between layers, here and in the rest.
    pub fn logps(&self, packed: &Packed, lora: Option<&Lora>) -> Result<Vec<f32>> {
        if packed.targets.rows.is_empty() {
            return Ok(Vec::new());
        }
        let top = self.run(packed, lora, |_, _| ())?;
        Ok(self.head_logps(&top.hidden, &packed.targets.tokens, lora))
    }

    /// `hidden`: `[M, H]`, what the head gets, `tokens`: `[M]`.
    fn head_logps(&self, hidden: &[f32], tokens: &[u32], lora: Option<&Lora>) -> Vec<f32> {
        let mut logps = vec![0.0; tokens.len()];
        let head = self.head(lora);
        let mut chunk = self.pool.take(head.chunk_len(logps.len()));
        logprob::forward(hidden, tokens, &head, &mut chunk, &mut logps);
        logps
    }

    /// The log-prob of every target, with what [`Self::backward`] needs. The batch must have targets.
    ///
    /// # Errors
    /// As [`Self::logps`].
    pub fn forward(&self, packed: Packed, lora: &Lora) -> Result<Tape> {
        let mut layers = Vec::new();
        let mut keep = self.keep(lora, &mut layers);
        let top = self.run(&packed, Some(lora), |_, tape| keep(tape))?;
        drop(keep);
        Ok(self.tape(packed, layers, top, lora))
    }

    /// As [`Self::forward`] of a batch's own groups, and the log-probs of the others, `[M of all - M of own]`
    /// in the order of `all`: the same bits as apart, with their prompts computed once.
    ///
    /// # Errors
    /// As [`Self::logps`].
    pub fn forward_with_others(&self, batch: WithOthers, lora: &Lora) -> Result<(Tape, Vec<f32>)> {
        let (h, pool) = (self.config.hidden, &self.pool);
        let others = batch.others();
        let own = batch.own;
        let needed = self.needed_of_others(&others);
        let mut x = pool.take(others.tokens.len() * h);
        embedding::gather(&self.embedding, &others.tokens, &mut x);
        let mut layers = Vec::new();
        let mut keep = self.keep(lora, &mut layers);
        let top = self.run(&own, Some(lora), |layer, tape| {
            if others.beside.rows() > 0 {
                let needed = needed.filter(|_| layer.index + 1 == self.layers.len());
                x = layer.forward_beside(
                    &x,
                    &others.beside,
                    needed,
                    &tape,
                    Some(lora),
                    self.context(),
                );
            }
            keep(tape);
        })?;
        drop(keep);
        let hidden = self.hidden_of_others(x, &others, &top.hidden);
        let logps = self.head_logps(&hidden, &others.targets, Some(lora));
        drop(hidden);
        Ok((self.tape(own, layers, top, lora), logps))
    }

    /// The rows of others that go on after the last block's attention, if not all.
    fn needed_of_others<'o>(&self, others: &'o Others) -> Option<&'o [u32]> {
        let fewer = others.needed.len() < others.beside.rows();
        (self.options.skipped_gradients && fewer).then_some(&others.needed)
    }

    /// `[M, H]`: what the head gets for others' targets. `x`: `[N, H]`, what leaves the last block of their
    /// rows; `own`: `[M of the batch, H]`.
    fn hidden_of_others(&self, x: Buffer, others: &Others, own: &[f32]) -> Buffer {
        let (h, pool) = (self.config.hidden, &self.pool);
        let (mut normed, mut inv_rms) = (pool.take(x.len()), pool.take(x.len() / h));
        rmsnorm::forward(&x, &self.norm, self.config.norm_eps, &mut normed, &mut inv_rms);
        let needed = self.needed_of_others(others);
        let mut hidden = pool.take(others.targets.len() * h);
        for (hidden, read) in hidden.chunks_exact_mut(h).zip(&others.read) {
            let (from, at) = match read {
                Read::Target(target) => (own, *target),
                Read::Row(row) => {
                    let among = |needed: &[u32]| needed.binary_search(row).expect("it is read");
                    (&normed[..], needed.map_or(*row as usize, among))
                }
            };
            hidden.copy_from_slice(&from[at * h..][..h]);
        }
        hidden
    }

    /// What to do with the blocks' tapes, lowest first: none is kept below the lowest adapter, and the lowest
    /// of those above leave only their input.
    fn keep<'t>(&self, lora: &Lora, layers: &'t mut Vec<Kept>) -> impl FnMut(LayerTape) + 't {
        let mut below = self.options.lowest_layer(lora);
        let recomputed = self.options.recomputed_layers;
        move |tape| match below {
            0 if layers.len() < recomputed => layers.push(Kept::Input(tape.into_input())),
            0 => layers.push(Kept::Tape(Box::new(tape))),
            _ => below -= 1,
        }
    }

    /// The log-probs of a batch's targets, and everything together for the way back.
    fn tape(&self, packed: Packed, layers: Vec<Kept>, top: Top, lora: &Lora) -> Tape {
        let targets = &packed.targets;
        assert!(!targets.rows.is_empty(), "a batch without trained tokens");
        let Top { needed, last, inv_rms, hidden } = top;
        let mut logps = vec![0.0; targets.rows.len()];
        let mut unit_grad = self.pool.take(hidden.len());
        let head = self.head(Some(lora));
        let mut chunk = self.pool.take(head.chunk_len(logps.len()));
        logprob::forward_with_gradient(
            &hidden,
            &targets.tokens,
            &head,
            &mut chunk,
            &mut logps,
            &mut unit_grad,
        );
        let hidden = Some(hidden).filter(|_| head.adapter.is_some());
        Tape { packed, needed, layers, last, inv_rms, hidden, unit_grad, logps }
    }

    /// The rows that go on after the last block's attention.
    fn needed(&self, packed: &Packed) -> NeededRows {
        match self.options.skipped_gradients {
            true => NeededRows::of(&packed.targets),
            false => NeededRows::all(packed),
        }
    }

    /// Embedding, blocks and final norm; every block's tape goes to `keep`, lowest first.
    pub(super) fn run(
        &self,
        packed: &Packed,
        lora: Option<&Lora>,
        mut keep: impl FnMut(&Layer, LayerTape),
    ) -> Result<Top> {
        let (h, pool) = (self.config.hidden, &self.pool);
        let needed = self.needed(packed);
        let pruned = (needed.rows.len() < packed.rows()).then_some(needed.rows.as_slice());
        let mut x = pool.take(packed.rows() * h);
        embedding::gather(&self.embedding, &packed.tokens, &mut x);
        for layer in &self.layers {
            signals::check()?;
            let needed = pruned.filter(|_| layer.index + 1 == self.layers.len());
            let (y, tape) = layer.forward(x, &packed.layout, needed, lora, self.context());
            keep(layer, tape);
            x = y;
        }
        let (mut normed, mut inv_rms) = (pool.take(x.len()), pool.take(needed.rows.len()));
        rmsnorm::forward(&x, &self.norm, self.config.norm_eps, &mut normed, &mut inv_rms);
        let mut hidden = pool.take(needed.of_target.len() * h);
        embedding::gather(&normed[..], &needed.of_target, &mut hidden);
        Ok(Top { needed, last: x, inv_rms, hidden })
    }

    /// Adds the gradient of a loss to `grads`, from `dlogp`: `[M]`, its gradient to the log-probs.
    /// `lora` must be as it was in [`Self::forward`].
    ///
    /// # Errors
    /// As [`Self::logps`]; `grads` then holds a part of the gradient and is of no use.
    pub fn backward(
        &self,
        tape: Tape,
        dlogp: &[f32],
        lora: &Lora,
        grads: &mut LoraGrads,
    ) -> Result<()> {
        let Tape { packed, needed, mut layers, last, inv_rms, hidden, unit_grad, logps } = tape;
        let targets = &packed.targets;
        assert_eq!(dlogp.len(), targets.rows.len(), "dlogp must have one entry per target");
        let (h, pool) = (self.config.hidden, &self.pool);
        if let (Some(hidden), Some(at)) = (hidden, lora.index(Site::Head)) {
            let (head, grad) = (self.head(Some(lora)), &mut grads.adapters[at]);
            let (da, db) = (&mut grad.a, &mut grad.b);
            let mut chunk = pool.take(head.chunk_len(dlogp.len()));
            let tokens = &targets.tokens;
            logprob::adapter_backward(&hidden, tokens, &head, &mut chunk, &logps, dlogp, da, db);
        }
        if layers.is_empty() {
            return Ok(());
        }
        let mut dhidden = pool.take(unit_grad.len());
        elementwise::scale_rows(&unit_grad, dlogp, &mut dhidden);
        drop(unit_grad);
        let mut dnormed = pool.zeros(last.len());
        for (d, row) in dhidden.chunks_exact(h).zip(&needed.of_target) {
            elementwise::add(&mut dnormed[*row as usize * h..][..h], d);
        }
        drop(dhidden);
        let mut d = pool.zeros(last.len());
        rmsnorm::backward(&dnormed, &last, &self.norm, &inv_rms, &mut d);
        drop((dnormed, last, inv_rms));

        let lowest = self.layers.len() - layers.len();
        let pruned = (needed.rows.len() < packed.rows()).then_some(needed.rows.as_slice());
        // A block's tape is given back as soon as the way back has passed it.
        while let Some(kept) = layers.pop() {
            signals::check()?;
            let layer = &self.layers[lowest + layers.len()];
            let needed = pruned.filter(|_| layer.index + 1 == self.layers.len());
            let input_needed = layer.index > lowest || !self.options.skipped_gradients;
            let tape = match kept {
                Kept::Tape(tape) => *tape,
                Kept::Input(x) => layer.again(x, &packed.layout, needed, lora, self.context()),
            };
            let below = layer.backward(
                d,
                &tape,
                &packed.layout,
                needed,
                input_needed,
                lora,
                grads,
                self.context(),
            );
            match below {
                Some(below) => d = below,
                None => break,
            }
        }
        Ok(())
    }

    pub(super) fn context(&self) -> Context<'_> {
        Context {
            config: &self.config,
            rope: &self.rope,
            pool: &self.pool,
            product: Product::Batch,
        }
    }

    pub(super) fn head<'a>(&'a self, lora: Option<&'a Lora>) -> Head<'a> {
        let adapter = lora.and_then(|lora| lora.get(Site::Head));
        Head {
            weight: self.head.as_ref().unwrap_or(&self.embedding).into(),
            vocab: self.config.vocab,
            hidden: self.config.hidden,
            adapter: adapter.map(|Adapter { a, b, rank, scale, .. }| LowRank {
                a,
                b,
                rank: *rank,
                scale: *scale,
            }),
            chunk: self.options.chunk(),
        }
    }
}

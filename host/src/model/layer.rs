//! One decoder block, forward and, read upwards, backward.
//!
//! ```text
//! h    = norm(x)                      q, k, v = h Wq, h Wk, h Wv      (+ adapters, as everywhere)
//! q, k = rotate(norm_q(q)), rotate(norm_k(k))                         (norms: Qwen3)
//! mid  = x + attention(q, k, v) Wo
//! h    = norm(mid)                    y = mid + (silu(h Wgate) ⊙ (h Wup)) Wdown
//! ```
//!
//! T rows, H hidden width, D head_dim, Q = heads D, K = kv_heads D, I feed-forward width, r rank.
//! In the last block only the N rows that targets read go on after the attention; elsewhere N = T.
//!
//! The tape keeps the results of large products and of attention. Normed inputs and the activation
//! are computed again on the way back: a pass over memory each, against a third less to keep. Where memory
//! is short, only the block's input is kept, and [`Layer::again`] makes the tape anew.

use super::buffers::{Buffer, Pool};
use super::config::ModelConfig;
use super::frozen::Frozen;
use super::linear::{self, Linear, Output, Product, project};
use super::lora::{Adapter, Lora, LoraGrads};
use super::targets::{Projection, Site};
use super::weights;
use uft_kernels::layout::{Beside, Layout};
use uft_kernels::rope::Rope;
use uft_kernels::{attention, embedding, rmsnorm, swiglu};

/// The frozen weights of a block, in memory.
pub type Layer = weights::Layer<Frozen, Vec<f32>>;

/// What all blocks have in common.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    pub config: &'a ModelConfig,
    pub rope: &'a Rope,
    pub pool: &'a Pool,
    /// The product of linear layers: one for batches, one for a token at a time.
    pub product: Product,
}

/// What the way back needs of one block.
#[derive(Debug)]
pub struct LayerTape {
    x: Buffer, // [T, H]
    inputs: AttentionInputs,
    attended: Buffer, // [T, Q]
    lse: Buffer,      // [T, heads]
    outputs: Outputs,
}

impl LayerTape {
    /// k and v, `[T, K]` each.
    pub fn keys_and_values(&self) -> [&[f32]; 2] {
        [&self.inputs.k, &self.inputs.v]
    }

    /// The block's input alone, `[T, H]`.
    pub fn into_input(self) -> Buffer {
        self.x
    }
}

/// Queries, keys and values, ready for attention.
#[derive(Debug)]
pub struct AttentionInputs {
    inv_rms: Buffer, // [T]
    pub q: Buffer,   // [T, Q]
    pub k: Buffer,   // [T, K]
    pub v: Buffer,   // [T, K]
    head_norms: Option<[HeadNorm; 2]>,
    u: [Option<Buffer>; 3], // [T, r] of q, k, v
}

/// The norm of q's or k's heads.
#[derive(Debug)]
struct HeadNorm {
    before: Buffer,  // [T, heads, D]
    inv_rms: Buffer, // [T, heads]
}

/// What follows the attention.
#[derive(Debug)]
struct Outputs {
    mid: Buffer,            // [N, H]
    inv_rms: Buffer,        // [N]
    gate: Buffer,           // [N, I]
    up: Buffer,             // [N, I]
    u: [Option<Buffer>; 4], // [N, r] of o, gate, up, down
}

use Projection::{Down, Gate, K, O, Q, Up, V};

impl Layer {
    /// `x`: `[T, H]`. Returns `[N, H]` for the rows `needed`, or for all, and the tape.
    pub fn forward(
        &self,
        x: Buffer,
        layout: &Layout,
        needed: Option<&[u32]>,
        lora: Option<&Lora>,
        with: Context,
    ) -> (Buffer, LayerTape) {
        let mut tape = self.before_down(x, layout, needed, lora, with);
        let y = self.last_product(&mut tape.outputs, lora, with);
        (y, tape)
    }

    /// [`Self::forward`] for responses `beside` a batch, whose prompts' keys and values are in its `tape`:
    /// nothing of them is kept. `x`: `[T, H]`.
    pub fn forward_beside(
        &self,
        x: &[f32],
        beside: &Beside,
        needed: Option<&[u32]>,
        tape: &LayerTape,
        lora: Option<&Lora>,
        with: Context,
    ) -> Buffer {
        let (heads, window) = (&with.config.heads, self.window(with));
        let AttentionInputs { q, k, v, .. } =
            &self.attention_inputs(x, &beside.positions, lora, with);
        let mut attended = with.pool.take(q.len());
        let prompts = tape.keys_and_values();
        attention::forward_beside(q, k, v, prompts, beside, heads, window, &mut attended);
        let mut outputs = self.going_on(x, &attended, needed, lora, with);
        self.last_product(&mut outputs, lora, with)
    }

    /// The tape of [`Self::forward`] once more, bit for bit, without the block's output.
    pub fn again(
        &self,
        x: Buffer,
        layout: &Layout,
        needed: Option<&[u32]>,
        lora: &Lora,
        with: Context,
    ) -> LayerTape {
        let mut tape = self.before_down(x, layout, needed, Some(lora), with);
        let adapters = self.adapters([Down], Some(lora));
        if adapters[0].is_some() {
            let Outputs { gate, up, u, .. } = &mut tape.outputs;
            let mut act = with.pool.take(gate.len());
            swiglu::forward(gate, up, &mut act);
            [u[3]] = project(&act, adapters, with);
        }
        tape
    }

    /// Everything but the last product; the tape lacks what that one keeps.
    fn before_down(
        &self,
        x: Buffer,
        layout: &Layout,
        needed: Option<&[u32]>,
        lora: Option<&Lora>,
        with: Context,
    ) -> LayerTape {
        let (heads, pool) = (&with.config.heads, with.pool);
        let inputs = self.attention_inputs(&x, &layout.positions, lora, with);
        let mut attended = pool.take(inputs.q.len());
        let mut lse = pool.take(layout.rows() * heads.heads);
        let AttentionInputs { q, k, v, .. } = &inputs;
        attention::forward(q, k, v, layout, heads, self.window(with), &mut attended, &mut lse);
        let outputs = self.going_on(&x, &attended, needed, lora, with);
        LayerTape { x, inputs, attended, lse, outputs }
    }

    /// [`Self::outputs`] of the rows `needed`, or of all. `x`: `[T, H]`, `attended`: `[T, Q]`.
    fn going_on(
        &self,
        x: &[f32],
        attended: &[f32],
        needed: Option<&[u32]>,
        lora: Option<&Lora>,
        with: Context,
    ) -> Outputs {
        match needed {
            None => self.outputs(x, attended, lora, with),
            Some(rows) => {
                let attended = gather(attended, rows, with.config.query_width(), with.pool);
                let x = gather(x, rows, with.config.hidden, with.pool);
                self.outputs(&x, &attended, lora, with)
            }
        }
    }

    /// Everything before the attention. `x`: `[T, H]`, `positions`: `[T]`.
    fn attention_inputs(
        &self,
        x: &[f32],
        positions: &[u32],
        lora: Option<&Lora>,
        with: Context,
    ) -> AttentionInputs {
        let (config, pool, rows) = (with.config, with.pool, positions.len());
        let (query_width, key_width) = (config.query_width(), config.key_width());
        let (mut h, mut inv_rms) = (pool.take(x.len()), pool.take(rows));
        rmsnorm::forward(x, &self.input_norm, config.norm_eps, &mut h, &mut inv_rms);
        let mut q = pool.take(rows * query_width);
        let mut k = pool.take(rows * key_width);
        let mut v = pool.take(rows * key_width);
        let adapters = self.adapters([Q, K, V], lora);
        let u = project(&h, adapters, with);
        let [of_q, of_k, of_v] = [0, 1, 2].map(|i| adapters[i].zip(u[i].as_ref()));
        self.q.forward(&h, of_q, &mut q, 0.0, with.product);
        self.k.forward(&h, of_k, &mut k, 0.0, with.product);
        self.v.forward(&h, of_v, &mut v, 0.0, with.product);
        let head_norms = self.head_norms.as_ref().map(|[q_norm, k_norm]| {
            [(&mut q, q_norm), (&mut k, k_norm)].map(|(x, weight)| {
                let mut normed = pool.take(x.len());
                let mut inv_rms = pool.take(x.len() / weight.len());
                rmsnorm::forward(x, weight, config.norm_eps, &mut normed, &mut inv_rms);
                HeadNorm { before: std::mem::replace(x, normed), inv_rms }
            })
        });
        with.rope.forward(&mut q, config.heads.heads, positions);
        with.rope.forward(&mut k, config.heads.kv_heads, positions);
        AttentionInputs { inv_rms, q, k, v, head_norms, u }
    }

    /// What follows the attention, up to the last product. `x`: `[N, H]`, `attended`: `[N, Q]`.
    fn outputs(&self, x: &[f32], attended: &[f32], lora: Option<&Lora>, with: Context) -> Outputs {
        let (config, pool) = (with.config, with.pool);
        let rows = x.len() / config.hidden;
        let mut mid = pool.copy(x);
        let [of_o] = self.adapters([O], lora);
        let [u_o] = project(attended, [of_o], with);
        self.o.forward(attended, of_o.zip(u_o.as_ref()), &mut mid, 1.0, with.product);
        let (mut h, mut inv_rms) = (pool.take(x.len()), pool.take(rows));
        rmsnorm::forward(&mid, &self.mlp_norm, config.norm_eps, &mut h, &mut inv_rms);
        let mut gate = pool.take(rows * config.intermediate);
        let mut up = pool.take(rows * config.intermediate);
        let [of_gate, of_up] = self.adapters([Gate, Up], lora);
        let [u_gate, u_up] = project(&h, [of_gate, of_up], with);
        self.gate.forward(&h, of_gate.zip(u_gate.as_ref()), &mut gate, 0.0, with.product);
        self.up.forward(&h, of_up.zip(u_up.as_ref()), &mut up, 0.0, with.product);
        Outputs { mid, inv_rms, gate, up, u: [u_o, u_gate, u_up, None] }
    }

    /// y: `[N, H]`.
    fn last_product(&self, outputs: &mut Outputs, lora: Option<&Lora>, with: Context) -> Buffer {
        let Outputs { mid, gate, up, u, .. } = outputs;
        let mut act = with.pool.take(gate.len());
        swiglu::forward(gate, up, &mut act);
        let mut y = with.pool.copy(mid);
        let [of_down] = self.adapters([Down], lora);
        [u[3]] = project(&act, [of_down], with);
        self.down.forward(&act, of_down.zip(u[3].as_ref()), &mut y, 1.0, with.product);
        y
    }

    /// The block for one new token of a text: `x`: `[H]` at position `n`, with the keys and values
    /// of positions 0 to n-1 in `k_cache` and `v_cache`, which get the new ones: `[n + 1, K]`.
    pub fn decode(
        &self,
        x: Buffer,
        k_cache: &mut Vec<f32>,
        v_cache: &mut Vec<f32>,
        lora: Option<&Lora>,
        with: Context,
    ) -> Buffer {
        let n = k_cache.len() / with.config.key_width();
        let inputs = self.attention_inputs(&x, &[n as u32], lora, with);
        k_cache.extend_from_slice(&inputs.k);
        v_cache.extend_from_slice(&inputs.v);
        let mut attended = with.pool.take(inputs.q.len());
        let (heads, window) = (&with.config.heads, self.window(with));
        attention::decode(&inputs.q, k_cache, v_cache, n + 1, heads, window, &mut attended);
        let mut outputs = self.outputs(&x, &attended, lora, with);
        self.last_product(&mut outputs, lora, with)
    }

    /// Turns `d`, the gradient to the block's output `[N, H]`, into that to its input `[T, H]`,
    /// which is `None` where `input_needed` is false. Adds to the adapters' gradients.
    pub fn backward(
        &self,
        mut d: Buffer,
        tape: &LayerTape,
        layout: &Layout,
        needed: Option<&[u32]>,
        input_needed: bool,
        lora: &Lora,
        grads: &mut LoraGrads,
        with: Context,
    ) -> Option<Buffer> {
        let (config, pool) = (with.config, with.pool);
        let mut back = Back { layer: self.index, lora, grads, pool };
        let below_o = input_needed || back.any(&[Q, K, V]);
        let below_mlp = below_o || back.any(&[O]);
        if !self.mlp_backward(&mut d, &tape.outputs, below_mlp, &mut back, with) {
            return None;
        }

        let gathered = needed.map(|rows| gather(&tape.attended, rows, config.query_width(), pool));
        let attended = gathered.as_ref().unwrap_or(&tape.attended);
        let mut dattended = below_o.then(|| pool.take(attended.len()));
        let o = (&self.o, O, &d, &tape.outputs.u[0]);
        back.linears(attended, [o], dattended.as_deref_mut());
        let mut dattended = dattended?;
        if let Some(rows) = needed {
            d = scatter(&d, rows, layout.rows(), pool);
            dattended = scatter(&dattended, rows, layout.rows(), pool);
        }

        let AttentionInputs { inv_rms, q, k, v, head_norms, u } = &tape.inputs;
        let (mut dq, mut dk, mut dv) = (pool.take(q.len()), pool.take(k.len()), pool.take(v.len()));
        let (heads, window) = (&config.heads, self.window(with));
        attention::backward(
            &dattended,
            q,
            k,
            v,
            &tape.attended,
            &tape.lse,
            layout,
            heads,
            window,
            &mut dq,
            &mut dk,
            &mut dv,
        );
        with.rope.backward(&mut dq, heads.heads, &layout.positions);
        with.rope.backward(&mut dk, heads.kv_heads, &layout.positions);
        if let (Some(weights), Some(norms)) = (&self.head_norms, head_norms) {
            for ((dx, weight), norm) in [&mut dq, &mut dk].into_iter().zip(weights).zip(norms) {
                let mut before = pool.zeros(dx.len());
                rmsnorm::backward(dx, &norm.before, weight, &norm.inv_rms, &mut before);
                *dx = before;
            }
        }

        let mut h = pool.take(tape.x.len());
        rmsnorm::forward(
            &tape.x,
            &self.input_norm,
            config.norm_eps,
            &mut h,
            &mut pool.take(inv_rms.len()),
        );
        let mut dh = input_needed.then(|| pool.take(h.len()));
        let each = [(&self.q, Q, &dq, &u[0]), (&self.k, K, &dk, &u[1]), (&self.v, V, &dv, &u[2])];
        back.linears(&h, each, dh.as_deref_mut());
        let dh = dh?;
        rmsnorm::backward(&dh, &tape.x, &self.input_norm, inv_rms, &mut d);
        Some(d)
    }

    /// The feed-forward part: turns `d` from the gradient to y into that to mid, both `[N, H]`, if
    /// `below_needed`, which it returns.
    fn mlp_backward(
        &self,
        d: &mut Buffer,
        tape: &Outputs,
        below_needed: bool,
        back: &mut Back,
        with: Context,
    ) -> bool {
        let (config, pool) = (with.config, with.pool);
        let Outputs { mid, inv_rms, gate, up, u } = tape;
        let below_act = below_needed || back.any(&[Gate, Up]);
        let mut act = pool.take(gate.len());
        if back.any(&[Down]) {
            swiglu::forward(gate, up, &mut act);
        }
        let mut dact = below_act.then(|| pool.take(gate.len()));
        back.linears(&act, [(&self.down, Down, &*d, &u[3])], dact.as_deref_mut());
        drop(act);
        let Some(dact) = dact else { return false };
        let (mut dgate, mut dup) = (pool.take(gate.len()), pool.take(up.len()));
        swiglu::backward(&dact, gate, up, &mut dgate, &mut dup);
        drop(dact);

        let mut h = pool.take(mid.len());
        rmsnorm::forward(
            mid,
            &self.mlp_norm,
            config.norm_eps,
            &mut h,
            &mut pool.take(inv_rms.len()),
        );
        let mut dh = below_needed.then(|| pool.take(h.len()));
        let each = [(&self.gate, Gate, &dgate, &u[1]), (&self.up, Up, &dup, &u[2])];
        back.linears(&h, each, dh.as_deref_mut());
        let Some(dh) = dh else { return false };
        rmsnorm::backward(&dh, mid, &self.mlp_norm, inv_rms, d);
        true
    }

    fn window(&self, with: Context) -> Option<usize> {
        with.config.windows[self.index]
    }

    fn adapters<'a, const N: usize>(
        &self,
        projections: [Projection; N],
        lora: Option<&'a Lora>,
    ) -> [Option<&'a Adapter>; N] {
        projections.map(|projection| lora?.get(Site::Layer(self.index, projection)))
    }
}

/// The adapters of one block on the way back.
struct Back<'a> {
    layer: usize,
    lora: &'a Lora,
    grads: &'a mut LoraGrads,
    pool: &'a Pool,
}

impl Back<'_> {
    /// Whether any of the projections has an adapter.
    fn any(&self, projections: &[Projection]) -> bool {
        projections.iter().any(|p| self.lora.index(Site::Layer(self.layer, *p)).is_some())
    }

    /// [`linear::backward`] of layers with the same x: each with the gradient to its output, and with u where
    /// its projection has an adapter.
    fn linears<const N: usize>(
        &mut self,
        x: &[f32],
        outputs: [(&Linear, Projection, &Buffer, &Option<Buffer>); N],
        dx: Option<&mut [f32]>,
    ) {
        let Self { layer, lora, pool, .. } = *self;
        let outputs = outputs.map(|(linear, projection, dy, u)| {
            let adapter = lora.index(Site::Layer(layer, projection)).zip(u.as_ref());
            Output { linear, dy, adapter }
        });
        linear::backward(x, &outputs, dx, lora, self.grads, pool);
    }
}

/// The rows `rows` of `x`: `[T, width]`.
fn gather(x: &[f32], rows: &[u32], width: usize, pool: &Pool) -> Buffer {
    let mut out = pool.take(rows.len() * width);
    embedding::gather(x, rows, &mut out);
    out
}

/// `[total, width]` with `x`'s rows at `rows` and zeros elsewhere.
fn scatter(x: &[f32], rows: &[u32], total: usize, pool: &Pool) -> Buffer {
    let width = x.len() / rows.len();
    let mut out = pool.zeros(total * width);
    for (x, row) in x.chunks_exact(width).zip(rows) {
        out[*row as usize * width..][..width].copy_from_slice(x);
    }
    out
}

//! One decoder block, forward and, read upwards, backward; the twin of [`super::super::layer`], where the
//! formulas, the shapes and what the tape keeps are said.

use super::Context;
use super::adapters::{Adapter, Adapters, Gradients};
use super::batch::{Batch, DeviceLayout};
use super::linear::{Linear, Trained};
use super::tape::{AttentionInputs, HeadNorm, LayerTape, Outputs};
use crate::Result;
use crate::model::targets::{Projection, Site};
use crate::model::weights;
use half::bf16;
use uft_kernels::cuda::{DeviceBuffer, DeviceSlice};
use uft_kernels::{attention, embedding, rmsnorm, rope};

type Buffer = DeviceBuffer<bf16>;

/// The frozen weights of a block, on a device.
pub type Layer = weights::Layer<Buffer, Buffer>;

/// Keys and values of a text in the making, with room for more: `[capacity, K]` each.
pub struct KeyValues {
    pub keys: Buffer,
    pub values: Buffer,
}

use Projection::{Down, Gate, K, O, Q, Up, V};

impl Layer {
    /// `x`: `[T, H]`. Returns `[N, H]` for the rows that go on, and the tape.
    pub fn forward(
        &self,
        x: Buffer,
        batch: &Batch,
        lora: Option<&Adapters>,
        with: Context,
    ) -> Result<(Buffer, LayerTape)> {
        let (mut tape, act) = self.before_down(x, batch, lora, with)?;
        let y = self.last_product(&mut tape.outputs, &act, lora, with)?;
        Ok((y, tape))
    }

    /// The tape of [`Self::forward`] once more, bit for bit, without the block's output.
    pub fn again(
        &self,
        x: Buffer,
        batch: &Batch,
        lora: &Adapters,
        with: Context,
    ) -> Result<LayerTape> {
        let (mut tape, act) = self.before_down(x, batch, Some(lora), with)?;
        if let Some(adapter) = self.adapter(Down, Some(lora)) {
            tape.outputs.u[3] = Some(self.down.project(&act, adapter, with)?);
        }
        Ok(tape)
    }

    /// Gate and up once more, bit for bit, where the tape was kept without them.
    pub fn gate_and_up_again(
        &self,
        tape: &mut LayerTape,
        lora: &Adapters,
        with: Context,
    ) -> Result<()> {
        let Outputs { mid, inv_rms, gate_and_up, u } = &mut tape.outputs;
        if gate_and_up.is_some() {
            return Ok(());
        }
        let rows = inv_rms.len();
        let h = normed(mid, &self.mlp_norm, rows, with)?;
        let again = |linear: &Linear, projection, u: &Option<Buffer>| -> Result<Buffer> {
            let mut y = with.take(rows * with.config.intermediate)?;
            let adapter = self.adapter(projection, Some(lora));
            linear.product(&h, adapter, u, &mut y, 0.0, with)?;
            Ok(y)
        };
        *gate_and_up = Some([again(&self.gate, Gate, &u[1])?, again(&self.up, Up, &u[2])?]);
        Ok(())
    }

    /// Everything but the last product, whose input `[N, I]` comes second; the tape lacks what that one keeps.
    fn before_down(
        &self,
        x: Buffer,
        batch: &Batch,
        lora: Option<&Adapters>,
        with: Context,
    ) -> Result<(LayerTape, Buffer)> {
        let (heads, DeviceLayout { positions, .. }) = (&with.config.heads, &batch.layout);
        let inputs = self.attention_inputs(&x, positions, lora, with)?;
        let mut attended = with.take(inputs.q.len())?;
        let mut lse = with.take_f32(batch.rows * heads.heads)?;
        let AttentionInputs { q, k, v, .. } = &inputs;
        let (schedule, tables) = batch.layout.schedule(self.window(with));
        attention::cuda::forward(with.gpu, q, k, v, schedule, tables, &mut attended, &mut lse)?;
        let (outputs, act) = match batch.needed_after(self.index, with.config) {
            None => self.outputs(&x, &attended, lora, with)?,
            Some(rows) => {
                let attended = with.gather(&attended, &rows.ids, batch.rows)?;
                self.outputs(&with.gather(&x, &rows.ids, batch.rows)?, &attended, lora, with)?
            }
        };
        Ok((LayerTape { x, inputs, attended, lse, outputs }, act))
    }

    /// Everything before the attention. `x`: `[T, H]`, `positions`: `[T]`.
    fn attention_inputs(
        &self,
        x: &DeviceSlice<bf16>,
        positions: &DeviceSlice<u32>,
        lora: Option<&Adapters>,
        with: Context,
    ) -> Result<AttentionInputs> {
        let (config, gpu, rows) = (with.config, with.gpu, positions.len());
        let (query_width, key_width) = (config.query_width(), config.key_width());
        let (mut h, mut inv_rms) = (with.take(x.len())?, with.take_f32(rows)?);
        rmsnorm::cuda::forward(gpu, x, &self.input_norm, config.norm_eps, &mut h, &mut inv_rms)?;
        let mut q = with.take(rows * query_width)?;
        let mut k = with.take(rows * key_width)?;
        let mut v = with.take(rows * key_width)?;
        let mut head_norms = None;
        let [for_q, for_k, for_v] = [Q, K, V].map(|projection| self.adapter(projection, lora));
        let (u_q, u_k);
        if let Some([q_norm, k_norm]) = &self.head_norms {
            u_q = self.q.forward(&h, for_q, &mut q, 0.0, with)?;
            u_k = self.k.forward(&h, for_k, &mut k, 0.0, with)?;
            head_norms = Some([head_norm(&mut q, q_norm, with)?, head_norm(&mut k, k_norm, with)?]);
            rope::cuda::forward(gpu, with.rope, &mut q, config.heads.heads, positions)?;
            rope::cuda::forward(gpu, with.rope, &mut k, config.heads.kv_heads, positions)?;
        } else {
            u_q = self.q.forward_rotated(&h, for_q, &mut q, positions, with)?;
            u_k = self.k.forward_rotated(&h, for_k, &mut k, positions, with)?;
        }
        let u_v = self.v.forward(&h, for_v, &mut v, 0.0, with)?;
        Ok(AttentionInputs { inv_rms, q, k, v, head_norms, u: [u_q, u_k, u_v] })
    }

    /// What follows the attention, up to the last product, whose input `[N, I]` comes second. `x`: `[N, H]`, `attended`:
    /// `[N, Q]`.
    fn outputs(
        &self,
        x: &DeviceSlice<bf16>,
        attended: &DeviceSlice<bf16>,
        lora: Option<&Adapters>,
        with: Context,
    ) -> Result<(Outputs, Buffer)> {
        let (config, gpu) = (with.config, with.gpu);
        let rows = x.len() / config.hidden;
        let mut mid = with.copy(x)?;
        let u_o = self.o.forward(attended, self.adapter(O, lora), &mut mid, 1.0, with)?;
        let (mut h, mut inv_rms) = (with.take(x.len())?, with.take_f32(rows)?);
        rmsnorm::cuda::forward(gpu, &mid, &self.mlp_norm, config.norm_eps, &mut h, &mut inv_rms)?;
        let mut gate = with.take(rows * config.intermediate)?;
        let mut up = with.take(rows * config.intermediate)?;
        let mut act = with.take(gate.len())?;
        let (layers, adapters) =
            ([&self.gate, &self.up], [Gate, Up].map(|projection| self.adapter(projection, lora)));
        let [u_gate, u_up] =
            Linear::forward_activated(layers, &h, adapters, &mut gate, &mut up, &mut act, with)?;
        let (gate_and_up, u) = (Some([gate, up]), [u_o, u_gate, u_up, None]);
        Ok((Outputs { mid, inv_rms, gate_and_up, u }, act))
    }

    /// y: `[N, H]`.
    fn last_product(
        &self,
        outputs: &mut Outputs,
        act: &DeviceSlice<bf16>,
        lora: Option<&Adapters>,
        with: Context,
    ) -> Result<Buffer> {
        let mut y = with.copy(&outputs.mid)?;
        outputs.u[3] = self.down.forward(act, self.adapter(Down, lora), &mut y, 1.0, with)?;
        Ok(y)
    }

    /// The block for one new token of a text: `x`: `[H]` at position `n`, whose number is in `position`: `[1]`,
    /// with the keys and values of positions 0 to n-1 in `cache`, which gets the new ones and must have room
    /// for them.
    pub fn decode(
        &self,
        x: Buffer,
        n: usize,
        position: &DeviceSlice<u32>,
        cache: &mut KeyValues,
        lora: Option<&Adapters>,
        with: Context,
    ) -> Result<Buffer> {
        let (heads, window, width) =
            (&with.config.heads, self.window(with), with.config.key_width());
        let inputs = self.attention_inputs(&x, position, lora, with)?;
        let KeyValues { keys, values } = cache;
        with.gpu.copy(&inputs.k, &mut keys[n * width..(n + 1) * width])?;
        with.gpu.copy(&inputs.v, &mut values[n * width..(n + 1) * width])?;
        let mut attended = with.take(inputs.q.len())?;
        // For all positions that there are going to be, so that every token takes the same.
        let most = keys.len() / width;
        let mut partial = with.take_f32(attention::cuda::decode_room(most, heads, window))?;
        attention::cuda::decode(
            with.gpu,
            &inputs.q,
            keys,
            values,
            n + 1,
            heads,
            window,
            &mut partial,
            &mut attended,
        )?;
        let (mut outputs, act) = self.outputs(&x, &attended, lora, with)?;
        self.last_product(&mut outputs, &act, lora, with)
    }

    /// Turns `d`, the gradient to the block's output `[N, H]`, into that to its input `[T, H]`,
    /// which is `None` where `input_needed` is false. Adds to the adapters' gradients.
    pub fn backward(
        &self,
        mut d: Buffer,
        tape: &LayerTape,
        batch: &Batch,
        input_needed: bool,
        lora: &Adapters,
        grads: &mut Gradients,
        with: Context,
    ) -> Result<Option<Buffer>> {
        let (config, gpu) = (with.config, with.gpu);
        let needed = batch.needed_after(self.index, config);
        let mut back = Back { layer: self.index, lora, grads, with };
        let below_o = input_needed || back.any(&[Q, K, V]);
        let below_mlp = below_o || back.any(&[O]);
        if !self.mlp_backward(&mut d, &tape.outputs, below_mlp, &mut back)? {
            return Ok(None);
        }

        let gathered = needed.map(|rows| with.gather(&tape.attended, &rows.ids, batch.rows));
        let gathered = gathered.transpose()?;
        let attended = gathered.as_ref().unwrap_or(&tape.attended);
        let mut dattended = below_o.then(|| with.take(attended.len())).transpose()?;
        let u = &tape.outputs.u[0];
        let dx = dattended.as_deref_mut().map(|dx| (dx, 0.0));
        back.linear(&self.o, O, &d, Some(attended), u, dx)?;
        let Some(mut dattended) = dattended else { return Ok(None) };
        if let Some(rows) = needed {
            for (gradient, width) in
                [(&mut d, config.hidden), (&mut dattended, config.query_width())]
            {
                let mut all = with.take(batch.rows * width)?;
                embedding::cuda::scatter(gpu, gradient, &rows.readers, None, &mut all)?;
                *gradient = all;
            }
        }

        let AttentionInputs { inv_rms, q, k, v, head_norms, u } = &tape.inputs;
        let (mut dq, mut dk) = (with.take(q.len())?, with.take(k.len())?);
        let mut dv = with.take(v.len())?;
        let (schedule, tables) = batch.layout.schedule(self.window(with));
        let mut delta = with.take_f32(tape.lse.len())?;
        attention::cuda::backward(
            gpu,
            &dattended,
            q,
            k,
            v,
            &tape.attended,
            &tape.lse,
            schedule,
            tables,
            &mut delta,
            &mut dq,
            &mut dk,
            &mut dv,
        )?;
        drop((delta, dattended));
        let (heads, positions) = (&config.heads, &batch.layout.positions);
        rope::cuda::backward(gpu, with.rope, &mut dq, heads.heads, positions)?;
        rope::cuda::backward(gpu, with.rope, &mut dk, heads.kv_heads, positions)?;
        if let (Some(weights), Some(norms)) = (&self.head_norms, head_norms) {
            for ((dx, weight), norm) in [&mut dq, &mut dk].into_iter().zip(weights).zip(norms) {
                let mut before = with.zeros(dx.len())?;
                rmsnorm::cuda::backward(gpu, dx, &norm.before, weight, &norm.inv_rms, &mut before)?;
                *dx = before;
            }
        }

        let each = [(&self.q, Q, &dq, &u[0]), (&self.k, K, &dk, &u[1]), (&self.v, V, &dv, &u[2])];
        // Only adapters read what was normed.
        let h = match back.any(&[Q, K, V]) {
            true => Some(normed(&tape.x, &self.input_norm, inv_rms.len(), with)?),
            false => None,
        };
        let mut dh = input_needed.then(|| with.take(tape.x.len())).transpose()?;
        for (i, (linear, projection, dy, u)) in each.into_iter().enumerate() {
            let beta = if i == 0 { 0.0 } else { 1.0 };
            let dx = dh.as_deref_mut().map(|dx| (dx, beta));
            back.linear(linear, projection, dy, h.as_deref(), u, dx)?;
        }
        let Some(dh) = dh else { return Ok(None) };
        rmsnorm::cuda::backward(gpu, &dh, &tape.x, &self.input_norm, inv_rms, &mut d)?;
        Ok(Some(d))
    }

    /// The feed-forward part: turns `d` from the gradient to y into that to mid, both `[N, H]`, if
    /// `below_needed`, which it returns.
    fn mlp_backward(
        &self,
        d: &mut Buffer,
        tape: &Outputs,
        below_needed: bool,
        back: &mut Back,
    ) -> Result<bool> {
        let with = back.with;
        let gpu = with.gpu;
        let Outputs { mid, inv_rms, u, .. } = tape;
        let [gate, up] = tape.gate_and_up();
        let below_act = below_needed || back.any(&[Gate, Up]);
        let act = if back.any(&[Down]) { Some(tape.act(with)?) } else { None };
        let pulled = self.down.pull(d, act.as_deref(), back.trained(Down, &u[3]), with)?;
        drop(act);
        if !below_act {
            return Ok(false);
        }
        let (mut dgate, mut dup) = (with.take(gate.len())?, with.take(up.len())?);
        self.down.backward_activated(d, pulled, [gate, up], &mut dgate, &mut dup, with)?;

        let h = match back.any(&[Gate, Up]) {
            true => Some(normed(mid, &self.mlp_norm, inv_rms.len(), with)?),
            false => None,
        };
        let mut dh = below_needed.then(|| with.take(mid.len())).transpose()?;
        let h = h.as_deref();
        let dx = dh.as_deref_mut().map(|dx| (dx, 0.0));
        back.linear(&self.gate, Gate, &dgate, h, &u[1], dx)?;
        let dx = dh.as_deref_mut().map(|dx| (dx, 1.0));
        back.linear(&self.up, Up, &dup, h, &u[2], dx)?;
        let Some(dh) = dh else { return Ok(false) };
        rmsnorm::cuda::backward(gpu, &dh, mid, &self.mlp_norm, inv_rms, d)?;
        Ok(true)
    }

    fn window(&self, with: Context) -> Option<usize> {
        with.config.windows[self.index]
    }

    fn adapter<'a>(
        &self,
        projection: Projection,
        lora: Option<&'a Adapters>,
    ) -> Option<Adapter<'a>> {
        lora.and_then(|lora| lora.get(Site::Layer(self.index, projection)))
    }
}

/// The norm of the heads of `x`, which receives the result.
fn head_norm(x: &mut Buffer, weight: &DeviceSlice<bf16>, with: Context) -> Result<HeadNorm> {
    let mut normed = with.take(x.len())?;
    let mut inv_rms = with.take_f32(x.len() / weight.len())?;
    let eps = with.config.norm_eps;
    rmsnorm::cuda::forward(with.gpu, x, weight, eps, &mut normed, &mut inv_rms)?;
    Ok(HeadNorm { before: std::mem::replace(x, normed), inv_rms })
}

/// What a norm of `rows` rows gave on the way forward.
fn normed(
    x: &DeviceSlice<bf16>,
    weight: &DeviceSlice<bf16>,
    rows: usize,
    with: Context,
) -> Result<Buffer> {
    let (mut h, mut inv_rms) = (with.take(x.len())?, with.take_f32(rows)?);
    rmsnorm::cuda::forward(with.gpu, x, weight, with.config.norm_eps, &mut h, &mut inv_rms)?;
    Ok(h)
}

/// The adapters of one block on the way back.
struct Back<'a> {
    layer: usize,
    lora: &'a Adapters,
    grads: &'a mut Gradients,
    with: Context<'a>,
}

impl Back<'_> {
    /// Whether any of the projections has an adapter.
    fn any(&self, projections: &[Projection]) -> bool {
        projections.iter().any(|p| self.lora.shape().index(Site::Layer(self.layer, *p)).is_some())
    }

    /// [`Linear::backward`] with the projection's adapter, if there is one.
    fn linear(
        &mut self,
        linear: &Linear,
        projection: Projection,
        dy: &DeviceSlice<bf16>,
        x: Option<&DeviceSlice<bf16>>,
        u: &Option<Buffer>,
        dx: Option<(&mut DeviceSlice<bf16>, f32)>,
    ) -> Result<()> {
        let with = self.with;
        linear.backward(dy, x, self.trained(projection, u), dx, with)
    }

    /// The projection's adapter, if there is one, with u.
    fn trained<'a>(
        &'a mut self,
        projection: Projection,
        u: &'a Option<Buffer>,
    ) -> Option<Trained<'a>> {
        let place = self.lora.shape().index(Site::Layer(self.layer, projection));
        let (at, u) = place.zip(u.as_deref())?;
        Some(Trained { adapter: self.lora.at(at), grad: self.grads.at(at), u })
    }
}

//! One decoder block, forward and, read upwards, backward; the twin of [`super::super::layer`], where the
//! formulas, the shapes and what the tape keeps are said.

use super::Context;
use super::adapters::{Adapter, Adapters, Gradients};
use super::batch::{Batch, DeviceLayout};
use super::linear::{self, Linear, Output, Pulled, Then, Trained, parts};
use super::tape::{AttentionInputs, HeadNorm, LayerTape, Outputs};
use crate::Result;
use crate::model::targets::{Projection, Site};
use crate::model::weights;
use half::bf16;
use uft_kernels::cuda::{DeviceBuffer, DeviceSlice};
use uft_kernels::matmul::cuda::Begun;
use uft_kernels::matmul::cuda::adapter::{Gradient, Input, Norm};
use uft_kernels::{attention, embedding, rmsnorm, rope, swiglu};

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
        let (tape, act) = self.before_down(x, batch, lora, with)?;
        let y = self.last_product(&tape.outputs, &act, lora, with)?;
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
        Ok(self.before_down(x, batch, Some(lora), with)?.0)
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
        let [mut gate, mut up] = [
            with.take(rows * with.config.intermediate)?,
            with.take(rows * with.config.intermediate)?,
        ];
        let adapters = [None, Some(Gate), Some(Up), None]
            .map(|projection| self.adapter(projection?, Some(lora)));
        let [_, of_gate, of_up, _] = parts(adapters, u);
        self.gate.forward(&h, of_gate, &mut gate, with)?;
        self.up.forward(&h, of_up, &mut up, with)?;
        *gate_and_up = Some([gate, up]);
        Ok(())
    }

    /// Everything but the last product, whose input `[N, I]` comes second.
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
        let adapters = [Q, K, V].map(|projection| self.adapter(projection, lora));
        let then = match self.head_norms {
            Some(_) => Then::Nothing,
            None => Then::Rotated(positions),
        };
        let (u, begun) = self.q.begin(&h, adapters, then, &mut q, with)?;
        let [of_q, of_k, of_v] = parts(adapters, &u);
        self.q.forward_then(&h, of_q, then, &mut q, begun, with)?;
        self.k.forward_then(&h, of_k, then, &mut k, Begun::default(), with)?;
        if let Some([q_norm, k_norm]) = &self.head_norms {
            head_norms = Some([head_norm(&mut q, q_norm, with)?, head_norm(&mut k, k_norm, with)?]);
            rope::cuda::forward(gpu, with.rope, &mut q, config.heads.heads, positions)?;
            rope::cuda::forward(gpu, with.rope, &mut k, config.heads.kv_heads, positions)?;
        }
        self.v.forward(&h, of_v, &mut v, with)?;
        Ok(AttentionInputs { inv_rms, q, k, v, head_norms, u })
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
        let of_o = [self.adapter(O, lora)];
        let (mut mid, then) = (with.take(x.len())?, Then::Added(x));
        let (u_o, begun) = self.o.begin(attended, of_o, then, &mut mid, with)?;
        self.o.forward_then(attended, parts(of_o, &u_o)[0], then, &mut mid, begun, with)?;
        let (mut h, mut inv_rms) = (with.take(x.len())?, with.take_f32(rows)?);
        rmsnorm::cuda::forward(gpu, &mid, &self.mlp_norm, config.norm_eps, &mut h, &mut inv_rms)?;
        let mut gate = with.take(rows * config.intermediate)?;
        let mut up = with.take(rows * config.intermediate)?;
        let mut act = with.take(gate.len())?;
        let (layers, adapters) =
            ([&self.gate, &self.up], [Gate, Up].map(|projection| self.adapter(projection, lora)));
        let of_down = self.adapter(Down, lora);
        let (gates, ups, acts) = (&mut gate, &mut up, &mut act);
        let (u, u_down) =
            Linear::forward_activated(layers, &h, adapters, gates, ups, acts, of_down, with)?;
        let ([u_o], [u_gate, u_up]) = (u_o, u);
        let (gate_and_up, u) = (Some([gate, up]), [u_o, u_gate, u_up, u_down]);
        Ok((Outputs { mid, inv_rms, gate_and_up, u }, act))
    }

    /// y: `[N, H]`.
    fn last_product(
        &self,
        outputs: &Outputs,
        act: &DeviceSlice<bf16>,
        lora: Option<&Adapters>,
        with: Context,
    ) -> Result<Buffer> {
        let Outputs { mid, u, .. } = outputs;
        let [.., of_down] = parts([None, None, None, self.adapter(Down, lora)], u);
        let mut y = with.take(mid.len())?;
        let then = Then::Added(mid);
        self.down.forward_then(act, of_down, then, &mut y, Begun::default(), with)?;
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
        let (outputs, act) = self.outputs(&x, &attended, lora, with)?;
        self.last_product(&outputs, &act, lora, with)
    }

    /// Turns `d`, the gradient to the block's output `[N, H]`, into that to its input `[T, H]`,
    /// which is `None` where `input_needed` is false. Adds to the adapters' gradients; of the tape, gate and up are overwritten.
    pub fn backward(
        &self,
        mut d: Buffer,
        tape: &mut LayerTape,
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
        if !self.mlp_backward(&mut d, &mut tape.outputs, below_mlp, &mut back)? {
            return Ok(None);
        }

        let gathered = needed.map(|rows| with.gather(&tape.attended, &rows.ids, batch.rows));
        let gathered = gathered.transpose()?;
        let attended = gathered.as_ref().unwrap_or(&tape.attended);
        let mut dattended = below_o.then(|| with.take(attended.len())).transpose()?;
        let input = Input { x: attended, norm: None };
        let outputs = [(&self.o, O, &*d, &tape.outputs.u[0])];
        back.layers(input, outputs, dattended.as_deref_mut())?;
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
        let mut room = with.take_f32(schedule.backward_room())?;
        let turned =
            attention::cuda::Turned { table: with.rope, positions: &batch.layout.positions };
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
            Some(turned),
            &mut delta,
            &mut room,
            &mut dq,
            &mut dk,
            &mut dv,
        )?;
        drop((delta, room, dattended));
        if let (Some(weights), Some(norms)) = (&self.head_norms, head_norms) {
            for ((dx, weight), norm) in [&mut dq, &mut dk].into_iter().zip(weights).zip(norms) {
                let mut before = with.zeros(dx.len())?;
                rmsnorm::cuda::backward(gpu, dx, &norm.before, weight, &norm.inv_rms, &mut before)?;
                *dx = before;
            }
        }

        let outputs =
            [(&self.q, Q, &*dq, &u[0]), (&self.k, K, &*dk, &u[1]), (&self.v, V, &*dv, &u[2])];
        let input = Input { x: &tape.x, norm: Some(Norm { weight: &self.input_norm, inv_rms }) };
        let mut dh = input_needed.then(|| with.take(tape.x.len())).transpose()?;
        back.layers(input, outputs, dh.as_deref_mut())?;
        let Some(dh) = dh else { return Ok(None) };
        rmsnorm::cuda::backward(gpu, &dh, &tape.x, &self.input_norm, inv_rms, &mut d)?;
        Ok(Some(d))
    }

    /// The feed-forward part: turns `d` from the gradient to y into that to mid, both `[N, H]`, if
    /// `below_needed`, which it returns.
    fn mlp_backward(
        &self,
        d: &mut Buffer,
        tape: &mut Outputs,
        below_needed: bool,
        back: &mut Back,
    ) -> Result<bool> {
        let with = back.with;
        let gpu = with.gpu;
        let Outputs { mid, inv_rms, gate_and_up, u } = tape;
        let rows = inv_rms.len();
        let [gate, up] = gate_and_up.as_mut().expect("gate and up were computed again before");
        let below_act = below_needed || back.any(&[Gate, Up]);
        let [of_gate, of_up, of_down] =
            back.trained([Gate, Up, Down], [1, 2, 3].map(|projection| &u[projection]));
        // Down's dB goes with its own product, and its dA with that of gate and up.
        let of_down = of_down.map(|it| self.down.pull(d, it, None, with)).transpose()?;
        let (mut pulled, of_b) = of_down.unzip();
        let mut waiting: Vec<Gradient> = of_b.flatten().map(Gradient::B).into_iter().collect();
        let (of_down, of_a) = pulled.as_mut().map(Pulled::split).unzip();
        // The adapter's input, which nobody kept.
        let mut act = of_a.is_some().then(|| with.take(gate.len())).transpose()?;
        let mut du_gate = Trained::room(of_gate.as_ref(), rows, with)?;
        let mut du_up = Trained::room(of_up.as_ref(), rows, with)?;
        if below_act {
            let act = act.as_deref_mut();
            let pulled = [(&of_gate, &mut du_gate), (&of_up, &mut du_up)]
                .map(|(it, du)| Some(it.as_ref()?.pulled(du.as_deref_mut()?)));
            let of_b = std::mem::take(&mut waiting);
            self.down.backward_activated(d, of_down, gate, up, act, pulled, of_b, with)?;
        } else if let Some(act) = &mut act {
            swiglu::cuda::forward(gpu, gate, up, act)?;
        }
        if let (Some(act), Some(of_a)) = (&act, of_a) {
            let (input, k) = (Input { x: act, norm: None }, self.down.inputs);
            waiting.push(Gradient::A { input, k, adapters: vec![of_a] });
        }
        if !below_act {
            linear::add_waiting(waiting, rows, with)?;
            return Ok(false);
        }

        let (dgate, dup) = (gate, up);
        let input = Input { x: mid, norm: Some(Norm { weight: &self.mlp_norm, inv_rms }) };
        let outputs = [
            Output { linear: &self.gate, dy: dgate, adapter: of_gate, du: du_gate },
            Output { linear: &self.up, dy: dup, adapter: of_up, du: du_up },
        ];
        let mut dh = below_needed.then(|| with.take(mid.len())).transpose()?;
        linear::backward(input, outputs, dh.as_deref_mut(), waiting, with)?;
        drop((pulled, act));
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

    /// [`linear::backward`] of layers with one input, in the order of projections: each with its projection, dy and u.
    fn layers<const N: usize>(
        &mut self,
        input: Input,
        layers: [(&Linear, Projection, &DeviceSlice<bf16>, &Option<Buffer>); N],
        dx: Option<&mut DeviceSlice<bf16>>,
    ) -> Result<()> {
        let with = self.with;
        let mut adapters = self
            .trained(layers.map(|(_, projection, ..)| projection), layers.map(|it| it.3))
            .into_iter();
        let outputs = layers.map(|(linear, _, dy, _)| Output {
            linear,
            dy,
            adapter: adapters.next().flatten(),
            du: None,
        });
        linear::backward(input, outputs, dx, Vec::new(), with)
    }

    /// The projections' adapters, where there are any, with u.
    fn trained<'a, const N: usize>(
        &'a mut self,
        projections: [Projection; N],
        u: [&'a Option<Buffer>; N],
    ) -> [Option<Trained<'a>>; N] {
        let (shape, layer) = (self.lora.shape(), self.layer);
        let places = projections.map(|projection| shape.index(Site::Layer(layer, projection)));
        let mut grads = self.grads.each(places).into_iter();
        std::array::from_fn(|i| {
            let grad = grads.next().flatten();
            let (at, u) = places[i].zip(u[i].as_deref())?;
            Some(Trained { adapter: self.lora.at(at), grad: grad?, u })
        })
    }
}

//! The head on a device: see `logprob.cu`.
//!
//! N tokens, H hidden width, V vocabulary, r rank and R the padded one; P = [`padded`] (V).

use crate::args;
use crate::cuda::{
    Arena, DeviceBuffer, DeviceSlice, Gpu, HOPPER, HOPPER_PRODUCTS, Kernel, Result, Source, TILE,
    assert_aligned, blocks,
};
use crate::matmul::cuda::adapter::{
    self, Gradient, GradientOfA, GradientOfB, Input, Projected, add_to_gradients, project, pull,
};
use crate::matmul::cuda::hopper::{self, NARROW, Tile, WIDE};
use crate::matmul::cuda::{Adapter, PRODUCT_HEADER, few, nn};
use half::bf16;

static SOURCE: Source = Source {
    name: "logprob.cu",
    text: include_str!("../logprob.cu"),
    headers: &[TILE, PRODUCT_HEADER, HEADER],
};
const HEADER: (&str, &str) = ("logprob.cuh", include_str!("../logprob.cuh"));
static HOPPER_SOURCE: Source = Source {
    name: "hopper_logprob.cu",
    text: include_str!("../hopper_logprob.cu"),
    headers: &[HOPPER, HOPPER_PRODUCTS, TILE, hopper::PRODUCT_HEADER, HEADER],
};

/// Tokens and entries of a block's tile, depth and number of the slices in shared memory. Two such blocks
/// fit in an SM, so that one's softmax runs beside the other's products.
const TILE_TOKENS: usize = 128;
const TILE_ENTRIES: usize = 128;
const TILE_DEPTH: usize = 32;
const STAGES: usize = 4;
const SHARED_BYTES: usize = STAGES * (TILE_TOKENS + TILE_ENTRIES) * TILE_DEPTH * size_of::<bf16>();
/// Entries whose weights have one largest logit; as in logprob.cu.
const STRIP: usize = 64;

const fn kernel(name: &'static str, threads: u32) -> Kernel {
    Kernel::new(&SOURCE, name, threads)
        .define("TILE_M", TILE_TOKENS as i64)
        .define("TILE_N", TILE_ENTRIES as i64)
        .define("TILE_K", TILE_DEPTH as i64)
        .define("WARPS_M", 2)
        .define("WARPS_N", 2)
        .define("STAGES", STAGES as i64)
}
const LOGITS: Kernel = kernel("logprob_logits", 128);
const COMBINE: Kernel = kernel("logprob_combine", 128);
const GRADIENTS: Kernel = kernel("logprob_gradients", 256);

/// Every kernel of this file.
pub const KERNELS: &[Kernel] = &[LOGITS, COMBINE, GRADIENTS];

const fn hopper_logits(tile: Tile) -> Kernel {
    tile.kernel_of(&HOPPER_SOURCE, "hopper_logprob_logits")
}

const fn hopper_backward(tile: Tile) -> Kernel {
    tile.kernel_of(&HOPPER_SOURCE, "hopper_logprob_backward")
}

/// Those that only Hopper has the instructions for.
pub const HOPPER_KERNELS: &[Kernel] =
    &[hopper_logits(WIDE), hopper_logits(NARROW), hopper_backward(WIDE), hopper_backward(NARROW)];

/// The vocabulary as the products take it: rounded up to a multiple of 8.
pub const fn padded(vocab: usize) -> usize {
    vocab.next_multiple_of(8)
}

/// The output layer.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    /// W: `[P, H]`; what follows its V rows is multiplied by zeros and must be finite.
    pub weight: &'a DeviceSlice<bf16>,
    /// V.
    pub vocab: usize,
    /// H, a multiple of 8.
    pub hidden: usize,
    /// What is added to W, if anything.
    pub adapter: Option<LowRank<'a>>,
    /// Most tokens at a time. More cost memory, 2 bytes for each entry of the vocabulary; fewer leave
    /// multiprocessors idle. It changes no bit.
    pub tokens: usize,
}

/// A low-rank addition `scale B A` to a weight, as [`adapter`] packs it.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// A: `[R, H]`.
    pub a: &'a DeviceSlice<bf16>,
    /// scale B: `[P, R]`, zeros after its V rows.
    pub b: &'a DeviceSlice<bf16>,
    /// r.
    pub rank: usize,
    pub scale: f32,
}

/// [`super::forward`] in bf16: `logp[t] = log_softmax(logits_t)[targets[t]]` for `hidden`: `[N, H]`,
/// `targets`, `logp`: `[N]`. Overwrites `logp`. A target outside the vocabulary gives NaN.
///
/// # Errors
/// A launch fails, or the arena is too small.
pub fn forward(
    gpu: &Gpu,
    arena: &Arena,
    hidden: &DeviceSlice<bf16>,
    targets: &DeviceSlice<u32>,
    head: &Head,
    logp: &mut DeviceSlice<f32>,
) -> Result<()> {
    head.assert_shapes(hidden, targets, logp);
    for first in (0..targets.len()).step_by(head.tokens) {
        let rows = first..targets.len().min(first + head.tokens);
        let of_rows = rows.start * head.hidden..rows.end * head.hidden;
        let logp = &mut logp[rows.clone()];
        head.log_probs(gpu, arena, &hidden[of_rows], &targets[rows], None, logp)?;
    }
    Ok(())
}

/// [`forward`], with the same bits, and `unit_grad[t] = dlogp[t] / dhidden[t]`: `[N, H]`. Overwrites
/// both.
///
/// # Errors
/// As [`forward`].
pub fn forward_with_gradient(
    gpu: &Gpu,
    arena: &Arena,
    hidden: &DeviceSlice<bf16>,
    targets: &DeviceSlice<u32>,
    head: &Head,
    logp: &mut DeviceSlice<f32>,
    unit_grad: &mut DeviceSlice<bf16>,
) -> Result<()> {
    head.assert_shapes(hidden, targets, logp);
    let (n, width, entries) = (targets.len(), head.hidden, padded(head.vocab));
    assert_eq!(unit_grad.len(), n * width, "logprob: unit_grad must be [{n}, {width}]");
    for first in (0..n).step_by(head.tokens) {
        let rows = first..n.min(first + head.tokens);
        let (m, of_rows) = (rows.len(), rows.start * width..rows.end * width);
        let (hidden, targets) = (&hidden[of_rows.clone()], &targets[rows.clone()]);
        let (logp, unit_grad) = (&mut logp[rows], &mut unit_grad[of_rows]);
        let tile = Tile::of(gpu, entries, width).filter(|_| head.adapter.is_none());
        if let Some(tile) = tile {
            let mut weights = arena.take(m * entries)?;
            let softmax = head.log_probs(gpu, arena, hidden, targets, Some(&mut weights), logp)?;
            head.hopper_backward(gpu, tile, &weights, &softmax, targets, logp, unit_grad)?;
            continue;
        }
        let (slopes, _) = head.logit_gradients(gpu, arena, hidden, targets, None, logp)?;
        let Some(LowRank { a, b, rank, .. }) = head.adapter else {
            nn(gpu, &slopes, head.weight, unit_grad, m, entries, width, 0.0, None)?;
            continue;
        };
        let mut pulled = arena.take(m * adapter::padded(rank))?;
        nn(gpu, &slopes, b, &mut pulled, m, entries, adapter::padded(rank), 0.0, None)?;
        let part = Some(Adapter { left: &pulled, right: a, rank });
        nn(gpu, &slopes, head.weight, unit_grad, m, entries, width, 0.0, part)?;
    }
    Ok(())
}

/// [`super::forward_logits`] in bf16: `logits = W h` for `hidden`: `[N, H]`, in one piece: for generation,
/// where N is small. Overwrites `logits`: `[N, P]`, of which V entries of a row are logits.
///
/// # Errors
/// As [`forward`].
pub fn forward_logits(
    gpu: &Gpu,
    arena: &Arena,
    hidden: &DeviceSlice<bf16>,
    head: &Head,
    logits: &mut DeviceSlice<bf16>,
) -> Result<()> {
    head.assert_valid();
    let (width, entries) = (head.hidden, padded(head.vocab));
    let n = hidden.len() / width;
    assert_eq!(hidden.len(), n * width, "logprob: hidden must be [N, {width}]");
    assert_eq!(logits.len(), n * entries, "logprob: logits must be [{n}, {entries}]");
    let Some(LowRank { a, b, rank, .. }) = head.adapter else {
        return few(gpu, hidden, head.weight, logits, n, width, entries, 0.0, None, None);
    };
    let mut low = arena.take(n * adapter::padded(rank))?;
    few(gpu, hidden, a, &mut low, n, width, adapter::padded(rank), 0.0, None, None)?;
    let part = Some(Adapter { left: &low, right: b, rank });
    few(gpu, hidden, head.weight, logits, n, width, entries, 0.0, None, part)
}

/// [`super::adapter_backward`] in bf16: the adapter's gradients, from the loss's `dlogp`: `[N]`. The logits
/// are computed once more. Accumulates into `da`: `[r, H]` and `db`: `[P, r]`, both f32; what follows the V
/// rows of `db` stays as it is. The head must have an adapter.
///
/// # Errors
/// As [`forward`].
pub fn adapter_backward(
    gpu: &Gpu,
    arena: &Arena,
    hidden: &DeviceSlice<bf16>,
    targets: &DeviceSlice<u32>,
    head: &Head,
    dlogp: &DeviceSlice<f32>,
    da: &mut DeviceSlice<f32>,
    db: &mut DeviceSlice<f32>,
) -> Result<()> {
    let (n, width, entries) = (targets.len(), head.hidden, padded(head.vocab));
    head.assert_shapes(hidden, targets, dlogp);
    let LowRank { b, rank, scale, .. } =
        head.adapter.expect("logprob: adapter_backward without an adapter");
    assert_eq!(da.len(), rank * width, "logprob: da must be [{rank}, {width}]");
    assert_eq!(db.len(), entries * rank, "logprob: db must be [{entries}, {rank}]");
    for first in (0..n).step_by(head.tokens) {
        let rows = first..n.min(first + head.tokens);
        let m = rows.len();
        let (hidden, targets) =
            (&hidden[rows.start * width..rows.end * width], &targets[rows.clone()]);
        let mut logp = arena.take(m)?;
        let dlogp = Some(&dlogp[rows]);
        let (slopes, low) = head.logit_gradients(gpu, arena, hidden, targets, dlogp, &mut logp)?;
        let low = low.expect("the head has an adapter");
        let mut pulled = arena.take(m * adapter::padded(rank))?;
        let of_b = GradientOfB { dy: &slopes, u: &low, db: &mut *db, rank, scale };
        let of_b = pull(gpu, arena, of_b, b, &mut pulled, m, entries)?;
        let input = Input { x: hidden, norm: None };
        let adapters = vec![GradientOfA { du: &pulled, da: &mut *da, rank }];
        let of_a = Gradient::A { input, k: width, adapters };
        let gradients = of_b.map(Gradient::B).into_iter().chain([of_a]).collect();
        add_to_gradients(gpu, arena, gradients, m)?;
    }
    Ok(())
}

/// What the softmax of some tokens comes to, besides log-probs and weights.
struct Softmax {
    /// `[m]`: a weight times this is a probability.
    scales: DeviceBuffer<f32>,
    /// `[m, R]`: A h, where there is an adapter.
    low: Option<DeviceBuffer<bf16>>,
}

impl Head<'_> {
    /// Log-probs of at most [`Head::tokens`] tokens; `weights`: `[m, P]` receives what is in proportion to the
    /// probabilities, and 0 for the target.
    fn log_probs(
        &self,
        gpu: &Gpu,
        arena: &Arena,
        hidden: &DeviceSlice<bf16>,
        targets: &DeviceSlice<u32>,
        mut weights: Option<&mut DeviceSlice<bf16>>,
        logp: &mut DeviceSlice<f32>,
    ) -> Result<Softmax> {
        let (m, width, vocab) = (targets.len(), self.hidden, self.vocab);
        let low = match self.adapter {
            None => None,
            Some(LowRank { a, rank, .. }) => {
                let mut low = arena.take(m * adapter::padded(rank))?;
                project(gpu, hidden, &mut [Projected { a, u: &mut low, rank, b: None }], m, width)?;
                Some(low)
            }
        };
        let mut strips = arena.take::<f32>(m * vocab.div_ceil(STRIP) * 2)?;
        let (mut target_logits, mut scales) = (arena.take::<f32>(m)?, arena.take::<f32>(m)?);
        let (sums, of_tile) = ((&mut *strips, &mut *target_logits), weights.as_deref_mut());
        match Tile::of(gpu, width, vocab) {
            Some(tile) => {
                self.hopper_logits(gpu, tile, hidden, low.as_deref(), targets, of_tile, sums)?;
            }
            None => self.logits(gpu, hidden, low.as_deref(), targets, of_tile, sums)?,
        }
        let (tokens, entries, pitch) = (m as i32, vocab as i32, padded(vocab) as i32);
        let args = args![
            &strips,
            &target_logits,
            targets,
            logp,
            &mut scales,
            weights,
            tokens,
            entries,
            pitch
        ];
        gpu.launch(&COMBINE, [blocks(m, 4), 1, 1], 0, args)?;
        Ok(Softmax { scales, low })
    }

    /// Strips and targets' logits, and weights if they are asked for; `low`: `[m, R]` where there is an adapter.
    fn logits(
        &self,
        gpu: &Gpu,
        hidden: &DeviceSlice<bf16>,
        low: Option<&DeviceSlice<bf16>>,
        targets: &DeviceSlice<u32>,
        weights: Option<&mut DeviceSlice<bf16>>,
        (strips, target_logits): (&mut DeviceSlice<f32>, &mut DeviceSlice<f32>),
    ) -> Result<()> {
        let (m, width, vocab) = (targets.len(), self.hidden, self.vocab);
        let rank = self.adapter.map_or(0, |adapter| adapter::padded(adapter.rank));
        let tiles = m.div_ceil(TILE_TOKENS) * vocab.div_ceil(TILE_ENTRIES);
        let args = args![
            hidden,
            self.weight,
            width as i32,
            low,
            self.adapter.map(|adapter| adapter.b),
            rank as i32,
            targets,
            strips,
            target_logits,
            weights,
            m as i32,
            vocab as i32,
            padded(vocab) as i32,
        ];
        gpu.launch(&LOGITS, [blocks(tiles, 1), 1, 1], SHARED_BYTES as u32, args)
    }

    /// [`Self::logits`] by Hopper's kernel.
    fn hopper_logits(
        &self,
        gpu: &Gpu,
        tile: Tile,
        hidden: &DeviceSlice<bf16>,
        low: Option<&DeviceSlice<bf16>>,
        targets: &DeviceSlice<u32>,
        weights: Option<&mut DeviceSlice<bf16>>,
        (strips, target_logits): (&mut DeviceSlice<f32>, &mut DeviceSlice<f32>),
    ) -> Result<()> {
        let (m, width, vocab) = (targets.len(), self.hidden, self.vocab);
        if m == 0 {
            return Ok(());
        }
        let entries = padded(vocab);
        let adapter = self.adapter.zip(low);
        let adapter =
            adapter.map(|(LowRank { b, rank, .. }, left)| Adapter { left, right: b, rank });
        let (_, _, rank) = Adapter::parts(adapter);
        let half = Some(tile.n / hopper::CLUSTER);
        let [h, w, s, b] = hopper::maps(
            gpu,
            (hidden, self.weight),
            adapter.map(Into::into),
            (m, width, entries),
            half,
        )?;
        let keeps = i32::from(weights.is_some());
        let weights = match weights {
            Some(weights) => gpu.tensor_map_mut(weights, [m, entries], hopper::PIECE)?,
            // Any: it is not used.
            None => h,
        };
        let (tokens, columns, depth) = (m as i32, vocab as i32, width as i32);
        let args = args![
            h,
            w,
            s,
            b,
            weights,
            targets,
            strips,
            target_logits,
            tokens,
            columns,
            depth,
            rank,
            keeps
        ];
        let grid = tile.grid(gpu, m, vocab);
        gpu.launch(&hopper_logits(tile), grid, tile.shared_bytes(), args)
    }

    /// `unit_grad`: `[m, H]` from what [`Self::log_probs`] left; W has no adapter.
    fn hopper_backward(
        &self,
        gpu: &Gpu,
        tile: Tile,
        weights: &DeviceSlice<bf16>,
        softmax: &Softmax,
        targets: &DeviceSlice<u32>,
        logp: &DeviceSlice<f32>,
        unit_grad: &mut DeviceSlice<bf16>,
    ) -> Result<()> {
        let (m, width, entries) = (targets.len(), self.hidden, padded(self.vocab));
        let [left, right, ..] =
            hopper::maps(gpu, (weights, self.weight), None, (m, entries, width), None)?;
        let out = gpu.tensor_map_mut(unit_grad, [m, width], hopper::PIECE)?;
        let (tokens, depth, columns) = (m as i32, entries as i32, width as i32);
        let args = args![
            left,
            right,
            self.weight,
            out,
            targets,
            logp,
            &softmax.scales,
            tokens,
            depth,
            columns
        ];
        let grid = tile.grid(gpu, m, width);
        gpu.launch(&hopper_backward(tile), grid, tile.shared_bytes(), args)
    }

    /// [`Self::log_probs`], and `dlogp dlogp_t / dlogits_t`: `[m, P]` with zeros after V entries, `dlogp`
    /// being 1 where it is `None`; and what the softmax has of an adapter.
    fn logit_gradients(
        &self,
        gpu: &Gpu,
        arena: &Arena,
        hidden: &DeviceSlice<bf16>,
        targets: &DeviceSlice<u32>,
        dlogp: Option<&DeviceSlice<f32>>,
        logp: &mut DeviceSlice<f32>,
    ) -> Result<(DeviceBuffer<bf16>, Option<DeviceBuffer<bf16>>)> {
        let (m, entries) = (targets.len(), padded(self.vocab));
        let mut slopes = arena.take(m * entries)?;
        let softmax = self.log_probs(gpu, arena, hidden, targets, Some(&mut slopes), logp)?;
        let args = args![&mut slopes, &softmax.scales, &*logp, targets, dlogp, entries as i32];
        gpu.launch(&GRADIENTS, [blocks(m, 1), 1, 1], 0, args)?;
        Ok((slopes, softmax.low))
    }

    fn assert_shapes(
        &self,
        hidden: &DeviceSlice<bf16>,
        targets: &DeviceSlice<u32>,
        per_token: &DeviceSlice<f32>,
    ) {
        self.assert_valid();
        let (n, width) = (targets.len(), self.hidden);
        assert_eq!(hidden.len(), n * width, "logprob: hidden must be [{n}, {width}]");
        assert_eq!(per_token.len(), n, "logprob: logp and dlogp must be [{n}]");
        assert_aligned("logprob", [hidden]);
    }

    fn assert_valid(&self) {
        let (width, entries) = (self.hidden, padded(self.vocab));
        assert!(self.vocab > 0 && width > 0 && self.tokens > 0, "logprob: an empty head");
        assert!(
            width.is_multiple_of(8),
            "logprob: a hidden width of {width}, it must be a multiple of 8"
        );
        assert!(entries * 2 <= i32::MAX as usize, "logprob: a vocabulary of {entries}");
        assert_eq!(self.weight.len(), entries * width, "logprob: W must be [{entries}, {width}]");
        assert_aligned("logprob", [self.weight]);
        if let Some(LowRank { a, b, rank, .. }) = self.adapter {
            let rank = adapter::padded(rank);
            assert_eq!(a.len(), rank * width, "logprob: A must be [{rank}, {width}]");
            assert_eq!(b.len(), entries * rank, "logprob: B must be [{entries}, {rank}]");
            assert_aligned("logprob", [a, b]);
        }
    }
}

#[cfg(test)]
mod full_size;
#[cfg(test)]
mod tests;

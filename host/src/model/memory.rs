//! How much memory a pass takes for activations, found out without doing it: the same buffers are taken
//! and given back in the same order as in [`super::decoder`] and [`super::layer`], from a pool that only
//! counts. What changes there changes here; a test compares the two to the byte.
//!
//! T rows, N needed rows, M targets, and widths as in [`super::layer`].

use super::buffers::{Buffer, Pool};
use super::config::ModelConfig;
use super::decoder::Options;
use super::frozen::Frozen;
use super::lora::Lora;
use super::packed::{NeededRows, Packed};
use super::shards::{Shards, Tensor};
use super::targets::{Projection, Site};
use crate::Result;
use std::ops::Add;
use std::path::Path;
use uft_kernels::attention::Heads;
use uft_kernels::logprob::Chunk;

/// What of a micro-batch decides its memory. Those of groups packed together add up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size {
    /// T.
    pub rows: usize,
    /// N: rows that targets read.
    pub needed: usize,
    /// M.
    pub targets: usize,
    /// Rows of the longest group.
    pub longest: usize,
    /// Numbers of attention's tables on a device.
    pub tables: usize,
}

impl Size {
    pub fn of(packed: &Packed, heads: &Heads) -> Self {
        let longest = packed.layout.groups.iter().map(|group| group.rows().len()).max();
        Self {
            rows: packed.rows(),
            needed: NeededRows::of(&packed.targets).rows.len(),
            targets: packed.targets.rows.len(),
            longest: longest.unwrap_or(0),
            tables: packed.tables(heads),
        }
    }

    /// This one and smaller ones, each half as large as the one before, down to a row.
    pub fn halves(&self) -> impl Iterator<Item = Self> + use<> {
        let half = |size: &Self| {
            let half = |n: usize| n.div_ceil(2);
            let &Self { rows, needed, targets, longest, tables } = size;
            let (rows, needed, targets) = (half(rows), half(needed), half(targets));
            let smaller = Self { rows, needed, targets, longest: longest.min(rows), tables };
            (smaller != *size).then_some(smaller)
        };
        std::iter::successors(Some(*self), half)
    }

    /// Whether another is at least as large in every way.
    pub fn is_within(&self, other: &Self) -> bool {
        self.rows <= other.rows
            && self.needed <= other.needed
            && self.targets <= other.targets
            && self.longest <= other.longest
            && self.tables <= other.tables
    }
}

impl Add for Size {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            rows: self.rows + other.rows,
            needed: self.needed + other.needed,
            targets: self.targets + other.targets,
            longest: self.longest.max(other.longest),
            tables: self.tables + other.tables,
        }
    }
}

/// Bytes of a model's weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Weights {
    /// Widened or copied.
    pub held: usize,
    /// Pages of their files, which stay mapped.
    pub mapped: usize,
}

impl Weights {
    /// From the headers of a directory's files.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn of(dir: &Path, config: &ModelConfig) -> Result<Self> {
        let shards = Shards::open(dir)?;
        // A copy of a tied head is compared with the embedding and not kept.
        let kept = shards.names().filter(|name| !(config.tied && *name == "lm_head.weight"));
        let tensors = kept.filter_map(|name| shards.tensor(name));
        let held = tensors.map(|tensor| held(&tensor)).sum();
        let bytes = shards.names().filter_map(|name| Some(shards.tensor(name)?.bytes.len()));
        Ok(Self { held, mapped: bytes.sum() })
    }
}

/// Bytes of a tensor that the model holds besides its file's pages: none if it stays there.
fn held(tensor: &Tensor) -> usize {
    match tensor.shape.len() == 2 && Frozen::stays_mapped(tensor) {
        true => 0,
        false => size_of::<f32>() * tensor.shape.iter().product::<usize>(),
    }
}

/// A decoder's passes without their arithmetic.
pub struct Shadow<'a> {
    config: &'a ModelConfig,
    options: Options,
    /// Whether the head's logits count.
    with_chunk: bool,
    pool: Pool,
}

/// One block's tape: buffers that are given back together.
type Tape = Vec<Buffer>;

impl<'a> Shadow<'a> {
    /// `with_chunk` false leaves the head's logits out, to find out what they add.
    pub fn new(config: &'a ModelConfig, options: Options, with_chunk: bool) -> Self {
        Self { config, options, with_chunk, pool: Pool::counting() }
    }

    /// Bytes that a pass takes at most for activations: the largest of all passes so far.
    pub fn peak(&self) -> usize {
        self.pool.high_water()
    }

    /// The logits that are in memory at a time for M targets.
    fn chunk(&self, targets: usize) -> Option<Buffer> {
        let Chunk { rows, columns } = self.options.chunk();
        let len = rows.min(targets).max(1) * columns.min(self.config.vocab);
        self.with_chunk.then(|| self.pool.take(len))
    }

    /// [`super::Model::logps`].
    pub fn logps(&self, size: Size, lora: Option<&Lora>) {
        if size.targets > 0 {
            let _top = self.run(size, lora, |_, tape| drop(tape));
            let _chunk = self.chunk(size.targets);
        }
    }

    /// [`super::Model::forward`] and [`super::Model::backward`].
    pub fn step(&self, size: Size, lora: &Lora) {
        let size = self.widened(size);
        let mut layers = Vec::new();
        let mut keep = self.keep(lora, &mut layers);
        let top = self.run(size, Some(lora), |_, tape| keep(tape));
        drop(keep);
        self.rest_of_step(size, layers, top, lora);
    }

    /// [`super::Model::forward_with_others`] of all that there is, and [`super::Model::backward`] of its own.
    pub fn step_with_others(&self, own: Size, all: Size, lora: &Lora) {
        let others = self.widened(Size {
            rows: all.rows - own.rows,
            needed: all.needed - own.needed,
            targets: all.targets - own.targets,
            longest: all.longest,
            tables: all.tables,
        });
        let own = self.widened(own);
        let (pool, h) = (&self.pool, self.config.hidden);
        let mut layers = Vec::new();
        let mut keep = self.keep(lora, &mut layers);
        let mut x = pool.take(others.rows * h);
        let top = self.run(own, Some(lora), |index, tape| {
            if others.rows > 0 {
                x = Block::new(self, others, index, Some(lora)).forward_beside();
            }
            keep(tape);
        });
        drop(keep);
        let (normed, inv_rms) = (pool.take(x.count()), pool.take(x.count() / h));
        let hidden = pool.take(others.targets * h);
        drop((normed, inv_rms, x));
        drop(self.chunk(others.targets));
        drop(hidden);
        self.rest_of_step(own, layers, top, lora);
    }

    /// What to do with the blocks' tapes, as in [`super::Model`].
    fn keep<'t>(&self, lora: &Lora, layers: &'t mut Vec<Tape>) -> impl FnMut(Tape) + 't {
        let mut below = self.options.lowest_layer(lora);
        let recomputed = self.options.recomputed_layers;
        move |mut tape| match below {
            0 => {
                if layers.len() < recomputed {
                    // Its first buffer is the block's input.
                    tape.truncate(1);
                }
                layers.push(tape);
            }
            _ => below -= 1,
        }
    }

    /// The head, and the way back.
    fn rest_of_step(&self, size: Size, mut layers: Vec<Tape>, top: [Buffer; 3], lora: &Lora) {
        let (pool, h) = (&self.pool, self.config.hidden);
        let lowest = self.options.lowest_layer(lora);
        let [last, inv_rms, hidden] = top;
        let unit_grad = pool.take(size.targets * h);
        let chunk = self.chunk(size.targets);
        let head = lora.index(Site::Head);
        let hidden = Some(hidden).filter(|_| head.is_some());
        drop(chunk);

        if let Some(_hidden) = hidden {
            let _chunk = self.chunk(size.targets);
        }
        if layers.is_empty() {
            return;
        }
        let dhidden = pool.take(size.targets * h);
        drop(unit_grad);
        let dnormed = pool.take(size.needed * h);
        drop(dhidden);
        let mut d = pool.take(size.needed * h);
        drop((dnormed, last, inv_rms));
        while let Some(mut kept) = layers.pop() {
            let layer = Block::new(self, size, lowest + layers.len(), Some(lora));
            let _tape = match layers.len() < self.options.recomputed_layers {
                true => layer.again(kept.swap_remove(0)),
                false => kept,
            };
            match layer.backward(d, layer.index > lowest || !self.options.skipped_gradients) {
                Some(below) => d = below,
                None => break,
            }
        }
    }

    /// [`super::Model::run`]: last, inv_rms and hidden of the top.
    fn run(
        &self,
        size: Size,
        lora: Option<&Lora>,
        mut keep: impl FnMut(usize, Tape),
    ) -> [Buffer; 3] {
        let (size, pool, h) = (self.widened(size), &self.pool, self.config.hidden);
        let mut x = pool.take(size.rows * h);
        for index in 0..self.config.layers {
            let (y, tape) = Block::new(self, size, index, lora).forward(x);
            keep(index, tape);
            x = y;
        }
        let (_normed, inv_rms) = (pool.take(size.needed * h), pool.take(size.needed));
        let hidden = pool.take(size.targets * h);
        [x, inv_rms, hidden]
    }

    /// Where no gradient is skipped, all rows are needed.
    fn widened(&self, size: Size) -> Size {
        match self.options.skipped_gradients {
            true => size,
            false => Size { needed: size.rows, ..size },
        }
    }
}

/// One block of a pass.
struct Block<'a> {
    index: usize,
    config: &'a ModelConfig,
    pool: &'a Pool,
    lora: Option<&'a Lora>,
    /// T.
    rows: usize,
    /// N, if the block goes on with fewer rows after the attention.
    pruned: Option<usize>,
}

use Projection::{Down, Gate, K, O, Q, Up, V};

impl<'a> Block<'a> {
    fn new(shadow: &'a Shadow, size: Size, index: usize, lora: Option<&'a Lora>) -> Self {
        let last = index + 1 == shadow.config.layers;
        let pruned = Some(size.needed).filter(|needed| last && *needed < size.rows);
        let Shadow { config, pool, .. } = shadow;
        Self { index, config, pool, lora, rows: size.rows, pruned }
    }

    fn rank(&self, projection: Projection) -> Option<usize> {
        let adapter = self.lora?.get(Site::Layer(self.index, projection))?;
        Some(adapter.rank)
    }

    fn any(&self, projections: &[Projection]) -> bool {
        !self.ranks(projections).is_empty()
    }

    /// The ranks of those with an adapter.
    fn ranks(&self, projections: &[Projection]) -> Vec<usize> {
        projections.iter().filter_map(|projection| self.rank(*projection)).collect()
    }

    /// u of projections with the same x, `width` wide, where they have adapters.
    fn project(&self, projections: &[Projection], rows: usize, width: usize) -> Tape {
        let ranks = self.ranks(projections);
        let all: usize = ranks.iter().sum();
        match ranks.len() {
            0 => Tape::new(),
            1 => vec![self.pool.take(rows * all)],
            _ => {
                let stacked = self.pool.take(all * width);
                let _joint = self.pool.take(rows * all);
                drop(stacked);
                ranks.iter().map(|rank| self.pool.take(rows * rank)).collect()
            }
        }
    }

    /// What the gradients of such adapters take on the way back.
    fn linears(&self, projections: &[Projection], rows: usize, width: usize, below: bool) {
        let ranks = self.ranks(projections);
        let all: usize = ranks.iter().sum();
        if all == 0 {
            return;
        }
        let _du = self.pool.take(rows * all);
        if ranks.len() > 1 {
            drop(self.pool.take(all * width));
            if below {
                drop(self.pool.take(all * width));
            }
        }
    }

    fn forward(&self, x: Buffer) -> (Buffer, Tape) {
        let mut tape = self.before_down(x);
        let after = self.pruned.unwrap_or(self.rows);
        let _act = self.pool.take(after * self.config.intermediate);
        let y = self.pool.take(after * self.config.hidden);
        tape.extend(self.project(&[Down], after, self.config.intermediate));
        (y, tape)
    }

    /// The block's output of rows beside a batch.
    fn forward_beside(&self) -> Buffer {
        let mut tape = self.attention_inputs();
        tape.push(self.pool.take(self.rows * self.config.query_width()));
        self.going_on(&mut tape);
        let after = self.pruned.unwrap_or(self.rows);
        let _act = self.pool.take(after * self.config.intermediate);
        let y = self.pool.take(after * self.config.hidden);
        drop(self.project(&[Down], after, self.config.intermediate));
        y
    }

    fn again(&self, x: Buffer) -> Tape {
        let mut tape = self.before_down(x);
        let after = self.pruned.unwrap_or(self.rows);
        if self.any(&[Down]) {
            let _act = self.pool.take(after * self.config.intermediate);
            tape.extend(self.project(&[Down], after, self.config.intermediate));
        }
        tape
    }

    fn before_down(&self, x: Buffer) -> Tape {
        let (config, pool, rows) = (self.config, self.pool, self.rows);
        let mut tape = vec![x];
        tape.extend(self.attention_inputs());
        tape.push(pool.take(rows * config.query_width()));
        tape.push(pool.take(rows * config.heads.heads));
        self.going_on(&mut tape);
        tape
    }

    fn attention_inputs(&self) -> Tape {
        let (config, pool, rows) = (self.config, self.pool, self.rows);
        let (query, key) = (config.query_width(), config.key_width());
        let _h = pool.take(rows * config.hidden);
        let mut tape = vec![pool.take(rows)];
        tape.extend([query, key, key].map(|width| pool.take(rows * width)));
        tape.extend(self.project(&[Q, K, V], rows, config.hidden));
        if config.qk_norm {
            // q and k stand after the norm of x.
            for (at, width) in [(1, query), (2, key)] {
                let normed = pool.take(rows * width);
                let inv_rms = pool.take(rows * width / config.heads.head_dim);
                let before = std::mem::replace(&mut tape[at], normed);
                tape.extend([before, inv_rms]);
            }
        }
        tape
    }

    /// The rows that go on after the attention.
    fn going_on(&self, tape: &mut Tape) {
        let (config, pool, query) = (self.config, self.pool, self.config.query_width());
        let rows = self.pruned.unwrap_or(self.rows);
        let _gathered = self.pruned.map(|n| [query, config.hidden].map(|w| pool.take(n * w)));
        tape.push(pool.take(rows * config.hidden));
        tape.extend(self.project(&[O], rows, query));
        let _h = pool.take(rows * config.hidden);
        tape.push(pool.take(rows));
        tape.extend([(); 2].map(|()| pool.take(rows * config.intermediate)));
        tape.extend(self.project(&[Gate, Up], rows, config.hidden));
    }

    /// From the gradient to y to that to x, where that is needed.
    fn backward(&self, d: Buffer, input_needed: bool) -> Option<Buffer> {
        let (config, pool, rows) = (self.config, self.pool, self.rows);
        let (query, key) = (config.query_width(), config.key_width());
        let after = self.pruned.unwrap_or(rows);
        let below_o = input_needed || self.any(&[Q, K, V]);
        let below_mlp = below_o || self.any(&[O]);
        if !self.mlp_backward(after, below_mlp) {
            return None;
        }
        let mut d = d;
        let _gathered = self.pruned.map(|n| pool.take(n * query));
        let dattended = below_o.then(|| pool.take(after * query));
        self.linears(&[O], after, query, below_o);
        let mut dattended = dattended?;
        if self.pruned.is_some() {
            d = pool.take(rows * config.hidden);
            dattended = pool.take(rows * query);
        }
        let [mut dq, mut dk, _dv] = [query, key, key].map(|width| pool.take(rows * width));
        if config.qk_norm {
            dq = pool.take(rows * query);
            dk = pool.take(rows * key);
        }
        let _h = pool.take(rows * config.hidden);
        drop(pool.take(rows));
        let dh = input_needed.then(|| pool.take(rows * config.hidden));
        self.linears(&[Q, K, V], rows, config.hidden, input_needed);
        drop((dq, dk, dattended));
        dh.map(|_| d)
    }

    fn mlp_backward(&self, rows: usize, below_needed: bool) -> bool {
        let (config, pool) = (self.config, self.pool);
        let wide = || pool.take(rows * config.intermediate);
        let below_act = below_needed || self.any(&[Gate, Up]);
        let act = wide();
        let dact = below_act.then(wide);
        self.linears(&[Down], rows, config.intermediate, below_act);
        drop(act);
        let Some(dact) = dact else { return false };
        let (_dgate, _dup) = (wide(), wide());
        drop(dact);
        let _h = pool.take(rows * config.hidden);
        drop(pool.take(rows));
        let _dh = below_needed.then(|| pool.take(rows * config.hidden));
        self.linears(&[Gate, Up], rows, config.hidden, below_needed);
        below_needed
    }
}

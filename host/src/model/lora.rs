//! The adapters: pairs of small matrices beside frozen linear layers (Hu et al. 2021, "LoRA"). The
//! only parameters that are trained.

use super::config::ModelConfig;
use super::targets::{LinearSite, Patterns, Projection, Site, Targets};
use crate::{Error, Result};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use uft_kernels::adamw;

/// What `adapter_config.json` and `[lora]` say.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// r where no pattern matches.
    pub rank: usize,
    /// Alpha where no pattern matches.
    pub alpha: f64,
    pub targets: Targets,
    pub rank_pattern: Patterns<usize>,
    pub alpha_pattern: Patterns<f64>,
    /// Scale alpha/√r instead of alpha/r (Kalajdzievski 2023, "rsLoRA").
    pub rslora: bool,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            targets: Targets::AllLinear,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            rslora: false,
        }
    }
}

/// One adapter: `y += scale (x Aᵀ) Bᵀ`.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// Hugging Face's module path, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    pub site: Site,
    /// r.
    pub rank: usize,
    pub inputs: usize,
    pub outputs: usize,
    /// s.
    pub scale: f32,
    /// A: `[r, in]`.
    pub a: Vec<f32>,
    /// B: `[out, r]`.
    pub b: Vec<f32>,
}

/// Gradients of one adapter, shaped like its matrices.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterGrad {
    pub a: Vec<f32>,
    pub b: Vec<f32>,
}

/// For each projection of a layer where its adapter is.
type Places = [Option<usize>; Projection::ALL.len()];

/// All adapters of a model, in the order of [`ModelConfig::linears`].
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    pub config: LoraConfig,
    pub adapters: Vec<Adapter>,
    /// `[L]`
    by_layer: Vec<Places>,
    head: Option<usize>,
}

/// The gradients of a [`Lora`], in the same order.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraGrads {
    pub adapters: Vec<AdapterGrad>,
}

/// One matrix of an adapter.
pub struct LoraTensor<'a> {
    /// PEFT's name, such as `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub name: String,
    pub shape: [usize; 2],
    pub data: &'a [f32],
}

/// A matrix with its gradient, for the optimizer.
pub struct Parameter<'a> {
    /// PEFT's name.
    pub name: String,
    pub value: &'a mut [f32],
    pub grad: &'a [f32],
}

impl LoraConfig {
    /// The adapters that this configuration means, with A and B still empty: how large they are is
    /// only a claim until a file confirms it. `strict` as for [`Targets::select`].
    pub fn place(&self, model: &ModelConfig, strict: bool) -> Result<Vec<Adapter>> {
        let linears = self.targets.select(model, strict)?;
        if strict {
            let names: Vec<&str> = linears.iter().map(|linear| linear.name.as_str()).collect();
            self.rank_pattern.expect_used(&names).map_err(|e| e.at("[lora] rank_pattern"))?;
            self.alpha_pattern.expect_used(&names).map_err(|e| e.at("[lora] alpha_pattern"))?;
        }
        let ranks = self.rank_pattern.of(&linears)?;
        let alphas = self.alpha_pattern.of(&linears)?;
        let places = linears.into_iter().zip(ranks.into_iter().zip(alphas));
        places.map(|(linear, (rank, alpha))| self.adapter(linear, rank, alpha)).collect()
    }

    fn adapter(
        &self,
        linear: LinearSite,
        rank: Option<usize>,
        alpha: Option<f64>,
    ) -> Result<Adapter> {
        let LinearSite { name, site, inputs, outputs } = linear;
        let (rank, alpha) = (rank.unwrap_or(self.rank), alpha.unwrap_or(self.alpha));
        if rank == 0 || rank > 1 << 16 {
            return Err(Error::config(format!("rank {rank} of {name}: it must be 1 to 65536")));
        }
        if !alpha.is_finite() || alpha <= 0.0 {
            return Err(Error::config(format!("alpha {alpha} of {name}: it must be positive")));
        }
        let r = rank as f64;
        let scale = if self.rslora { alpha / r.sqrt() } else { alpha / r } as f32;
        Ok(Adapter { name, site, rank, inputs, outputs, scale, a: vec![], b: vec![] })
    }
}

impl Lora {
    /// Fresh adapters: A uniform in ±1/√in (PyTorch's `kaiming_uniform` with a = √5), B zero. The
    /// numbers depend on the seed and the adapter's name alone, not on which others there are.
    pub fn init(config: &LoraConfig, model: &ModelConfig, seed: u64) -> Result<Self> {
        let mut adapters = config.place(model, true)?;
        for adapter in &mut adapters {
            let mut random = random_for(seed, &adapter.name);
            let bound = 1.0 / (adapter.inputs as f32).sqrt();
            let mut uniform = || {
                // 24 bits: every step between 0 and 1 that an f32 can hold.
                let unit = (random.next_u32() >> 8) as f32 / (1 << 24) as f32;
                bound * (2.0 * unit - 1.0)
            };
            adapter.a = (0..adapter.rank * adapter.inputs).map(|_| uniform()).collect();
            adapter.b = vec![0.0; adapter.outputs * adapter.rank];
        }
        Ok(Self::new(config.clone(), adapters, model.layers))
    }

    /// Adapters as placed by [`LoraConfig::place`] for a model of `layers` layers.
    pub(super) fn new(config: LoraConfig, adapters: Vec<Adapter>, layers: usize) -> Self {
        let mut by_layer: Vec<Places> = vec![Default::default(); layers];
        let mut head = None;
        for (at, adapter) in adapters.iter().enumerate() {
            match adapter.site {
                Site::Layer(layer, projection) => by_layer[layer][projection as usize] = Some(at),
                Site::Head => head = Some(at),
            }
        }
        Self { config, adapters, by_layer, head }
    }

    /// The place in [`Self::adapters`] of a site's adapter.
    pub fn index(&self, site: Site) -> Option<usize> {
        match site {
            Site::Layer(layer, projection) => self.by_layer[layer][projection as usize],
            Site::Head => self.head,
        }
    }

    /// The adapter of a site.
    pub fn get(&self, site: Site) -> Option<&Adapter> {
        self.index(site).map(|at| &self.adapters[at])
    }

    /// The lowest layer with an adapter, below which no gradient is needed; the number of layers if
    /// only the head has one.
    pub fn lowest_layer(&self) -> usize {
        let adapted = |layer: &Places| layer.iter().any(Option::is_some);
        self.by_layer.iter().position(adapted).unwrap_or(self.by_layer.len())
    }

    /// Number of trained parameters.
    pub fn parameters(&self) -> usize {
        let each = |adapter: &Adapter| adapter.rank * (adapter.inputs + adapter.outputs);
        self.adapters.iter().map(each).sum()
    }

    /// The same adapters with A and B empty.
    pub(super) fn without_matrices(&self) -> Self {
        let Self { config, adapters, by_layer, head } = self;
        let without = |adapter: &Adapter| {
            let &Adapter { ref name, site, rank, inputs, outputs, scale, .. } = adapter;
            let (a, b) = (vec![], vec![]);
            Adapter { name: name.clone(), site, rank, inputs, outputs, scale, a, b }
        };
        let adapters = adapters.iter().map(without).collect();
        Self { config: config.clone(), adapters, by_layer: by_layer.clone(), head: *head }
    }

    /// Every matrix under PEFT's name: A, B of the first adapter, A, B of the second, ...
    pub fn tensors(&self) -> impl Iterator<Item = LoraTensor<'_>> {
        self.adapters.iter().flat_map(|adapter| adapter.tensors(&adapter.a, &adapter.b))
    }

    /// Every gradient under PEFT's name, in the order of [`Self::tensors`].
    pub fn grad_tensors<'a>(
        &'a self,
        grads: &'a LoraGrads,
    ) -> impl Iterator<Item = LoraTensor<'a>> {
        let pairs = self.adapters.iter().zip(&grads.adapters);
        pairs.flat_map(|(adapter, grad)| adapter.tensors(&grad.a, &grad.b))
    }

    /// Every matrix with its gradient, in the order of [`Self::tensors`].
    pub fn parameters_mut<'a>(
        &'a mut self,
        grads: &'a LoraGrads,
    ) -> impl Iterator<Item = Parameter<'a>> {
        let pairs = self.adapters.iter_mut().zip(&grads.adapters);
        pairs.flat_map(|(adapter, grad)| {
            let [a, b] = adapter.tensor_names();
            [
                Parameter { name: a, value: &mut adapter.a, grad: &grad.a },
                Parameter { name: b, value: &mut adapter.b, grad: &grad.b },
            ]
        })
    }
}

impl Adapter {
    /// PEFT's names of A and B.
    pub fn tensor_names(&self) -> [String; 2] {
        ["A", "B"].map(|which| format!("base_model.model.{}.lora_{which}.weight", self.name))
    }

    /// `a` and `b`, shaped like this adapter's matrices, under their names.
    fn tensors<'a>(&self, a: &'a [f32], b: &'a [f32]) -> [LoraTensor<'a>; 2] {
        let [name_a, name_b] = self.tensor_names();
        [
            LoraTensor { name: name_a, shape: [self.rank, self.inputs], data: a },
            LoraTensor { name: name_b, shape: [self.outputs, self.rank], data: b },
        ]
    }
}

impl LoraGrads {
    /// Gradients of zero.
    pub fn zeros(lora: &Lora) -> Self {
        let zeros = |adapter: &Adapter| AdapterGrad {
            a: vec![0.0; adapter.a.len()],
            b: vec![0.0; adapter.b.len()],
        };
        Self { adapters: lora.adapters.iter().map(zeros).collect() }
    }

    /// Sets every gradient to zero.
    pub fn clear(&mut self) {
        for grad in &mut self.adapters {
            grad.a.fill(0.0);
            grad.b.fill(0.0);
        }
    }

    /// Euclidean norm over all matrices, before clipping.
    pub fn norm(&self) -> f64 {
        let squares = self.adapters.iter();
        let squares = squares.map(|g| adamw::norm_squared(&g.a) + adamw::norm_squared(&g.b));
        squares.sum::<f64>().sqrt()
    }
}

/// A stream of random numbers of its own for every seed and name.
fn random_for(seed: u64, name: &str) -> ChaCha8Rng {
    // FNV-1a, 64 bits.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&hash.to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

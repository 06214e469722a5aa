//! From a configuration to everything that a run computes with.

use super::memory::{MemoryPlan, Planner};
use super::plan::Rows;
use crate::config::schema::{Config, StageSection, TrainSection};
use crate::config::{Reference, Targets as ConfigTargets};
use crate::data::{Item, Order, Source};
use crate::model::memory::Weights;
use crate::model::targets::{Patterns, Targets};
use crate::model::{Adapters, Device, Lora, LoraConfig, Model, ModelConfig, peft};
use crate::plugins::Registry;
use crate::text::Text;
use crate::{Error, ErrorKind, Result};
use std::error::Error as _;
use std::path::{Path, PathBuf};
use uft_kernels::cuda::{Gpu, Properties};

/// A run before its first step.
pub struct Run {
    pub config: Config,
    pub text: Text,
    pub sources: Vec<Source>,
    pub model: Model,
    /// What it computes on, for people and for the identity of a run.
    pub device: String,
    /// What is trained.
    pub adapters: Adapters,
    /// The plugin libraries.
    pub libraries: Vec<PathBuf>,
    /// What it is going to hold in memory.
    pub memory: MemoryPlan,
}

/// One stage: its settings, and which sources are in it.
pub struct Stage {
    /// None if the run has no `[[stage]]`.
    pub name: Option<String>,
    pub train: TrainSection,
    pub sources: Vec<usize>,
}

impl Run {
    /// Loads data, model and adapter, in the order in which mistakes show soonest.
    ///
    /// # Errors
    /// Whatever cannot be used, in one line.
    pub fn prepare(config: Config) -> Result<Self> {
        use_threads(config.train.threads)?;
        let device = Device::open(config.train.device).map_err(|e| e.at("[train]"))?;
        let material = Material::gather(config)?;
        let weights = Weights::of(&material.dir, &material.model)?;
        let memory = material.memory(&device, weights)?;
        let mut model = Model::load(&material.dir, &device)?;
        let Material { config, text, registry, sources, lora, .. } = material;
        let MemoryPlan { options, activations, offloaded, positions, ref kernels, .. } = memory;
        model.prepare(options, activations, offloaded, positions, kernels)?;
        let adapters = model.place(lora)?;
        let libraries = registry.paths().map(Path::to_owned).collect();
        let device = device.name();
        Ok(Self { config, text, sources, model, device, adapters, libraries, memory })
    }

    /// The plan of a run's memory on a GPU that has so much, in bytes: there need be none, and no weights.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub fn plan_for_gpu(config: Config, memory: u64) -> Result<MemoryPlan> {
        use_threads(config.train.threads)?;
        let gpu = Gpu::counting(Properties {
            name: "such a GPU".into(),
            compute_capability: (8, 0),
            memory,
            multiprocessors: 108,
            shared_bytes: 163 << 10,
        });
        Material::gather(config)?.memory(&Device::Gpu(gpu), Weights::default())
    }

    /// The stages in order; one over all sources if the configuration has none.
    pub fn stages(&self) -> Vec<Stage> {
        stages(&self.config, &self.sources)
    }

    /// The sources that no stage trains; they are only evaluated.
    pub fn untrained(&self) -> impl Iterator<Item = &Source> {
        let stages = self.stages();
        let sources = self.sources.iter().enumerate();
        let trained = move |source| stages.iter().any(|stage| stage.sources.contains(&source));
        sources.filter(move |(index, _)| !trained(*index)).map(|(_, source)| source)
    }

    /// Whether policy and reference are the same function before a stage's first step.
    ///
    /// # Errors
    /// The device's.
    pub fn identical(&self, reference: Reference) -> Result<bool> {
        match reference {
            Reference::Previous => Ok(true),
            Reference::Base => self.adapters.add_nothing(),
        }
    }

    /// The reference's adapter: none is the base model.
    ///
    /// # Errors
    /// The device's.
    pub fn reference(&self, reference: Reference) -> Result<Option<Adapters>> {
        match reference {
            Reference::Base => Ok(None),
            Reference::Previous => self.adapters.copy().map(Some),
        }
    }

    /// Every held-out row of some sources.
    pub fn held_out(&self, sources: &[usize]) -> Vec<Item> {
        let of = |&source: &usize| {
            (0..self.sources[source].rows(Rows::HeldOut).len()).map(move |row| Item { source, row })
        };
        sources.iter().flat_map(of).collect()
    }
}

/// What a run is made of, but for the weights.
struct Material {
    config: Config,
    dir: PathBuf,
    model: ModelConfig,
    text: Text,
    registry: Registry,
    sources: Vec<Source>,
    lora: Lora,
}

impl Material {
    fn gather(config: Config) -> Result<Self> {
        let dir = PathBuf::from(&config.model.path);
        let model = ModelConfig::load(&dir)?;
        let text = load_text(&config)?;
        let mut registry = registry(&config)?;
        let mut sources = Vec::new();
        for data in &config.data {
            sources.push(Source::load(&config, data, &text, model.vocab, &mut registry)?);
        }
        let lora = match &config.model.adapter {
            Some(adapter) => peft::load(Path::new(adapter), &model)?,
            None => Lora::init(&lora_config(&config)?, &model, config.train.seed)?,
        };
        Ok(Self { config, dir, model, text, registry, sources, lora })
    }

    fn memory(&self, device: &Device, weights: Weights) -> Result<MemoryPlan> {
        let Self { config, model, sources, lora, .. } = self;
        let stages = stages(config, sources);
        MemoryPlan::new(&Planner { config, model, device, weights, lora, sources, stages: &stages })
    }
}

fn stages(config: &Config, sources: &[Source]) -> Vec<Stage> {
    let train = &config.train;
    if config.stage.is_empty() {
        let sources = (0..sources.len()).collect();
        return vec![Stage { name: None, train: train.clone(), sources }];
    }
    let of = |stage: &StageSection| Stage {
        name: Some(stage.name.clone()),
        train: train.for_stage(stage),
        sources: (0..sources.len()).filter(|&s| stage.data.contains(&sources[s].name)).collect(),
    };
    config.stage.iter().map(of).collect()
}

impl Stage {
    /// The stream of training rows; `sources` are all of the run, here and below.
    pub fn order(&self, sources: &[Source]) -> Order {
        let entry = |&s: &usize| {
            let rows = sources[s].train.len();
            (s, rows, sources[s].ratio.unwrap_or(rows as f64))
        };
        let entries: Vec<_> = self.sources.iter().map(entry).collect();
        Order::new(&entries, self.train.shuffle, self.train.seed)
    }

    /// Optimizer steps: as set, or as many as the epochs need. An epoch draws as many rows as there are.
    pub fn steps(&self, sources: &[Source]) -> u64 {
        self.train.steps.unwrap_or_else(|| {
            let rows: usize = self.sources.iter().map(|&s| sources[s].train.len()).sum();
            ((rows as f64 * self.train.epochs) / self.train.batch as f64).ceil().max(1.0) as u64
        })
    }
}

fn load_text(config: &Config) -> Result<Text> {
    let dir = Path::new(&config.model.path);
    let Some(file) = &config.text.template else { return Text::load(dir) };
    let template = std::fs::read_to_string(file)
        .map_err(|e| Error::config(format!("[text] template: {file}: cannot be read: {e}")))?;
    Text::load_with(dir, Some(&template))
}

/// The registry with the plugins of `[plugins] load`.
///
/// # Errors
/// If one cannot be loaded.
pub fn registry(config: &Config) -> Result<Registry> {
    let mut registry = Registry::new(config.plugins.dirs.iter().map(PathBuf::from));
    for name in &config.plugins.load {
        registry.load(name)?;
    }
    Ok(registry)
}

fn lora_config(config: &Config) -> Result<LoraConfig> {
    let lora = &config.lora;
    Ok(LoraConfig {
        rank: lora.rank,
        alpha: lora.alpha,
        targets: match &lora.targets {
            ConfigTargets::Pattern(text) => Targets::from_text(text),
            ConfigTargets::List(names) => Targets::List(names.clone()),
        },
        rank_pattern: Patterns(lora.rank_pattern.iter().map(|(k, v)| (k.clone(), *v)).collect()),
        alpha_pattern: Patterns(lora.alpha_pattern.iter().map(|(k, v)| (k.clone(), *v)).collect()),
        rslora: lora.rslora,
    })
}

/// Sets the number of threads for the whole process; 0 takes every core. The first call decides.
///
/// # Errors
/// If the threads cannot be started.
pub fn use_threads(threads: usize) -> Result<()> {
    let started = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    match started {
        Ok(()) => Ok(()),
        // Asking how many run would try to start them again, and panic.
        Err(e) if e.source().is_some() => Err(Error::new(
            ErrorKind::OutOfMemory,
            format!(
                "the threads cannot be started: {e}; lower [train] threads, or allow the program more"
            ),
        )),
        Err(_) => match rayon::current_num_threads() {
            running if threads > 0 && running != threads => {
                Err(Error::other(format!("{running} threads run already, {threads} are asked for")))
            }
            _ => Ok(()),
        },
    }
}

//! The plan of a run's memory, made before the weights are loaded: what will be held, and for what. The
//! largest micro-batches are found by going through the run ([`Largest`]), their activations by going
//! through a pass without arithmetic ([`Shadow`], [`on_gpu`]); what is in memory already is measured.
//!
//! A run on a GPU holds weights, what is trained and activations there, and the rest in the machine's memory: of
//! two memories, the GPU's is what a plan chooses for.

mod largest;
mod on_gpu;
mod ways;

use super::micro;
use super::setup::Stage;
use crate::config::schema::Config;
use crate::config::{Gain, Recompute, Reference};
use crate::data::{Example, Source};
use crate::machine::{self, in_mebibytes, mebibytes};

use crate::model::memory::{Shadow, Weights};
use crate::model::{Device, Lora, ModelConfig, Options};
use crate::{Error, ErrorKind, Result};
use comfy_table::{CellAlignment, Table, presets};
use largest::{Largest, Sizes};
use on_gpu::{Held, OnGpu};
use uft_kernels::cuda::Kernel;
use uft_kernels::memory as kernels;
use ways::Limits;

/// Of the machine's memory, so much is filled before layers are computed again to save some: a plan is
/// good to a tenth.
const COMFORTABLE: f64 = 0.9;
/// Of a GPU's, where what is planned is what is set aside.
const COMFORTABLE_ON_GPU: f64 = 0.98;

/// Bytes for knowing where a row's reference log-probs lie; they themselves are in a file.
const PLACE: usize = 64;

/// What a run is going to hold.
pub struct MemoryPlan {
    /// Name, bytes, and what is to be said about it.
    parts: Vec<(&'static str, usize, String)>,
    /// Most that is held while files are read, before the first pass.
    start: usize,
    /// What the process may have, in bytes; unknown outside of Linux.
    pub machine: Option<usize>,
    /// How to compute.
    pub options: Options,
    /// Rows of a reference pass's micro-batch at most.
    pub reference_tokens: usize,
    /// Bytes to set aside for activations.
    pub activations: usize,
    /// Bytes of page-locked memory to set aside for what a GPU offloads.
    pub offloaded: usize,
    /// Tokens of the longest text.
    pub positions: usize,
    /// What a GPU is going to launch.
    pub kernels: Vec<Kernel>,
    /// What a GPU is going to hold, where the run computes on one.
    gpu: Option<OnGpu>,
}

/// All that a plan is made from.
pub struct Planner<'a> {
    pub config: &'a Config,
    pub model: &'a ModelConfig,
    pub device: &'a Device,
    pub weights: Weights,
    pub lora: &'a Lora,
    pub sources: &'a [Source],
    pub stages: &'a [Stage],
}

/// One choice of what a plan is free in, with the bytes that follow from it.
struct Choice {
    options: Options,
    /// Of a pass, the chunk of logits included.
    activations: usize,
    /// By how much the chunk raises them.
    chunk: usize,
    kernels: usize,
    /// On a GPU.
    held: Held,
    /// Of the machine's memory, for inputs of layers on a GPU.
    offloaded: usize,
}

impl MemoryPlan {
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] if the run does not fit into the machine's memory, with what would.
    pub fn new(planner: &Planner) -> Result<Self> {
        let train = &planner.config.train;
        let resident = machine::resident();
        if matches!((train.recompute, planner.device), (Recompute::Offload, Device::Cpu)) {
            return Err(Error::config(
                "[train] recompute = \"offload\" takes from a GPU what the machine's memory can hold; on the CPU take \
                 \"all\"",
            ));
        }
        let limit = (train.memory > 0.0).then_some((train.memory * f64::from(1 << 30)) as usize);
        let machine = machine::available().map(|bytes| bytes as usize);
        let (machine, gpu) = match planner.device {
            Device::Cpu => (machine.into_iter().chain(limit).min(), None),
            Device::Gpu(gpu) => {
                // A GPU that is not there is in another machine.
                let machine = machine.filter(|_| gpu.most_allocated().is_none());
                (machine, Some((gpu.free_memory()? as usize).min(limit.unwrap_or(usize::MAX))))
            }
        };
        let sizes = Sizes::of(planner.sources, &train.without, &planner.model.heads);
        let mut largest = planner.largest(&sizes, train.micro_tokens);

        let mut parts = planner.fixed(resident.now as usize);
        let fixed: usize = parts.iter().map(|(_, bytes, _)| bytes).sum();
        if let (Some(_), Some(machine)) = (gpu, machine)
            && fixed > machine
        {
            return Err(Error::new(
                ErrorKind::OutOfMemory,
                format!(
                    "the run needs {} of memory beside the GPU's and {} are available: take a lower rank, less data \
                     at a time, or a larger machine",
                    mebibytes(fixed),
                    mebibytes(machine)
                ),
            ));
        }
        let mut limits = Limits { fixed, machine, gpu, beyond: 0 };
        let mut choice = planner.choose_for_all(&largest, &mut limits)?;
        let (fits, fits_beside) = (limits.allow(&choice, 1.0), limits.allow_beside(&choice));
        choice.activations += limits.beyond;
        let most = largest.most_rows();
        let reference_tokens = planner.reference_tokens(&largest, &choice)?;
        if reference_tokens > train.micro_tokens {
            largest.forward.push(largest.reference.size(reference_tokens));
        }

        let Choice { options, activations, chunk, kernels, held, offloaded } = choice;
        let reached = planner.reached_layers();
        let Options { recomputed_layers, recomputed_gates, offloaded_layers, .. } = options;
        let recomputed = match recomputed_layers + recomputed_gates {
            0 => "no layer computed again".to_owned(),
            n => format!("{n} of {reached} layers computed again on the way back"),
        };
        let recomputed = match recomputed_gates {
            0 => recomputed,
            n => format!("{recomputed}, of {n} gate and up alone"),
        };
        let recomputed = match offloaded_layers {
            0 => recomputed,
            n => format!("{recomputed}, with the input of {n} in the machine's memory meanwhile"),
        };
        let reference = match reference_tokens > train.micro_tokens {
            true => format!(", of the reference's log-probs {reference_tokens} rows"),
            false => String::new(),
        };
        let pass = format!(
            "largest micro-batch: {} rows, {} targets{reference}; {recomputed}",
            most.rows, most.targets
        );
        let gpu = match planner.device {
            Device::Gpu(device) => {
                parts.push(("inputs of layers", offloaded, "page-locked, for the GPU".into()));
                Some(OnGpu {
                    name: device.properties().name.clone(),
                    held,
                    activations,
                    note: pass,
                    available: gpu.unwrap_or_default(),
                })
            }
            Device::Cpu => {
                parts.push(("activations", activations - chunk, pass));
                parts.push(("log-prob chunk", chunk, "what it adds to them".into()));
                let note = "what products and attention take for themselves";
                parts.push(("kernels", kernels, note.into()));
                None
            }
        };
        let loading = planner.weights.held + planner.weights.mapped + resident.now as usize;
        let plan = Self {
            parts,
            start: loading.max(resident.peak as usize),
            machine,
            options,
            reference_tokens,
            activations,
            offloaded,
            positions: planner.positions(),
            kernels: match planner.device {
                Device::Gpu(device) => planner.kernels_on_gpu(&largest, options, device)?,
                Device::Cpu => Vec::new(),
            },
            gpu,
        };
        if fits && fits_beside {
            return Ok(plan);
        }
        log::info!("{}", plan.table());
        let would_fit = planner.would_fit(&sizes, &limits);
        let (needed, whose, available) = match &plan.gpu {
            None => (plan.total(), "memory", machine.unwrap_or_default()),
            Some(gpu) if !fits => (gpu.total(), "the GPU's memory", gpu.available),
            Some(_) => {
                let available = (COMFORTABLE * machine.unwrap_or_default() as f64) as usize;
                let whose = "memory beside the GPU's, some of it page-locked,";
                (fixed + offloaded, whose, available)
            }
        };
        Err(Error::new(
            ErrorKind::OutOfMemory,
            format!(
                "the run needs {} of {whose} and {} are available: {would_fit}",
                mebibytes(needed),
                mebibytes(available)
            ),
        ))
    }

    /// Most that the process will hold, in bytes.
    pub fn total(&self) -> usize {
        let parts: usize = self.parts.iter().map(|(_, bytes, _)| bytes).sum();
        parts.max(self.start)
    }

    /// The plan for people.
    pub fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        table.set_header(["memory", "MiB", ""]);
        let mut row = |name: &str, bytes: usize, note: &str| {
            table.add_row([name, &format!("{:.1}", in_mebibytes(bytes)), note]);
        };
        for (name, bytes, note) in self.parts.iter().filter(|(_, bytes, _)| *bytes > 0) {
            row(name, *bytes, note);
        }
        let parts: usize = self.parts.iter().map(|(_, bytes, _)| bytes).sum();
        if self.start > parts {
            row("reading files", self.start - parts, "before the first pass");
        }
        let machine = self.machine.map_or("the machine's memory is not known".into(), |machine| {
            format!("of {} available", mebibytes(machine))
        });
        row("total", self.total(), &machine);
        if let Some(gpu) = &self.gpu {
            let OnGpu { name, held, activations, note, available } = gpu;
            row("on the GPU: weights", held.weights, "in bf16, and the rotation's angles");
            let trained = "adapter in f32 and bf16, gradients, two moments";
            row("on the GPU: adapter and optimizer", held.trained, trained);
            row("on the GPU: activations", *activations, note);
            let available = format!("of {} available on {name}", mebibytes(*available));
            row("on the GPU: total", gpu.total(), &available);
        }
        if let Some(column) = table.column_mut(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
}

impl Choice {
    fn total(&self) -> usize {
        self.activations + self.kernels
    }
}

impl Planner<'_> {
    /// What is held whatever the micro-batches are. `resident` is what the process holds now.
    fn fixed(&self, resident: usize) -> Vec<(&'static str, usize, String)> {
        let train = &self.config.train;
        let matrices = size_of::<f32>() * self.lora.parameters();
        let on_gpu = matches!(self.device, Device::Gpu(_));
        let (copies, what) = match (on_gpu, self.previous()) {
            (true, _) => (0, "on the GPU"),
            (false, false) => (4, "adapter, gradients, two moments"),
            (false, true) => (5, "adapter, gradients, two moments, the reference's adapter"),
        };
        // A file is put together in memory before it is written, from what a GPU gave back first.
        let (saved, what_is_saved) = match (train.save_every, on_gpu) {
            (0, false) => (1, "the adapter"),
            (0, true) => (2, "the adapter, and its file"),
            (_, false) => (2, "the optimizer's moments"),
            (_, true) => (5, "adapter, moments, and their file"),
        };
        let data: usize = self.examples().map(|(_, example)| held(example)).sum();
        let reference: usize = match train.without.contains(&Gain::ReferenceCache) {
            true => 0,
            false => PLACE * self.examples().filter(|(source, _)| source.needs_reference()).count(),
        };
        let program = resident.saturating_sub(data + matrices);
        let weights = if on_gpu { 0 } else { self.weights.held + self.weights.mapped };
        vec![
            ("weights", weights, "pages of their files, and copies".into()),
            ("adapter and optimizer", copies * matrices, what.into()),
            ("writing files", saved * matrices, what_is_saved.into()),
            ("data", data + reference, "tokens, segments, places of reference log-probs".into()),
            ("program and tokenizer", program, "measured".into()),
        ]
    }

    fn examples(&self) -> impl Iterator<Item = (&Source, &Example)> {
        self.sources.iter().flat_map(|source| {
            let examples = source.train.iter().chain(&source.held_out);
            examples.map(move |example| (source, example))
        })
    }

    /// Whether a stage's reference is the adapter of the one before.
    fn previous(&self) -> bool {
        self.stages.iter().any(|s| s.train.reference == Reference::Previous)
    }

    fn options(&self) -> Options {
        Options::new(&self.config.train.without)
    }

    fn largest(&self, sizes: &Sizes, micro_tokens: usize) -> Largest {
        let on_gpu = matches!(self.device, Device::Gpu(_));
        let enough = micro::enough(self.model.hidden, on_gpu);
        let heads = &self.model.heads;
        Largest::of(self.sources, self.stages, sizes, heads, micro_tokens, enough)
    }

    /// Tokens of the longest text, those of the report among them.
    fn positions(&self) -> usize {
        let sample = self.sample().map_or(0, |(prompt, tokens)| prompt + tokens);
        self.examples().map(|(_, e)| e.group.longest()).max().unwrap_or(1).max(sample)
    }

    fn choice(&self, largest: &Largest, options: Options) -> Result<Choice> {
        match self.device {
            Device::Cpu => Ok(self.choice_on_cpu(largest, options)),
            Device::Gpu(gpu) => self.choice_on_gpu(largest, options, gpu),
        }
    }

    fn choice_on_cpu(&self, largest: &Largest, options: Options) -> Choice {
        let previous = self.previous();
        let peak = |with_chunk: bool| {
            let shadow = Shadow::new(self.model, options, with_chunk);
            for size in &largest.steps {
                shadow.step(*size, self.lora);
            }
            for [own, all] in &largest.with_others {
                shadow.step_with_others(*own, *all, self.lora);
            }
            for size in largest.steps.iter().chain(&largest.forward) {
                shadow.logps(*size, Some(self.lora));
                shadow.logps(*size, Some(self.lora).filter(|_| previous));
            }
            shadow.peak()
        };
        let (activations, without_chunk) = (peak(true), peak(false));
        let chunk = activations - without_chunk;
        let kernels = self.kernels(largest, &options);
        Choice { options, activations, chunk, kernels, held: Held::default(), offloaded: 0 }
    }

    fn kernels(&self, largest: &Largest, options: &Options) -> usize {
        let ModelConfig { hidden, intermediate, heads, .. } = self.model;
        let Largest { steps, with_others, forward, .. } = largest;
        let all = || steps.iter().chain(forward).chain(with_others.iter().flatten());
        let rows = all().map(|size| size.rows).max().unwrap_or(0);
        let targets = all().map(|size| size.targets).max().unwrap_or(0);
        let chunk = options.chunk();
        let columns = chunk.columns.min(self.model.vocab);
        let products = [
            kernels::product(rows, *hidden, *intermediate),
            kernels::product(rows, *intermediate, *hidden),
            kernels::product(chunk.rows.min(targets), *hidden, columns),
        ];
        let largest_product = products.into_iter().max().unwrap_or(0);
        largest_product.max(kernels::attention(heads, largest.longest()))
            + kernels::rotation(heads, self.positions())
    }
}

/// Bytes of a row's tokens and segments.
fn held(example: &Example) -> usize {
    let group = &example.group;
    let branches = group.branches.iter().map(|branch| {
        let ranges: usize = branch.segments.iter().map(|s| size_of_val(s.trained.as_slice())).sum();
        size_of_val(branch.tokens.as_slice()) + size_of_val(branch.segments.as_slice()) + ranges
    });
    size_of::<Example>()
        + size_of_val(group.prompt.as_slice())
        + size_of_val(group.branches.as_slice())
        + branches.sum::<usize>()
}

//! Every section and key of a run's TOML file. This file is the source of `uft config` and of
//! docs/config.md.

use super::ramp::ObjectiveRef;
use super::section::section;
use super::values::{
    BadRows, Device, EndOfTurn, Gain, LongRows, Mixing, NonFinite, PluginRef, Recompute, Reference,
    Schedule, Targets,
};
use std::collections::BTreeMap;

section! {
    /// The base model. It stays frozen; what is trained is an adapter.
    struct ModelSection = "[model]" {
        /// Directory in Hugging Face's layout: config.json, safetensors, tokenizer.json.
        /// Paths are relative to the directory in which `uft` runs.
        path: String = String::new(),
        /// PEFT adapter directory to continue from. Its rank, alpha and targets replace `[lora]`.
        adapter: Option<String> = None,
    }
}

section! {
    /// The adapter to train: W + scale * B * A with scale = alpha / rank.
    struct LoraSection = "[lora]" {
        /// Rank of the update.
        rank: usize = 16,
        /// Numerator of the scale.
        alpha: f64 = 32.0,
        /// "all-linear" (every linear layer but the head), a list of names such as ["q_proj", "v_proj"],
        /// or a regular expression that must match a module's whole path.
        targets: Targets = Targets::Pattern("all-linear".into()),
        /// Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA).
        rslora: bool = false,
        /// Ranks for single modules: name or regular expression = rank.
        rank_pattern: BTreeMap<String, usize> = BTreeMap::new(),
        /// Alphas for single modules: name or regular expression = alpha.
        alpha_pattern: BTreeMap<String, f64> = BTreeMap::new(),
    }
}

section! {
    /// Where plugins come from. Plugins that `[[data]]` names are loaded by themselves.
    struct PluginsSection = "[plugins]" {
        /// Folders to search before the one that `uft` lies in.
        dirs: Vec<String> = vec![],
        /// Libraries to load besides, by name or by path. A library may hold several plugins.
        load: Vec<String> = vec![],
    }
}

section! {
    /// One source of feedback. All sources of a stage meet in one batch.
    struct DataSection = "[[data]]" {
        /// Name in metrics and messages.
        name: String = String::new(),
        /// JSONL files, in this order.
        files: Vec<String> = vec![],
        /// JSONL files of held-out rows.
        eval_files: Vec<String> = vec![],
        /// Share of the rows of `files` to hold out, spread evenly over them; 0 holds out none.
        eval_fraction: f64 = 0.0,
        /// Feedback adapter: a name, or { plugin = "scores", range = [0, 4] } with its parameters.
        adapter: PluginRef = PluginRef::default(),
        /// Objective: a name, or { plugin = "una-score", beta = 0.1 } with its parameters. A parameter that is
        /// a number may change over the steps: beta = { schedule = "linear", from = 0.01, to = 0.1, over = 0.5 },
        /// or "cosine"; `over` is as `warmup` of [train], all steps by default, and what is measured before and
        /// after a run has the last value. A list of such tables is a sum of objectives over the same
        /// rows, each with a `weight` (1 by default; it may change too); each takes the responses of the kinds
        /// that it accepts.
        objective: ObjectiveRef = ObjectiveRef::default(),
        /// Factor of this source's loss.
        weight: f64 = 1.0,
        /// Share of this source in the batches, relative to the others'. Unset: by its size.
        /// Either all sources of a stage set it or none.
        ratio: Option<f64> = None,
    }
}

section! {
    /// How rows become tokens.
    struct TextSection = "[text]" {
        /// File with a chat template that replaces the model's own.
        template: Option<String> = None,
        /// "require": the last trained token of every response must end the turn, otherwise the row
        /// is an error. "ignore": anything goes.
        end_of_turn: EndOfTurn = EndOfTurn::Require,
        /// Rows longer than max_length: "skip" leaves them out, counted; "cut-prompt" cuts the prompt's
        /// beginning; "error" stops.
        long_rows: LongRows = LongRows::Skip,
        /// Rows that cannot be used for another reason: "error" stops and lists them, "skip" leaves
        /// them out, counted.
        bad_rows: BadRows = BadRows::Error,
    }
}

section! {
    /// The run.
    struct TrainSection = "[train]" {
        /// Directory for the adapter, checkpoints and metrics.jsonl.
        output: String = "out".into(),
        /// Optimizer steps. Unset: as `epochs` says.
        steps: Option<u64> = None,
        /// Passes over the data, if `steps` is not set.
        epochs: f64 = 1.0,
        /// Groups (a prompt with its responses) per optimizer step.
        batch: usize = 8,
        /// Most tokens in one forward and backward pass; on the CPU fewer where more would be no faster. Memory
        /// grows with it; the gradient does not depend on it.
        micro_tokens: usize = 4096,
        /// Layers whose activations are computed again on the way back instead of being kept: "auto" (as few
        /// as make the run fit into memory; on a GPU of a layer gate and up alone where that is enough, and where all
        /// are too few, the inputs of as many as necessary in the machine's memory meanwhile), "none", "all" (their
        /// inputs as with "auto"), or "offload" (on a GPU: all, and every input in the machine's memory). No number
        /// depends on it.
        recompute: Recompute = Recompute::Auto,
        /// Most memory to use, in GiB; 0 is what the machine has, or the GPU where the run computes on one. A run
        /// that needs more is refused.
        memory: f64 = 0.0,
        /// Peak learning rate.
        lr: f64 = 1e-4,
        /// "cosine", "linear" (both down to 0) or "constant", after the warm-up.
        schedule: Schedule = Schedule::Cosine,
        /// Warm-up: a share of the steps if below 1, otherwise a number of steps.
        warmup: f64 = 0.1,
        /// AdamW's decoupled weight decay.
        weight_decay: f64 = 0.0,
        /// AdamW's decay of the gradient's mean.
        beta1: f64 = 0.9,
        /// AdamW's decay of the squared gradient's mean.
        beta2: f64 = 0.999,
        /// AdamW's epsilon.
        eps: f64 = 1e-8,
        /// Longest gradient norm; longer ones are scaled down to it. 0 switches clipping off.
        clip: f64 = 1.0,
        /// Seed of everything random: the adapter's start, the order of rows, sampling.
        seed: u64 = 1,
        /// Draw each source's rows in a new random order every epoch.
        shuffle: bool = true,
        /// Longest sequence, prompt and response together, in tokens.
        max_length: usize = 2048,
        /// "sources": every source's loss is a mean over its own items of the step, and these are added
        /// with their weights. "items": all items of the step count the same, times their weights.
        mixing: Mixing = Mixing::Sources,
        /// The reference model: "base" (adapter off) or "previous" (the adapter as it is when the stage
        /// starts).
        reference: Reference = Reference::Base,
        /// Directory for reference log-probs, which all runs on the same base model share. Unset:
        /// uft/reference in the user's cache directory ($XDG_CACHE_HOME or ~/.cache).
        reference_cache: Option<String> = None,
        /// "cuda" is the GPU, in bf16; "cpu" computes in f32; "auto" takes the GPU where there is one. The default
        /// will be "auto" once the kernels, which are tested in an emulation, have been run on a GPU.
        /// "emulated" executes the GPU's kernels on the CPU, thousands of times slower, to test them.
        device: Device = Device::Cpu,
        /// Threads; 0 takes every core.
        threads: usize = 0,
        /// Save a checkpoint every so many steps, to go on from with `uft train --resume`; 0 saves one only
        /// when the run is interrupted.
        save_every: u64 = 0,
        /// Most checkpoints to keep: the oldest go first, the best by held-out loss stays. 0 keeps all.
        save_total_limit: usize = 0,
        /// A loss or gradient that is not finite: "stop" saves a checkpoint and ends the run, "skip" leaves
        /// the step's update out.
        non_finite: NonFinite = NonFinite::Stop,
        /// Switches gains off, to measure them: "packing" (several groups in a micro-batch), "shared-prompts"
        /// (a prompt computed once for all of its responses), "fused-log-probs" (log-probs without all
        /// logits in memory), "skipped-gradients" (what no adapter needs left out), "reference-cache"
        /// (reference log-probs kept for epochs, stages and runs). Numbers change in their last bits, so with any of
        /// them reference log-probs are kept for the run alone.
        without: Vec<Gain> = vec![],
    }
}

section! {
    /// Held-out evaluation, on the `eval_files` and `eval_fraction` of the sources.
    struct EvalSection = "[eval]" {
        /// Evaluate every so many steps; 0 evaluates before and after training only.
        every: u64 = 0,
        /// Prompts of held-out rows to answer before and after training.
        samples: usize = 0,
        /// Most tokens of such an answer.
        sample_tokens: usize = 64,
        /// Temperature of such an answer; 0 takes the likeliest token every time.
        sample_temperature: f64 = 0.0,
    }
}

section! {
    /// One of several stages in sequence; without any, the run is one stage over all sources.
    /// Keys that are not set come from [train].
    struct StageSection = "[[stage]]" {
        /// Name in messages, metrics and of the stage's adapter folder.
        name: String = String::new(),
        /// Names of the sources that are trained in this stage.
        data: Vec<String> = vec![],
        /// As in [train].
        reference: Option<Reference> = None,
        /// As in [train].
        steps: Option<u64> = None,
        /// As in [train].
        epochs: Option<f64> = None,
        /// As in [train].
        batch: Option<usize> = None,
        /// As in [train].
        lr: Option<f64> = None,
        /// As in [train].
        schedule: Option<Schedule> = None,
        /// As in [train].
        warmup: Option<f64> = None,
    }
}

/// A run, as its TOML file says it.
#[derive(Clone, Debug, Default, PartialEq, serde::Deserialize, serde::Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub model: ModelSection,
    pub lora: LoraSection,
    pub plugins: PluginsSection,
    pub data: Vec<DataSection>,
    pub text: TextSection,
    pub train: TrainSection,
    pub eval: EvalSection,
    pub stage: Vec<StageSection>,
}

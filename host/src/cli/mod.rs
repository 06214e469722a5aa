//! The command line. Results go to stdout, progress and messages to stderr.

mod check;
mod config;
mod device;
mod generate;
mod grad;
mod mask;
mod merge;
mod output;
mod plugin;
mod score;
mod train;
mod verify_resume;

use crate::{ErrorKind, Result};
use clap::{Args, Parser, Subcommand};
use output::print;
use std::io::Write;
use std::path::PathBuf;

/// Unified fine-tuning: demonstrations, scores, thumbs and preference pairs in one stage.
#[derive(Parser)]
#[command(name = "uft", version, after_help = exit_codes(), arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train an adapter as a TOML file says
    Train(train::TrainArgs),
    /// Prove that a run, interrupted and resumed, is the uninterrupted one
    VerifyResume(verify_resume::VerifyArgs),
    /// Do everything but train: config, plugins, every row, the token mask, the step-0 identity
    Check(check::CheckArgs),
    /// Print the log-probs and implicit rewards of responses, one JSON object a line
    Score(score::ScoreArgs),
    /// Write the gradient of the first optimizer step, before clipping
    Grad(grad::GradArgs),
    /// Answer a prompt
    Generate(generate::GenerateArgs),
    /// Write a model with an adapter merged into its weights
    Merge(merge::MergeArgs),
    /// Make a plugin, list plugins with their parameters, or check them
    #[command(subcommand, alias = "plugins")]
    Plugin(plugin::PluginCommand),
    /// Show which GPUs and which compilers for their kernels were found
    Device(device::DeviceArgs),
    /// Print every configuration key with its meaning and default
    Config(config::ConfigArgs),
}

/// A run's configuration.
#[derive(Args)]
pub struct RunArgs {
    /// The run's TOML file
    pub config: PathBuf,
    /// Override a key: train.lr=3e-5, data[rated].weight=2
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

impl RunArgs {
    fn load(&self) -> Result<crate::config::Config> {
        crate::config::Config::load(&self.config, &self.set)
    }
}

fn exit_codes() -> String {
    let codes = ErrorKind::ALL.iter().map(|(_, code, meaning)| format!("  {code}  {meaning}\n"));
    format!("Exit codes:\n  0  success\n{}", codes.collect::<String>())
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    /// What went wrong, in words for the user.
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Train(args) => train::run(&args),
            Command::VerifyResume(args) => verify_resume::run(&args),
            Command::Check(args) => check::run(&args),
            Command::Score(args) => score::run(&args),
            Command::Grad(args) => grad::run(&args),
            Command::Generate(args) => generate::run(&args),
            Command::Merge(args) => merge::run(&args),
            Command::Plugin(command) => plugin::run(&command),
            Command::Device(args) => device::run(&args),
            Command::Config(args) => config::run(&args),
        }
    }
}

/// The whole program: parses the command line, runs it, and exits with the error's code.
pub fn main() {
    let mut logger =
        env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"));
    logger.format(|out, record| match record.level() {
        log::Level::Info => writeln!(out, "{}", record.args()),
        level => writeln!(out, "{}: {}", level.as_str().to_lowercase(), record.args()),
    });
    logger.init();
    let cli = Cli::parse();
    if let Err(error) = output::keep_stdout().and_then(|()| cli.run()) {
        eprintln!("error: {error}");
        std::process::exit(error.kind.exit_code());
    }
}

#[cfg(test)]
mod tests {
    use crate::model::inference::Loaded;
    use crate::model::{Device, Forward, Inference, ModelConfig};
    use crate::{ErrorKind, Result};
    use std::path::{Path, PathBuf};
    use uft_kernels::cuda::{Gpu, Properties};

    fn dir() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/models/llama")
    }

    pub fn config() -> ModelConfig {
        ModelConfig::load(&dir()).unwrap()
    }

    /// A GPU with so much memory, which only counts.
    fn counting(memory: usize) -> Gpu {
        Gpu::counting(Properties {
            name: "none".into(),
            compute_capability: (8, 0),
            memory: memory as u64,
            multiprocessors: 1,
            shared_bytes: 163 << 10,
        })
    }

    /// Bytes that passes take.
    pub fn total(passes: &[Forward]) -> usize {
        let (dir, config, gpu) = (dir(), config(), counting(0));
        let device = Device::Gpu(gpu.clone());
        let inference = Inference { dir: &dir, config: &config, lora: None, device: &device };
        inference.plan(&gpu, passes).unwrap().total()
    }

    /// What is said where a GPU has so much.
    pub fn refused(memory: usize, load: impl FnOnce(Inference) -> Result<Loaded>) -> String {
        let (dir, config, device) = (dir(), config(), Device::Gpu(counting(memory)));
        let inference = Inference { dir: &dir, config: &config, lora: None, device: &device };
        let refused = load(inference).err().expect("it does not fit");
        assert_eq!(refused.kind, ErrorKind::OutOfMemory);
        refused.message
    }
}

//! What a configuration must satisfy beyond the types of its keys.

use super::schema::{Config, DataSection, StageSection, TrainSection};
use crate::{Error, Result};
use uft_core::params::nearest;

/// Checks everything that needs no other file.
///
/// # Errors
/// The first key that is wrong, and what it may be.
pub fn check(config: &Config) -> Result<()> {
    require(!config.model.path.is_empty(), "[model] path is missing: the base model's directory")?;
    require(config.lora.rank > 0, "[lora] rank must be at least 1")?;
    require(
        config.lora.alpha.is_finite() && config.lora.alpha > 0.0,
        "[lora] alpha must be above 0",
    )?;
    require(!config.data.is_empty(), "no [[data]]: at least one source of feedback is needed")?;
    for (index, data) in config.data.iter().enumerate() {
        let earlier = &config.data[..index];
        source(data, earlier).map_err(|e| e.at(format!("[[data]] {}", label(data, index))))?;
    }
    train(&config.train)?;
    let temperature = config.eval.sample_temperature;
    require(
        temperature.is_finite() && temperature >= 0.0,
        "[eval] sample_temperature must not be negative",
    )?;
    for (index, stage) in config.stage.iter().enumerate() {
        let place = if stage.name.is_empty() {
            format!("number {}", index + 1)
        } else {
            format!("`{}`", stage.name)
        };
        check_stage(config, stage, index).map_err(|e| e.at(format!("[[stage]] {place}")))?;
    }
    let everything: Vec<&DataSection> = config.data.iter().collect();
    if config.stage.is_empty() { ratios(&everything) } else { Ok(()) }
}

fn require(holds: bool, otherwise: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::config(otherwise)) }
}

fn label(data: &DataSection, index: usize) -> String {
    if data.name.is_empty() { format!("number {}", index + 1) } else { format!("`{}`", data.name) }
}

fn source(data: &DataSection, earlier: &[DataSection]) -> Result<()> {
    require(!data.name.is_empty(), "name is missing")?;
    require(
        !data.name.contains(['/', '\n']),
        "name must not contain `/`: it separates parts of metric names",
    )?;
    require(!earlier.iter().any(|d| d.name == data.name), "the name is taken by another [[data]]")?;
    require(!data.files.is_empty(), "files is missing: at least one JSONL file")?;
    require(
        !data.adapter.plugin.is_empty(),
        "adapter is missing, such as adapter = \"demonstrations\"",
    )?;
    require(
        data.objective.terms.iter().any(|term| !term.plugin.plugin.is_empty()),
        "objective is missing, such as objective = \"uft-sft\"",
    )?;
    data.objective.check().map_err(|why| Error::config(format!("objective: {why}")))?;
    require(data.weight.is_finite() && data.weight >= 0.0, "weight must not be negative")?;
    require((0.0..1.0).contains(&data.eval_fraction), "eval_fraction must be from 0 to below 1")?;
    require(data.ratio.is_none_or(|r| r.is_finite() && r > 0.0), "ratio must be above 0")
}

fn train(train: &TrainSection) -> Result<()> {
    let positive = |x: f64| x.is_finite() && x > 0.0;
    require(!train.output.is_empty(), "[train] output is missing: the directory for results")?;
    require(train.steps != Some(0), "[train] steps must be at least 1")?;
    require(positive(train.epochs), "[train] epochs must be above 0")?;
    require(train.batch > 0, "[train] batch must be at least 1")?;
    require(train.micro_tokens > 0, "[train] micro_tokens must be at least 1")?;
    require(train.max_length > 1, "[train] max_length must be at least 2")?;
    require(
        train.memory.is_finite() && train.memory >= 0.0,
        "[train] memory must not be negative; 0 is what the machine has",
    )?;
    require(train.lr.is_finite() && train.lr >= 0.0, "[train] lr must not be negative")?;
    require(
        train.warmup.is_finite() && train.warmup >= 0.0,
        "[train] warmup must not be negative",
    )?;
    require((0.0..1.0).contains(&train.beta1), "[train] beta1 must be from 0 to below 1")?;
    require((0.0..1.0).contains(&train.beta2), "[train] beta2 must be from 0 to below 1")?;
    require(positive(train.eps), "[train] eps must be above 0")?;
    require(
        train.weight_decay.is_finite() && train.weight_decay >= 0.0,
        "[train] weight_decay must not be negative",
    )?;
    require(train.clip.is_finite() && train.clip >= 0.0, "[train] clip must not be negative")
}

fn check_stage(config: &Config, stage: &StageSection, index: usize) -> Result<()> {
    require(!stage.name.is_empty(), "name is missing")?;
    require(!stage.name.contains('/'), "name must not contain `/`")?;
    require(
        !config.stage[..index].iter().any(|s| s.name == stage.name),
        "the name is taken by another stage",
    )?;
    require(!stage.data.is_empty(), "data is missing: the names of its sources")?;
    require(
        stage.reference.is_some(),
        "reference is missing: \"base\" (adapter off) or \"previous\" (the adapter as the stage before left it)",
    )?;
    for (i, name) in stage.data.iter().enumerate() {
        require(!stage.data[..i].contains(name), "data names a source twice")?;
    }
    let known: Vec<&str> = config.data.iter().map(|d| d.name.as_str()).collect();
    if let Some(unknown) = stage.data.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(Error::config(format!(
            "no [[data]] is named `{unknown}`{}",
            nearest(unknown, &known)
        )));
    }
    let sources: Vec<&DataSection> =
        config.data.iter().filter(|d| stage.data.contains(&d.name)).collect();
    ratios(&sources)?;
    train(&config.train.for_stage(stage))
}

fn ratios(sources: &[&DataSection]) -> Result<()> {
    let set = sources.iter().filter(|d| d.ratio.is_some()).count();
    require(
        set == 0 || set == sources.len(),
        "ratio is set for some [[data]] and not for others: set it for all sources of the stage or for none",
    )
}

impl TrainSection {
    /// The run's settings with those that a stage sets itself.
    pub fn for_stage(&self, stage: &StageSection) -> TrainSection {
        TrainSection {
            reference: stage.reference.unwrap_or(self.reference),
            // A stage's own epochs win over steps of [train].
            steps: stage.steps.or(if stage.epochs.is_some() { None } else { self.steps }),
            epochs: stage.epochs.unwrap_or(self.epochs),
            batch: stage.batch.unwrap_or(self.batch),
            lr: stage.lr.unwrap_or(self.lr),
            schedule: stage.schedule.unwrap_or(self.schedule),
            warmup: stage.warmup.unwrap_or(self.warmup),
            ..self.clone()
        }
    }
}

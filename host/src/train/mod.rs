//! Training: the recipe, read from top to bottom. One loop serves every objective.

pub mod metrics;
mod micro;
mod mismatched;
pub mod optimizer;
pub mod pass;
pub mod plan;
mod progress;
pub mod report;
pub mod schedule;
pub mod setup;

use crate::model::{LoraGrads, peft};
use crate::{Error, Result};
use metrics::number;
use optimizer::Optimizer;
use pass::{Outcome, Pass};
use plan::{At, Rows};
use progress::Progress;
use report::{Report, Snapshot};
use serde_json::{Map, Value};
use setup::{Run, Stage};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Runs all stages, writes the adapter and gives the report for the user.
///
/// # Errors
/// If anything fails; what was written until then stays.
pub fn train(run: &mut Run) -> Result<Report> {
    let output = PathBuf::from(&run.config.train.output);
    let mut logs = Logs::create(&output)?;
    let stages = run.stages();
    let started = Instant::now();

    let (first, last) = (&stages[0], stages.last().expect("a run has a stage"));
    let before = snapshot(run, first)?;
    let mut done = Done::default();
    for stage in &stages {
        train_stage(run, stage, &output, &mut logs, &mut done)?;
        if let Some(name) = &stage.name {
            peft::save(&output.join(format!("stage-{name}")), &run.lora, &run.config.model.path)?;
        }
    }
    peft::save(&output, &run.lora, &run.config.model.path)?;
    let seconds = started.elapsed().as_secs_f64();
    let after = snapshot(run, last)?;
    Ok(Report { before, after, steps: done.steps, tokens: done.tokens, seconds, output })
}

/// Work of the stages so far.
#[derive(Default)]
struct Done {
    steps: u64,
    tokens: u64,
}

fn train_stage(
    run: &mut Run,
    stage: &Stage,
    output: &Path,
    logs: &mut Logs,
    done: &mut Done,
) -> Result<()> {
    let settings = &stage.train;
    let steps = stage.steps(run);
    let warmup = schedule::warmup_steps(settings.warmup, steps);
    let reference = run.reference(settings.reference);
    forget_reference(run);
    let identical = run.identical(settings.reference);

    let mut order = stage.order(run);
    let mut optimizer = Optimizer::new(settings, &run.lora);
    let mut grads = LoraGrads::zeros(&run.lora);
    let mut progress = Progress::new(stage.name.as_deref(), steps);
    let rows: usize = stage.sources.iter().map(|&s| run.sources[s].train.len()).sum();

    for step in 0..steps {
        let started = Instant::now();
        let items = order.batch(settings.batch);
        let lr = schedule::learning_rate(settings.schedule, settings.lr, step, steps, warmup);

        grads.clear();
        let pass = Pass {
            model: &run.model,
            policy: &run.lora,
            reference: reference.as_ref(),
            micro_tokens: settings.micro_tokens,
            mixing: settings.mixing,
            at: At { number: step, steps, training: true },
            identical: identical && step == 0,
        };
        let outcome = pass.run(&mut run.sources, Rows::Train, &items, Some(&mut grads))?;
        let norm = optimizer::norm(&grads);
        if !norm.is_finite() {
            let places: Vec<String> = items
                .iter()
                .map(|i| run.sources[i.source].train[i.row].origin.to_string())
                .collect();
            return Err(Error::non_finite(format!(
                "step {}: the gradient is not finite; its rows: {}",
                step + 1,
                places.join(", ")
            )));
        }
        optimizer.step(&mut run.lora, &mut grads, norm, lr);

        done.steps += 1;
        done.tokens += outcome.tokens;
        let seconds = started.elapsed().as_secs_f64();
        let mut line = Map::new();
        line.insert("step".into(), done.steps.into());
        if let Some(name) = &stage.name {
            line.insert("stage".into(), name.as_str().into());
        }
        line.insert("loss".into(), number(outcome.loss));
        line.insert("grad_norm".into(), number(norm));
        line.insert("lr".into(), number(lr));
        line.insert(
            "epoch".into(),
            number(((step + 1) * settings.batch as u64) as f64 / rows as f64),
        );
        line.insert("tokens".into(), outcome.tokens.into());
        line.insert("trained_tokens".into(), outcome.trained.into());
        line.insert("num_tokens".into(), done.tokens.into());
        line.insert("tokens_per_second".into(), number(outcome.tokens as f64 / seconds));
        line.extend(outcome.metrics.to_json());
        logs.step(line)?;
        progress.step(&outcome);

        let (due, next) = (|every: u64| every > 0 && (step + 1) % every == 0, done.steps);
        if due(run.config.eval.every) && step + 1 < steps {
            let held_out = evaluate(run, stage, reference.as_ref(), step + 1, steps)?;
            logs.held_out(next, &held_out)?;
            progress.note(&format!("step {next}: held-out loss {:.4}", held_out.loss));
        }
        if due(settings.save_every) && step + 1 < steps {
            peft::save(
                &output.join(format!("checkpoint-{next}")),
                &run.lora,
                &run.config.model.path,
            )?;
        }
    }
    let held_out = evaluate(run, stage, reference.as_ref(), steps, steps)?;
    if held_out.trained > 0 {
        logs.held_out(done.steps, &held_out)?;
    }
    progress.finish();
    Ok(())
}

/// Reference log-probs of another stage's reference are of no use.
fn forget_reference(run: &mut Run) {
    for source in &mut run.sources {
        source.train.iter_mut().chain(&mut source.held_out).for_each(|e| e.ref_logps = None);
    }
}

/// Loss and metrics of a stage's held-out rows, all of them as one step.
fn evaluate(
    run: &mut Run,
    stage: &Stage,
    reference: Option<&crate::model::Lora>,
    number: u64,
    steps: u64,
) -> Result<Outcome> {
    let items = run.held_out(&stage.sources);
    let pass = Pass {
        model: &run.model,
        policy: &run.lora,
        reference,
        micro_tokens: stage.train.micro_tokens,
        mixing: stage.train.mixing,
        at: At { number, steps, training: false },
        identical: false,
    };
    pass.run(&mut run.sources, Rows::HeldOut, &items, None)
}

/// Held-out metrics and sample answers of the model as it is now, against the base model.
fn snapshot(run: &mut Run, stage: &Stage) -> Result<Snapshot> {
    let everything =
        Stage { name: None, train: stage.train.clone(), sources: (0..run.sources.len()).collect() };
    forget_reference(run);
    let metrics = evaluate(run, &everything, None, 0, 0)?.metrics;
    forget_reference(run);
    Ok(Snapshot { metrics, answers: report::answers(run)? })
}

/// `metrics.jsonl`: one line per step. `eval.jsonl`: one line per held-out evaluation, its names with
/// `eval_` in front.
struct Logs {
    steps: File,
    held_out: File,
}

impl Logs {
    fn create(output: &Path) -> Result<Self> {
        let fail = |e: std::io::Error| {
            Error::other(format!("{}: cannot be written: {e}", output.display()))
        };
        std::fs::create_dir_all(output).map_err(fail)?;
        let create = |name: &str| File::create(output.join(name)).map_err(fail);
        Ok(Self { steps: create("metrics.jsonl")?, held_out: create("eval.jsonl")? })
    }

    fn step(&mut self, line: Map<String, Value>) -> Result<()> {
        append(&mut self.steps, "metrics.jsonl", line)
    }

    fn held_out(&mut self, step: u64, outcome: &Outcome) -> Result<()> {
        let mut line = Map::new();
        line.insert("step".into(), step.into());
        line.insert("eval_loss".into(), number(outcome.loss));
        line.extend(
            outcome
                .metrics
                .to_json()
                .into_iter()
                .map(|(name, value)| (format!("eval_{name}"), value)),
        );
        append(&mut self.held_out, "eval.jsonl", line)
    }
}

fn append(file: &mut File, name: &str, line: Map<String, Value>) -> Result<()> {
    let mut text = Value::Object(line).to_string();
    text.push('\n');
    file.write_all(text.as_bytes())
        .map_err(|e| Error::other(format!("{name}: cannot be written: {e}")))
}

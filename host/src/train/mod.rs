//! Training: the recipe, read from top to bottom. One loop serves every objective.

pub mod checkpoint;
pub mod identity;
pub mod logs;
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
pub mod signals;

use crate::config::NonFinite;
use crate::config::schema::TrainSection;
use crate::data::Item;
use crate::model::{Lora, LoraGrads, peft};
use crate::{Error, ErrorKind, Result};
use checkpoint::Position;
use identity::Identity;
use logs::Logs;
use metrics::number;
use optimizer::Optimizer;
use pass::{Outcome, Pass};
use plan::{At, Rows};
use progress::Progress;
use report::{Report, Snapshot};
use serde_json::Map;
use setup::{Run, Stage};
use std::path::{Path, PathBuf};
use std::time::Instant;
use uft_core::Needs;

/// Runs all stages, writes the adapter and gives the report for the user. With `resume`, goes on from
/// the newest whole checkpoint.
///
/// # Errors
/// If anything fails or a signal arrives; a run that was training then leaves a checkpoint.
pub fn train(run: &mut Run, resume: bool) -> Result<Report> {
    let output = PathBuf::from(&run.config.train.output);
    let checkpoint = find_checkpoint(&output, resume)?;
    let identity = Identity::of(run)?;
    if let Some(dir) = &checkpoint {
        // Before anything is written or computed.
        checkpoint::expect(dir, &identity)?;
    }
    let mut logs = Logs::open(&output, checkpoint.as_deref())?;
    let stages = run.stages();

    signals::install()?;
    let before = snapshot(run, &stages[0])?;
    let mut restored = match &checkpoint {
        Some(dir) => Some(checkpoint::restore(dir, run)?),
        None => None,
    };
    let mut position = restored.as_ref().map_or(Position::default(), |r| r.position);
    if let Some(dir) = &checkpoint {
        log::info!("resumed from {}", dir.display());
    }

    for (index, stage) in stages.iter().enumerate().skip(position.stage) {
        let (optimizer, reference) = match restored.take() {
            Some(restored) => (restored.optimizer, restored.reference),
            None => {
                position = Position { stage: index, step: 0, ..position };
                // Reference log-probs of another stage's reference are of no use.
                run.forget_reference();
                (Optimizer::new(&stage.train, &run.lora), run.reference(stage.train.reference))
            }
        };
        let running = Running { stage, optimizer, reference, identity: &identity };
        running.train(run, &mut position, &mut logs)?;
        if let Some(name) = &stage.name {
            peft::save(&output.join(format!("stage-{name}")), &run.lora, &run.config.model.path)?;
        }
    }
    peft::save(&output, &run.lora, &run.config.model.path)?;
    let after = snapshot(run, stages.last().expect("a run has a stage")).map_err(|mut why| {
        let adapter = output.display();
        why.message = format!("{}; training is over, its adapter is in {adapter}", why.message);
        why
    })?;
    let Position { steps, tokens, seconds, .. } = position;
    Ok(Report { before, after, steps, tokens, seconds, output })
}

/// The checkpoint to go on from; without `resume`, makes sure that there is none to be overwritten.
fn find_checkpoint(output: &Path, resume: bool) -> Result<Option<PathBuf>> {
    let there = checkpoint::all(output);
    if !resume {
        let Some((_, newest)) = there.last() else { return Ok(None) };
        return Err(Error::config(format!(
            "{} is a checkpoint of an earlier run: go on from it with --resume, or remove it or choose another \
             [train] output to start anew",
            newest.display()
        )));
    }
    let (newest, broken) = checkpoint::newest(output);
    broken.iter().for_each(|why| log::warn!("passed over {why}"));
    match newest {
        None if !there.is_empty() => {
            Err(Error::other(format!("{}: none of its checkpoints is whole", output.display())))
        }
        None => {
            log::info!("no checkpoint in {}: starting from the beginning", output.display());
            Ok(None)
        }
        found => Ok(found),
    }
}

/// A stage in training.
struct Running<'a> {
    stage: &'a Stage,
    optimizer: Optimizer,
    reference: Option<Lora>,
    identity: &'a Identity,
}

impl Running<'_> {
    fn train(mut self, run: &mut Run, position: &mut Position, logs: &mut Logs) -> Result<()> {
        let settings = &self.stage.train;
        let steps = self.stage.steps(run);
        let warmup = schedule::warmup_steps(settings.warmup, steps);
        let mut order = self.stage.order(run);
        // Replaying the draws puts the order where it was.
        (0..position.step).for_each(|_| drop(order.batch(settings.batch)));
        let mut grads = LoraGrads::zeros(&run.lora);
        let mut progress = Progress::new(self.stage.name.as_deref(), position.step, steps);

        while position.step < steps {
            let items = order.batch(settings.batch);
            let lr = schedule::learning_rate(
                settings.schedule,
                settings.lr,
                position.step,
                steps,
                warmup,
            );
            let started = Instant::now();
            grads.clear();
            let (outcome, norm) = match self.step(run, position, steps, &items, &mut grads) {
                Ok(done) => done,
                Err(why)
                    if why.kind == ErrorKind::NonFinite
                        && settings.non_finite == NonFinite::Skip =>
                {
                    progress.note(&format!("step {} left out: {why}", position.steps + 1));
                    (Outcome { loss: f64::NAN, ..Outcome::default() }, f64::NAN)
                }
                Err(why) => return Err(self.leave(run, position, logs, why)),
            };
            if outcome.loss.is_finite() {
                self.optimizer.step(&mut run.lora, &mut grads, norm, lr);
            }
            let seconds = started.elapsed().as_secs_f64();
            position.step += 1;
            position.steps += 1;
            position.tokens += outcome.tokens;
            position.seconds += seconds;
            logs.step(self.line(run, position, &outcome, norm, lr, seconds))?;
            progress.step(&outcome);
            if let Err(why) = self.between_steps(run, position, steps, logs, &progress) {
                return Err(self.leave(run, position, logs, why));
            }
        }
        progress.finish();
        Ok(())
    }

    /// Loss, gradient and its norm of one optimizer step. A step that fails leaves the objectives'
    /// state as it was: it is not part of the run.
    fn step(
        &self,
        run: &mut Run,
        position: &Position,
        steps: u64,
        items: &[Item],
        grads: &mut LoraGrads,
    ) -> Result<(Outcome, f64)> {
        let mut before = Vec::new();
        for &source in &self.stage.sources {
            let objective = &run.sources[source].objective;
            if objective.needs(Needs::STATE) {
                before.push((source, objective.save_state()?));
            }
        }
        let done = self.pass(run, position, steps, items, grads);
        if done.is_err() {
            for (source, state) in before {
                run.sources[source].objective.load_state(&state)?;
            }
        }
        done
    }

    fn pass(
        &self,
        run: &mut Run,
        position: &Position,
        steps: u64,
        items: &[Item],
        grads: &mut LoraGrads,
    ) -> Result<(Outcome, f64)> {
        let settings = &self.stage.train;
        let pass = Pass {
            model: &run.model,
            policy: &run.lora,
            reference: self.reference.as_ref(),
            micro_tokens: settings.micro_tokens,
            mixing: settings.mixing,
            at: At { number: position.step, steps, training: true },
            identical: position.step == 0 && run.identical(settings.reference),
        };
        let outcome = pass.run(&mut run.sources, Rows::Train, items, Some(&mut *grads))?;
        let norm = optimizer::norm(grads);
        if outcome.loss.is_finite() && norm.is_finite() {
            return Ok((outcome, norm));
        }
        let place = |i: &Item| run.sources[i.source].train[i.row].origin.to_string();
        let places: Vec<String> = items.iter().map(place).collect();
        Err(Error::non_finite(format!(
            "step {}: loss {}, gradient norm {norm}; its rows: {}",
            position.steps + 1,
            outcome.loss,
            places.join(", ")
        )))
    }

    /// Evaluation and checkpoint where one is due; the last step is always evaluated.
    fn between_steps(
        &self,
        run: &mut Run,
        position: &Position,
        steps: u64,
        logs: &mut Logs,
        progress: &Progress,
    ) -> Result<()> {
        let due = |every: u64| every > 0 && position.step.is_multiple_of(every);
        if due(run.config.eval.every) || position.step == steps {
            let held_out =
                evaluate(run, self.stage, self.reference.as_ref(), position.step, steps)?;
            if held_out.trained > 0 {
                logs.held_out(position.steps, &held_out)?;
                progress
                    .note(&format!("step {}: held-out loss {:.4}", position.steps, held_out.loss));
            }
        }
        if due(self.stage.train.save_every) {
            self.save(run, position, logs)?;
        }
        signals::check()
    }

    fn save(&self, run: &Run, position: &Position, logs: &Logs) -> Result<PathBuf> {
        checkpoint::save(
            run,
            position,
            &self.optimizer,
            self.reference.as_ref(),
            self.identity,
            logs,
        )
    }

    /// Ends the stage early: a signal or numbers that are not finite leave a checkpoint of the last
    /// whole step.
    fn leave(&self, run: &Run, position: &Position, logs: &Logs, why: Error) -> Error {
        if !matches!(
            why.kind,
            ErrorKind::Interrupted | ErrorKind::Terminated | ErrorKind::NonFinite
        ) {
            return why;
        }
        let go_on = match why.kind {
            ErrorKind::NonFinite => "",
            _ => "; go on from it with --resume",
        };
        match self.save(run, position, logs) {
            Ok(path) => Error::new(
                why.kind,
                format!(
                    "{}; the state after step {} is in {}{go_on}",
                    why.message,
                    position.steps,
                    path.display()
                ),
            ),
            Err(failed) => {
                Error::new(why.kind, format!("{}; and no checkpoint: {failed}", why.message))
            }
        }
    }

    /// A step's line for metrics.jsonl.
    fn line(
        &self,
        run: &Run,
        position: &Position,
        outcome: &Outcome,
        norm: f64,
        lr: f64,
        seconds: f64,
    ) -> Map<String, serde_json::Value> {
        let TrainSection { batch, .. } = self.stage.train;
        let rows: usize = self.stage.sources.iter().map(|&s| run.sources[s].train.len()).sum();
        let mut line = Map::new();
        line.insert("step".into(), position.steps.into());
        if let Some(name) = &self.stage.name {
            line.insert("stage".into(), name.as_str().into());
        }
        line.insert("loss".into(), number(outcome.loss));
        line.insert("grad_norm".into(), number(norm));
        line.insert("lr".into(), number(lr));
        line.insert("epoch".into(), number((position.step * batch as u64) as f64 / rows as f64));
        line.insert("tokens".into(), outcome.tokens.into());
        line.insert("trained_tokens".into(), outcome.trained.into());
        line.insert("num_tokens".into(), position.tokens.into());
        line.insert("tokens_per_second".into(), number(outcome.tokens as f64 / seconds));
        line.extend(outcome.metrics.to_json());
        line
    }
}

/// Loss and metrics of a stage's held-out rows, all of them as one step.
fn evaluate(
    run: &mut Run,
    stage: &Stage,
    reference: Option<&Lora>,
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
    run.forget_reference();
    let metrics = evaluate(run, &everything, None, 0, 0)?.metrics;
    run.forget_reference();
    Ok(Snapshot { metrics, answers: report::answers(run)? })
}

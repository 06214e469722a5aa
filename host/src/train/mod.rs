//! Training: the recipe, read from top to bottom. One loop serves every objective.

pub mod checkpoint;
pub mod identity;
pub mod logs;
pub mod memory;
pub mod metrics;
mod micro;
mod mismatched;
pub mod optimizer;
pub mod pass;
pub mod plan;
mod progress;
pub mod reference;
mod reference_pass;
pub mod report;
pub mod schedule;
pub mod setup;
mod statistics;

use crate::config::NonFinite;
use crate::config::schema::TrainSection;
use crate::data::Item;
use crate::model::{Adapters, Gradients, peft};
use crate::{Error, ErrorKind, Result, signals};
use checkpoint::{Position, Restored};
use identity::Identity;
use logs::Logs;
use metrics::number;
use optimizer::Optimizer;
use pass::{Outcome, Pass};
use plan::{At, Rows};
use progress::Progress;
use reference::{Cache, ReferenceLogps};
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
/// If anything fails or a signal arrives; a run that was training then leaves a checkpoint if it was a
/// signal or a number that is not finite, and in any case those that it had.
pub fn train(run: &mut Run, resume: bool) -> Result<Report> {
    let output = PathBuf::from(&run.config.train.output);
    let checkpoint = find_checkpoint(&output, resume)?;
    let identity = Identity::of(run)?;
    if let Some(dir) = &checkpoint {
        // Before anything is written or computed.
        checkpoint::expect(dir, &identity)?;
    }
    let mut logs = Logs::open(&output, checkpoint.as_deref())?;
    checkpoint::clean(&output);
    let stages = run.stages();

    let cache = Cache::of(run, &identity)?;
    // Of the base model, which is most stages' reference.
    let mut base = cache.open(None)?;
    base.verify(&run.model, None, &run.sources)?;
    let before = snapshot(run, &stages[0], &mut base)?;
    let restored = match &checkpoint {
        Some(dir) => Some(checkpoint::restore(dir, run)?),
        None => None,
    };
    if let Some(dir) = &checkpoint {
        log::info!("resumed from {}", dir.display());
    }
    signals::save_first();
    let position = run_stages(run, &stages, restored, &identity, &cache, &mut base, &mut logs)
        .map_err(|why| where_to_go_on(why, &output))?;
    let last = stages.last().expect("a run has a stage");
    let after = snapshot(run, last, &mut base).map_err(|mut why| {
        let adapter = output.display();
        why.message = format!("{}; training is over, its adapter is in {adapter}", why.message);
        why
    })?;
    let Position { steps, tokens, seconds, .. } = position;
    Ok(Report { before, after, steps, tokens, seconds, output })
}

/// Trains stage after stage from where `restored` stands, and writes the adapters.
fn run_stages(
    run: &mut Run,
    stages: &[Stage],
    mut restored: Option<Restored>,
    identity: &Identity,
    cache: &Cache,
    base: &mut ReferenceLogps,
    logs: &mut Logs,
) -> Result<Position> {
    let output = PathBuf::from(&run.config.train.output);
    let mut position = restored.as_ref().map_or(Position::default(), |r| r.position);
    for (index, stage) in stages.iter().enumerate().skip(position.stage) {
        let (optimizer, reference) = match restored.take() {
            Some(restored) => (restored.optimizer, restored.reference),
            None => {
                position = Position { stage: index, step: 0, ..position };
                let reference = run.reference(stage.train.reference)?;
                (Optimizer::new(&stage.train, &run.adapters)?, reference)
            }
        };
        let mut other = match &reference {
            Some(adapter) => Some(cache.open(Some(adapter))?),
            None => None,
        };
        let known = other.as_mut().unwrap_or(base);
        let running = Running { stage, optimizer, reference, known, identity };
        running.train(run, &mut position, logs)?;
        if let Some(name) = &stage.name {
            save_adapter(run, &output.join(format!("stage-{name}")))?;
        }
    }
    save_adapter(run, &output)?;
    Ok(position)
}

fn save_adapter(run: &Run, dir: &Path) -> Result<()> {
    peft::save(dir, &*run.adapters.read()?, &run.config.model.path)
}

/// Says of a fault in the middle of a run what there is to go on from. What ended by a signal or a
/// number that is not finite says so itself.
fn where_to_go_on(mut why: Error, output: &Path) -> Error {
    if !Running::leaves_a_checkpoint(&why)
        && let Ok((Some(newest), _)) = checkpoint::newest(output)
    {
        let newest = newest.display();
        why.message = format!(
            "{}; the newest whole checkpoint is {newest}, --resume goes on from it",
            why.message
        );
    }
    why
}

/// The checkpoint to go on from; without `resume`, makes sure that there is none to be overwritten.
fn find_checkpoint(output: &Path, resume: bool) -> Result<Option<PathBuf>> {
    let there = checkpoint::all(output)?;
    if !resume {
        let Some((_, newest)) = there.last() else { return Ok(None) };
        return Err(Error::config(format!(
            "{} is a checkpoint of an earlier run: go on from it with --resume, or remove it or choose another \
             [train] output to start anew",
            newest.display()
        )));
    }
    let (newest, broken) = checkpoint::newest(output)?;
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
    reference: Option<Adapters>,
    /// The reference's log-probs.
    known: &'a mut ReferenceLogps,
    identity: &'a Identity,
}

impl Running<'_> {
    fn train(mut self, run: &mut Run, position: &mut Position, logs: &mut Logs) -> Result<()> {
        let settings = &self.stage.train;
        let steps = self.stage.steps(&run.sources);
        let warmup = schedule::warmup_steps(settings.warmup, steps);
        let mut order = self.stage.order(&run.sources);
        // Replaying the draws puts the order where it was.
        (0..position.step).for_each(|_| drop(order.batch(settings.batch)));
        let mut grads = Gradients::zeros(&run.adapters)?;
        let mut progress = Progress::new(self.stage.name.as_deref(), position.step, steps);
        let mut made = None;

        if let Err(why) = self.known.verify(&run.model, self.reference.as_ref(), &run.sources) {
            return Err(self.leave(run, position, logs, why));
        }
        loop {
            // First, because an interrupted run may have done a step and not what was due after it.
            if let Err(why) = self.between_steps(run, position, steps, logs, &progress) {
                return Err(self.leave(run, position, logs, why));
            }
            if position.step >= steps {
                break;
            }
            let items = order.batch(settings.batch);
            let lr = schedule::learning_rate(
                settings.schedule,
                settings.lr,
                position.step,
                steps,
                warmup,
            );
            let started = Instant::now();
            grads.clear()?;
            let step = |running: &mut Self, run: &mut Run| {
                running.step(run, position, steps, &items, &mut grads)
            };
            let outcome = match self.whole(run, step) {
                Ok(done) => done,
                Err(why)
                    if why.kind == ErrorKind::NonFinite
                        && settings.non_finite == NonFinite::Skip =>
                {
                    progress.note(&format!("step {} left out: {why}", position.steps + 1));
                    Outcome { loss: f64::NAN, grad_norm: f64::NAN, ..Outcome::default() }
                }
                Err(why) => return Err(self.leave(run, position, logs, why)),
            };
            if outcome.loss.is_finite() {
                let norm = outcome.grad_norm;
                self.optimizer.step(&mut run.adapters, &grads, norm, lr)?;
            }
            let seconds = started.elapsed().as_secs_f64();
            position.step += 1;
            position.steps += 1;
            position.tokens += outcome.tokens;
            position.seconds += seconds;
            let milliseconds = outcome.objectives.as_secs_f64() * 1e3;
            log::debug!("{milliseconds:.3} of {:.0} ms in the objectives", seconds * 1e3);
            logs.step(self.line(run, position, &outcome, lr, seconds))?;
            progress.step(&outcome);
            let now = run.model.made();
            if *made.get_or_insert(now) != now {
                made = Some(now);
                log::warn!(
                    "step {}: more of the GPU's memory or other kernels than were planned; it goes on, but please \
                     report it with the output of `uft check`",
                    position.steps
                );
            }
        }
        progress.finish();
        Ok(())
    }

    /// Loss and gradient of one optimizer step.
    fn step(
        &mut self,
        run: &mut Run,
        position: &Position,
        steps: u64,
        items: &[Item],
        grads: &mut Gradients,
    ) -> Result<Outcome> {
        let settings = &self.stage.train;
        let pass = Pass {
            model: &run.model,
            policy: &run.adapters,
            reference: self.reference.as_ref(),
            micro_tokens: settings.micro_tokens,
            reference_tokens: run.memory.reference_tokens,
            without: &settings.without,
            mixing: settings.mixing,
            at: At { number: position.step, steps, training: true },
            steps_repeat: !settings.shuffle,
            identical: position.step == 0 && run.identical(settings.reference)?,
        };
        let known = &mut *self.known;
        let outcome = pass.run(&mut run.sources, Rows::Train, items, known, Some(&mut *grads))?;
        if outcome.loss.is_finite() {
            return Ok(outcome);
        }
        let place = |i: &Item| run.sources[i.source].train[i.row].origin.to_string();
        let places: Vec<String> = items.iter().map(place).collect();
        Err(Error::non_finite(format!(
            "step {}: loss {}, gradient norm {}; its rows: {}",
            position.steps + 1,
            outcome.loss,
            outcome.grad_norm,
            places.join(", ")
        )))
    }

    /// Work that is part of the run as a whole or not at all: if it fails, the objectives' state is as
    /// it was before.
    fn whole<T>(
        &mut self,
        run: &mut Run,
        work: impl FnOnce(&mut Self, &mut Run) -> Result<T>,
    ) -> Result<T> {
        let mut before = Vec::new();
        for &source in &self.stage.sources {
            let objective = &run.sources[source].objective;
            if objective.needs(Needs::STATE) {
                before.push((source, objective.save_state()?));
            }
        }
        let done = work(self, run);
        if done.is_err() {
            for (source, state) in before {
                run.sources[source].objective.load_state(&state)?;
            }
        }
        done
    }

    /// Evaluation and checkpoint where one is due; the last step is always evaluated. What was done
    /// already is not done again.
    fn between_steps(
        &mut self,
        run: &mut Run,
        position: &Position,
        steps: u64,
        logs: &mut Logs,
        progress: &Progress,
    ) -> Result<()> {
        let due =
            |every: u64| position.step > 0 && every > 0 && position.step.is_multiple_of(every);
        let last = position.step == steps;
        if (due(run.config.eval.every) || last) && !logs.has_evaluation(position.steps) {
            let held_out = self.whole(run, |running, run| {
                let reference = running.reference.as_ref();
                evaluate(run, running.stage, reference, running.known, position.step, steps)
            })?;
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
        if !Self::leaves_a_checkpoint(&why) {
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
            // Of the two this is what a script has to know: without it, a run that was asked to end
            // would pass for one that can go on from where it was.
            Err(failed) => Error::new(
                failed.kind,
                format!("{failed}; it was to be saved after: {}", why.message),
            ),
        }
    }

    fn leaves_a_checkpoint(why: &Error) -> bool {
        matches!(why.kind, ErrorKind::Interrupted | ErrorKind::Terminated | ErrorKind::NonFinite)
    }

    /// A step's line for metrics.jsonl.
    fn line(
        &self,
        run: &Run,
        position: &Position,
        outcome: &Outcome,
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
        line.insert("grad_norm".into(), number(outcome.grad_norm));
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
    reference: Option<&Adapters>,
    known: &mut ReferenceLogps,
    number: u64,
    steps: u64,
) -> Result<Outcome> {
    let items = run.held_out(&stage.sources);
    let pass = Pass {
        model: &run.model,
        policy: &run.adapters,
        reference,
        micro_tokens: stage.train.micro_tokens,
        reference_tokens: run.memory.reference_tokens,
        without: &stage.train.without,
        mixing: stage.train.mixing,
        at: At { number, steps, training: false },
        steps_repeat: true,
        identical: false,
    };
    pass.run(&mut run.sources, Rows::HeldOut, &items, known, None)
}

/// Held-out metrics and sample answers of the model as it is now, against the base model, of which
/// `base` knows log-probs.
fn snapshot(run: &mut Run, stage: &Stage, base: &mut ReferenceLogps) -> Result<Snapshot> {
    let everything =
        Stage { name: None, train: stage.train.clone(), sources: (0..run.sources.len()).collect() };
    let metrics = evaluate(run, &everything, None, base, 0, 0)?.metrics;
    Ok(Snapshot { metrics, answers: report::answers(run)? })
}

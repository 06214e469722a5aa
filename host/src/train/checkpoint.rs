//! Checkpoints: `checkpoint-N` in transformers' layout, whole or not there.
//!
//! Everything is written into a hidden folder and synced, the manifest with every file's size and
//! hash last, and the folder is renamed into place; one that goes is hidden first, too. What a
//! checkpoint does not hold is made again from the configuration: random numbers are counter-based,
//! and the order of rows is replayed.

use super::identity::Identity;
use super::logs::Logs;
use super::optimizer::{self, Optimizer};
use super::setup::{Run, Stage};
use crate::model::files::{self, write_bytes, write_error};
use crate::model::{Adapters, Lora, peft};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Before the name of a checkpoint that is not whole yet, or no longer.
const HIDDEN: &str = ".checkpoint-";
const MANIFEST: &str = "manifest.json";
const STATE: &str = "uft_state.json";
const ADAPTER: &str = "adapter_model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const REFERENCE: &str = "reference.safetensors";
/// Raised when older checkpoints can no longer be read.
const REVISION: u32 = 2;

/// Where a run stands between two optimizer steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Position {
    pub stage: usize,
    /// Steps done in the stage.
    pub step: u64,
    /// Steps done in all stages.
    pub steps: u64,
    /// Tokens of all steps.
    pub tokens: u64,
    /// Time of all steps.
    pub seconds: f64,
}

/// The part of a checkpoint that is no tensor.
#[derive(Serialize, Deserialize)]
struct State {
    revision: u32,
    position: Position,
    /// AdamW updates in the stage; fewer than steps where some were skipped.
    updates: u64,
    identity: Identity,
    /// Saved state of every source's objective.
    objectives: BTreeMap<String, Vec<u8>>,
}

impl State {
    /// The stage that the run is in. None if the run has no such position: it would be replayed for
    /// ever, or count past what a number holds.
    fn stage(&self, run: &Run) -> Option<Stage> {
        let Position { stage, step, steps, tokens, seconds } = self.position;
        let mut stages = run.stages();
        let before: u64 = stages.get(..stage)?.iter().map(|s| s.steps(&run.sources)).sum();
        let here = stages.get(stage)?.steps(&run.sources);
        let counted = step <= here && steps == before + step && self.updates <= step;
        let sound = tokens <= u64::MAX / 2 && seconds.is_finite();
        (counted && sound).then(|| stages.swap_remove(stage))
    }
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    /// File → bytes and BLAKE3.
    files: BTreeMap<String, (u64, String)>,
}

/// Saves a checkpoint of the run as it stands.
///
/// # Errors
/// If anything cannot be written; an earlier checkpoint of the same step stays as it was.
pub fn save(
    run: &Run,
    position: &Position,
    optimizer: &Optimizer,
    reference: Option<&Adapters>,
    identity: &Identity,
    logs: &Logs,
) -> Result<PathBuf> {
    let output = Path::new(&run.config.train.output);
    let target = output.join(format!("checkpoint-{}", position.steps));
    if verify(&target).is_ok() {
        return Ok(target);
    }
    clean(output);
    let partial = output.join(format!("{HIDDEN}{}.partial", position.steps));
    let written = write(&partial, run, position, optimizer, reference, identity, logs);
    if let Err(why) = written.and_then(|()| place(&partial, &target)) {
        // Whoever has to make room first should not have to look for this. What stays is cleaned later.
        let _ = fs::remove_dir_all(&partial);
        return Err(why);
    }
    prune(output, run.config.train.save_total_limit, logs)?;
    Ok(target)
}

/// Writes a checkpoint's files, the manifest last.
fn write(
    partial: &Path,
    run: &Run,
    position: &Position,
    optimizer: &Optimizer,
    reference: Option<&Adapters>,
    identity: &Identity,
    logs: &Logs,
) -> Result<()> {
    let lora = run.adapters.read()?;
    peft::save(partial, &lora, &run.config.model.path)?;
    let moments = optimizer.moments()?;
    files::write_tensors(&partial.join(OPTIMIZER), optimizer::tensors(&lora, &moments))?;
    drop((lora, moments));
    if let Some(reference) = reference {
        files::write_tensors(&partial.join(REFERENCE), reference.read()?.tensors())?;
    }
    for (name, bytes) in logs.contents()? {
        write_bytes(&partial.join(name), &bytes)?;
    }
    let trainer = trainer_state(run, position, logs)?;
    write_bytes(&partial.join("trainer_state.json"), pretty(&trainer).as_bytes())?;
    let mut objectives = BTreeMap::new();
    for source in &run.sources {
        objectives.insert(source.name.clone(), source.objective.save_state()?);
    }
    let state = State {
        revision: REVISION,
        position: *position,
        updates: optimizer.updates(),
        identity: identity.clone(),
        objectives,
    };
    write_bytes(&partial.join(STATE), pretty(&json!(state)).as_bytes())?;

    let mut manifest = Manifest { files: BTreeMap::new() };
    let unread = |e: io::Error| Error::other(format!("{}: cannot be read: {e}", partial.display()));
    for entry in fs::read_dir(partial).map_err(unread)? {
        let entry = entry.map_err(unread)?;
        let bytes = fs::read(entry.path()).map_err(unread)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        manifest
            .files
            .insert(name, (bytes.len() as u64, blake3::hash(&bytes).to_hex().to_string()));
    }
    write_bytes(&partial.join(MANIFEST), pretty(&json!(manifest)).as_bytes())
}

/// Puts a written checkpoint in its place.
fn place(partial: &Path, target: &Path) -> Result<()> {
    let output = target.parent().unwrap_or(target);
    if target.exists() {
        // It is not whole, and goes only now that a whole one is there.
        remove(target).map_err(|e| write_error(target, &e))?;
    }
    fs::rename(partial, target).map_err(|e| write_error(target, &e))?;
    files::sync_dir(output)
}

/// Removes what an end in the middle of saving or removing a checkpoint left.
pub fn clean(output: &Path) {
    let entries = fs::read_dir(output).into_iter().flatten().flatten();
    let ours = |name: &str| {
        let number = name.strip_prefix(HIDDEN)?.split_once('.')?.0;
        (!number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())).then_some(())
    };
    let hidden = entries.filter(|entry| ours(&entry.file_name().to_string_lossy()).is_some());
    for path in hidden.map(|entry| entry.path()) {
        if let Err(e) = fs::remove_dir_all(&path) {
            log::warn!("{}: cannot be removed: {e}", path.display());
        }
    }
}

/// The newest whole checkpoint in `output`, and what is wrong with newer ones.
///
/// # Errors
/// As [`all`].
pub fn newest(output: &Path) -> Result<(Option<PathBuf>, Vec<String>)> {
    let mut broken = Vec::new();
    for (_, path) in all(output)?.into_iter().rev() {
        match verify(&path) {
            Ok(()) => return Ok((Some(path), broken)),
            Err(why) => broken.push(format!("{}: {why}", path.display())),
        }
    }
    Ok((None, broken))
}

/// What a checkpoint gives back besides what it puts into the run.
pub struct Restored {
    pub position: Position,
    pub optimizer: Optimizer,
    pub reference: Option<Adapters>,
}

/// Reads a checkpoint's state.
///
/// # Errors
/// If it cannot be read, or is another version's.
fn state(dir: &Path) -> Result<State> {
    let damaged = |what: &str| Error::other(format!("{}: {what}", dir.display()));
    let bytes =
        fs::read(dir.join(STATE)).map_err(|e| damaged(&format!("{STATE} cannot be read: {e}")))?;
    let state: State =
        serde_json::from_slice(&bytes).map_err(|e| damaged(&format!("{STATE}: {e}")))?;
    if state.revision != REVISION {
        return Err(damaged(&format!("written by another version (revision {})", state.revision)));
    }
    Ok(state)
}

/// Makes sure that a checkpoint belongs to the run with this identity.
///
/// # Errors
/// If it does not, with what differs; or if it cannot be read.
pub fn expect(dir: &Path, identity: &Identity) -> Result<()> {
    identity.expect(&state(dir)?.identity).map_err(|e| e.at(dir.display()))
}

/// Puts a whole checkpoint's adapter and plugin state into the run.
///
/// # Errors
/// If the checkpoint lacks something of the run (see [`expect`]), or stands where the run never does.
pub fn restore(dir: &Path, run: &mut Run) -> Result<Restored> {
    let state = state(dir)?;
    let stage = state.stage(run).ok_or_else(|| {
        Error::other(format!("{}: {STATE}: the run has no such position", dir.display()))
    })?;
    let reference_file = dir.join(REFERENCE);
    let reference = match reference_file.exists() {
        true => {
            let lora = with_tensors(run.adapters.read()?.into_owned(), &read(&reference_file)?)?;
            Some(run.model.place(lora)?)
        }
        false => None,
    };
    let lora = with_tensors(run.adapters.read()?.into_owned(), &read(&dir.join(ADAPTER))?)?;
    let mut optimizer = Optimizer::new(&stage.train, &run.adapters)?;
    optimizer.restore(&lora, &read(&dir.join(OPTIMIZER))?, state.updates)?;
    run.adapters.write(lora)?;
    for source in &mut run.sources {
        if let Some(saved) = state.objectives.get(&source.name) {
            source.objective.load_state(saved)?;
        }
    }
    Ok(Restored { position: state.position, optimizer, reference })
}

/// Whether every file of the manifest is there as it was written.
///
/// # Errors
/// What is wrong with it.
pub fn verify(dir: &Path) -> std::result::Result<(), String> {
    let bytes =
        fs::read(dir.join(MANIFEST)).map_err(|_| format!("no {MANIFEST}: it was not finished"))?;
    let manifest: Manifest =
        serde_json::from_slice(&bytes).map_err(|e| format!("{MANIFEST} is damaged: {e}"))?;
    for (name, (size, hash)) in &manifest.files {
        if !files::is_plain_name(name) {
            return Err(format!("{MANIFEST} is damaged: {name:?} is not a file name"));
        }
        let path = dir.join(name);
        let unreadable = |e: std::io::Error| format!("{name} cannot be read: {e}");
        // Before anything is read: a wrong file may be far larger.
        let length = fs::metadata(&path).map_err(unreadable)?.len();
        if length != *size {
            return Err(format!("{name} has {length} bytes instead of {size}"));
        }
        let bytes = fs::read(&path).map_err(unreadable)?;
        if blake3::hash(&bytes).to_hex().as_str() != hash {
            return Err(format!("{name} is damaged: its hash differs"));
        }
    }
    Ok(())
}

/// The checkpoints of a run by step, oldest first; none if there is no `output`.
///
/// # Errors
/// If `output` cannot be read: what it holds must not be taken for nothing.
pub fn all(output: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let step =
        |path: &Path| path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse::<u64>().ok();
    let read = || -> io::Result<Vec<PathBuf>> {
        fs::read_dir(output)?.map(|entry| Ok(entry?.path())).collect()
    };
    let paths = match read() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        read => {
            read.map_err(|e| Error::other(format!("{}: cannot be read: {e}", output.display())))?
        }
    };
    let mut found: Vec<_> = paths.into_iter().filter_map(|p| Some((step(&p)?, p))).collect();
    found.sort();
    Ok(found)
}

/// Removes the oldest checkpoints over the limit; the newest and the best stay. One that cannot be
/// removed is no reason to end a run: it is named, and tried again the next time.
fn prune(output: &Path, limit: usize, logs: &Logs) -> Result<()> {
    let mut kept = all(output)?;
    let best = best(output, logs, None)?.map(|(step, _)| step);
    let both = best.is_some() && best != kept.last().map(|(step, _)| *step);
    while limit > 0 && kept.len() > limit.max(1 + usize::from(both)) {
        let newest = kept.len() - 1;
        let Some(victim) = kept[..newest].iter().position(|(step, _)| Some(*step) != best) else {
            break;
        };
        let (_, path) = kept.remove(victim);
        if let Err(e) = remove(&path) {
            log::warn!("{}: cannot be removed: {e}", path.display());
        }
    }
    Ok(())
}

/// The saved step with the lowest held-out loss; `saving` is a step about to be saved.
fn best(output: &Path, logs: &Logs, saving: Option<u64>) -> Result<Option<(u64, f64)>> {
    let saved: Vec<u64> = all(output)?.into_iter().map(|(step, _)| step).chain(saving).collect();
    let history = logs.history()?;
    let evaluated = history
        .iter()
        .filter_map(|line| Some((line["step"].as_u64()?, line.get("eval_loss")?.as_f64()?)));
    Ok(evaluated.filter(|(step, _)| saved.contains(step)).min_by(|a, b| a.1.total_cmp(&b.1)))
}

/// transformers' trainer_state.json, which plotters and other tools read.
fn trainer_state(run: &Run, position: &Position, logs: &Logs) -> Result<Value> {
    let output = Path::new(&run.config.train.output);
    let best = best(output, logs, Some(position.steps))?;
    let stages = run.stages();
    let max_steps: u64 = stages.iter().map(|s| s.steps(&run.sources)).sum();
    let train = &stages[position.stage.min(stages.len() - 1)].train;
    let history = logs.history()?;
    let epoch =
        history.iter().rev().find_map(|line| line.get("epoch").cloned()).unwrap_or(Value::Null);
    Ok(json!({
        "best_global_step": best.map(|(step, _)| step),
        "best_metric": best.map(|(_, loss)| loss),
        "best_model_checkpoint": best.map(|(step, _)| output.join(format!("checkpoint-{step}"))),
        "epoch": epoch,
        "eval_steps": run.config.eval.every,
        "global_step": position.steps,
        "is_hyper_param_search": false,
        "is_local_process_zero": true,
        "is_world_process_zero": true,
        "log_history": history,
        "logging_steps": 1,
        "max_steps": max_steps,
        "num_input_tokens_seen": position.tokens,
        "num_train_epochs": train.epochs,
        "save_steps": train.save_every,
        "stateful_callbacks": {},
        "total_flos": 0,
        "train_batch_size": train.batch,
        "trial_name": null,
        "trial_params": null,
    }))
}

fn with_tensors(mut lora: Lora, saved: &HashMap<String, Vec<f32>>) -> Result<Lora> {
    for adapter in &mut lora.adapters {
        let [a, b] = adapter.tensor_names();
        for (values, name) in [(&mut adapter.a, a), (&mut adapter.b, b)] {
            let from = tensor(saved, &name)?;
            if from.len() != values.len() {
                return Err(wrong(&name));
            }
            values.copy_from_slice(from);
        }
    }
    Ok(lora)
}

/// The `f32` tensors of a file that this program wrote.
fn read(path: &Path) -> Result<HashMap<String, Vec<f32>>> {
    let fail = |e: &dyn std::fmt::Display| Error::other(format!("{}: {e}", path.display()));
    let bytes = fs::read(path).map_err(|e| fail(&e))?;
    let file = safetensors::SafeTensors::deserialize(&bytes).map_err(|e| fail(&e))?;
    let floats = |data: &[u8]| {
        data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    };
    Ok(file.tensors().into_iter().map(|(name, view)| (name, floats(view.data()))).collect())
}

/// A tensor of a saved file by name.
pub(super) fn tensor<'t>(saved: &'t HashMap<String, Vec<f32>>, name: &str) -> Result<&'t [f32]> {
    saved.get(name).map(Vec::as_slice).ok_or_else(|| wrong(name))
}

/// A tensor that is not there or has another size.
pub(super) fn wrong(name: &str) -> Error {
    Error::other(format!("the checkpoint does not fit the run: {name}"))
}

fn pretty(value: &Value) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("JSON values are JSON");
    text.push('\n');
    text
}

/// Takes a checkpoint away in one step: whenever the program ends, it is there whole or not at all.
fn remove(dir: &Path) -> io::Result<()> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let hidden = dir.with_file_name(format!(".{name}.removed"));
    fs::rename(dir, &hidden)?;
    fs::remove_dir_all(&hidden)
}

//! `uft verify-resume`: proves on the user's own run that a resumed run is the uninterrupted one.

use super::{RunArgs, print};
use crate::train::checkpoint;
use crate::train::setup::Run;
use crate::{Error, Result};
use clap::Args;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

#[derive(Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Steps to run, interrupted halfway; a stage's own steps and epochs are replaced too
    #[arg(long, default_value_t = 4)]
    steps: u64,
}

/// Files of a checkpoint that must be equal to the byte.
const EXACT: [&str; 2] = ["adapter_model.safetensors", "optimizer.safetensors"];

pub fn run(args: &VerifyArgs) -> Result<()> {
    if args.steps < 2 {
        return Err(Error::config("--steps must be at least 2"));
    }
    // Loading it here shows its mistakes before two runs do.
    let stages = Run::prepare(args.run.load()?)?.config.stage.len();
    let dir = std::env::temp_dir().join(format!("uft-verify-resume-{}", std::process::id()));
    let result = compare(args, stages, &dir);
    let _ = std::fs::remove_dir_all(&dir);
    let report = result?;
    print(&report)
}

fn compare(args: &VerifyArgs, stages: usize, dir: &Path) -> Result<String> {
    let (whole, resumed) = (dir.join("whole"), dir.join("resumed"));
    train(args, stages, &whole, false)?;
    // The checkpoint in the middle becomes all that the second run has.
    let saved = checkpoint::all(&whole)?;
    let (middle, from) = &saved[(saved.len() - 1) / 2];
    let to = resumed.join(from.file_name().unwrap_or_default());
    copy(from, &to).map_err(|e| Error::other(format!("{}: {e}", to.display())))?;
    train(args, stages, &resumed, true)?;

    let (last, theirs) = saved.last().expect("a run with save_every leaves checkpoints");
    let ours = resumed.join(theirs.file_name().unwrap_or_default());
    let mut differences = Vec::new();
    for name in EXACT {
        if read(&theirs.join(name))? != read(&ours.join(name))? {
            differences.push(name.to_owned());
        }
    }
    for name in ["metrics.jsonl", "eval.jsonl"] {
        if lines(&whole.join(name))? != lines(&resumed.join(name))? {
            differences.push(name.to_owned());
        }
    }
    match differences.as_slice() {
        [] => Ok(format!(
            "resumed after step {middle} of {last}: adapter, optimizer and every logged number \
             are identical, bit for bit\n"
        )),
        _ => Err(Error::other(format!(
            "resumed after step {middle} of {last}: these differ: {}",
            differences.join(", ")
        ))),
    }
}

/// Runs this program in a process of its own, as an interrupted run is resumed.
fn train(args: &VerifyArgs, stages: usize, output: &Path, resume: bool) -> Result<()> {
    let program = std::env::current_exe()
        .map_err(|e| Error::other(format!("this program's own path: {e}")))?;
    let mut command = Command::new(program);
    command.arg("train").arg(&args.run.config);
    let mut set = args.run.set.clone();
    set.push(format!("train.output={}", output.display()));
    set.push("train.save_every=1".into());
    set.push("train.save_total_limit=0".into());
    set.push(format!("train.steps={}", args.steps));
    set.extend((0..stages).map(|stage| format!("stage[{stage}].steps={}", args.steps)));
    for assignment in &set {
        command.args(["--set", assignment]);
    }
    if resume {
        command.arg("--resume");
    }
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Error::other(format!("cannot start: {e}")))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(Error::other(format!("the run failed: {}", stderr.trim())))
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        std::fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::other(format!("{}: {e}", path.display())))
}

/// A log's lines without what the clock decides.
fn lines(path: &Path) -> Result<Vec<Value>> {
    let bytes = read(path)?;
    let without_clock = |line: &[u8]| {
        let mut line: Value = serde_json::from_slice(line).ok()?;
        line.as_object_mut()?.remove("tokens_per_second");
        Some(line)
    };
    Ok(bytes.split(|b| *b == b'\n').filter_map(without_clock).collect())
}

//! `uft grad`: the gradient of the first optimizer step, for comparison with other software.

use super::{RunArgs, print};
use crate::Result;
use crate::model::{Gradients, files};
use crate::train::pass::Pass;
use crate::train::plan::{At, Rows};
use crate::train::reference::ReferenceLogps;
use crate::train::setup::Run;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;

#[derive(Args)]
pub struct GradArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Safetensors file for the gradient, under PEFT's tensor names
    #[arg(long)]
    out: PathBuf,
}

pub fn run(args: &GradArgs) -> Result<()> {
    let mut run = Run::prepare(args.run.load()?)?;
    let stage = run.stages().swap_remove(0);
    let reference = run.reference(stage.train.reference)?;
    let items = stage.order(&run.sources).batch(stage.train.batch);
    let mut grads = Gradients::zeros(&run.adapters)?;
    let pass = Pass {
        model: &run.model,
        policy: &run.adapters,
        reference: reference.as_ref(),
        micro_tokens: stage.train.micro_tokens,
        reference_tokens: run.memory.reference_tokens,
        without: &stage.train.without,
        mixing: stage.train.mixing,
        at: At { number: 0, steps: stage.steps(&run.sources), training: true },
        steps_repeat: false,
        identical: run.identical(stage.train.reference)?,
    };
    let outcome = pass.run(
        &mut run.sources,
        Rows::Train,
        &items,
        &mut ReferenceLogps::nowhere(),
        Some(&mut grads),
    )?;
    let lora = run.adapters.read()?;
    files::write_tensors(&args.out, lora.grad_tensors(&*grads.read()?))?;
    let (loss, norm, tokens) = (outcome.loss, outcome.grad_norm, outcome.tokens);
    let result = json!({ "loss": loss, "grad_norm": norm, "tokens": tokens });
    print(&format!("{result}\n"))
}

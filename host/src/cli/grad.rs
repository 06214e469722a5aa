//! `uft grad`: the gradient of the first optimizer step, for comparison with other software.

use super::{RunArgs, print};
use crate::Result;
use crate::model::{LoraGrads, files};
use crate::train::optimizer;
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
    let reference = run.reference(stage.train.reference);
    let items = stage.order(&run.sources).batch(stage.train.batch);
    let mut grads = LoraGrads::zeros(&run.lora);
    let pass = Pass {
        model: &run.model,
        policy: &run.lora,
        reference: reference.as_ref(),
        micro_tokens: stage.train.micro_tokens,
        without: &stage.train.without,
        mixing: stage.train.mixing,
        at: At { number: 0, steps: stage.steps(&run.sources), training: true },
        steps_repeat: false,
        identical: run.identical(stage.train.reference),
    };
    let outcome = pass.run(
        &mut run.sources,
        Rows::Train,
        &items,
        &mut ReferenceLogps::nowhere(),
        Some(&mut grads),
    )?;
    files::write_tensors(&args.out, run.lora.grad_tensors(&grads))?;
    let norm = optimizer::norm(&grads);
    let result = json!({ "loss": outcome.loss, "grad_norm": norm, "tokens": outcome.tokens });
    print(&format!("{result}\n"))
}

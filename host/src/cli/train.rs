//! `uft train`.

use super::{RunArgs, print};
use crate::train::{self, setup::Run};
use crate::{Result, signals};
use clap::Args;

#[derive(Args)]
pub struct TrainArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Go on from the newest whole checkpoint in the output directory
    #[arg(long)]
    resume: bool,
}

pub fn run(args: &TrainArgs) -> Result<()> {
    signals::install()?;
    let mut run = Run::prepare(args.run.load()?)?;
    for source in &run.sources {
        let (rows, held_out) = (source.train.len(), source.held_out.len());
        log::info!(
            "{}: {rows} groups, {held_out} held out, objective {}",
            source.name,
            source.objective.name
        );
        for account in [&source.account, &source.held_out_account] {
            account.describe().lines().for_each(|line| log::warn!("{}:{line}", source.name));
        }
    }
    for source in run.untrained() {
        log::warn!("{}: no [[stage]] trains it, it is only evaluated", source.name);
    }
    log::info!("adapter: {} parameters to train", run.adapters.shape().parameters());
    log::info!("{}", run.memory.table());
    let report = train::train(&mut run, args.resume)?;
    let (took, planned) = (run.model.activations(), run.memory.activations);
    if took > planned {
        log::warn!("activations took {took} bytes, {planned} were planned; this is a bug of uft");
    }
    print(&format!("{}\n", report.render()))
}

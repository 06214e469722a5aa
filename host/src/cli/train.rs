//! `uft train`.

use super::{RunArgs, print};
use crate::Result;
use crate::train::{self, setup::Run};

pub fn run(args: &RunArgs) -> Result<()> {
    let mut run = Run::prepare(args.load()?)?;
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
    log::info!("adapter: {} parameters to train", run.lora.parameters());
    let report = train::train(&mut run)?;
    print(&format!("{}\n", report.render()))
}

//! `uft merge`.

use super::print;
use crate::Result;
use crate::model::merge;
use clap::Args;
use std::path::PathBuf;

#[derive(Args)]
pub struct MergeArgs {
    /// Directory of the base model
    #[arg(long)]
    model: PathBuf,
    /// PEFT adapter directory
    #[arg(long)]
    adapter: PathBuf,
    /// New directory for the merged model
    #[arg(long)]
    out: PathBuf,
}

pub fn run(args: &MergeArgs) -> Result<()> {
    merge::save(&args.model, &args.adapter, &args.out)?;
    print(&format!("merged model: {}\n", args.out.display()))
}

//! `uft config`.

use super::print;
use crate::Result;
use crate::config::docs;
use clap::Args;

#[derive(Args)]
pub struct ConfigArgs {
    /// Print the reference page docs/config.md instead of an annotated TOML file
    #[arg(long)]
    markdown: bool,
}

pub fn run(args: &ConfigArgs) -> Result<()> {
    print(&if args.markdown { docs::page() } else { docs::annotated() })
}

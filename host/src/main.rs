//! The `uft` binary.

use clap::Parser;
use std::io::Write;
use uft::cli::Cli;

fn main() {
    let mut logger =
        env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"));
    logger.format(|out, record| match record.level() {
        log::Level::Info => writeln!(out, "{}", record.args()),
        level => writeln!(out, "{}: {}", level.as_str().to_lowercase(), record.args()),
    });
    logger.init();
    if let Err(error) = Cli::parse().run() {
        eprintln!("error: {error}");
        std::process::exit(error.kind.exit_code());
    }
}

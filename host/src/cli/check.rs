//! `uft check`: everything but training.

use super::{RunArgs, mask, print};
use crate::model::Gradients;
use crate::train::pass::Pass;
use crate::train::plan::{At, Rows};
use crate::train::reference::ReferenceLogps;
use crate::train::setup::{Run, Stage};
use crate::{Error, Result};
use clap::Args;
use std::fmt::Write;
use uft_core::params::nearest;

#[derive(Args)]
pub struct CheckArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Show the token mask of the row in this line of its file
    #[arg(long, value_name = "LINE")]
    row: Option<usize>,
    /// The source of that row; the first one by default
    #[arg(long, requires = "row")]
    source: Option<String>,
    /// Print the plan of memory for a GPU with so many GiB, and nothing else; neither it nor the weights need be there
    #[arg(long, value_name = "GIB", conflicts_with_all = ["row", "source"])]
    gpu: Option<f64>,
}

pub fn run(args: &CheckArgs) -> Result<()> {
    if let Some(memory) = args.gpu {
        if !(memory > 0.0 && memory.is_finite()) {
            return Err(Error::config("--gpu must be a positive number of GiB"));
        }
        let bytes = (memory * f64::from(1 << 30)) as u64;
        return print(&format!("{}\n", Run::plan_for_gpu(args.run.load()?, bytes)?.table()));
    }
    let mut run = Run::prepare(args.run.load()?)?;
    if let Some(line) = args.row {
        return show_mask(&run, args.source.as_deref(), line);
    }
    let mut out = String::from("configuration and plugins: in order\n");
    for source in &run.sources {
        let _ = writeln!(out, "{}", rows(source));
        out.push_str(&source.account.describe());
        out.push_str(&source.held_out_account.describe());
    }
    let _ = writeln!(
        out,
        "adapter: {} matrices, {} parameters",
        2 * run.adapters.shape().adapters.len(),
        run.adapters.shape().parameters()
    );
    for stage in run.stages() {
        let label = stage.name.as_ref().map_or(String::new(), |name| format!("stage `{name}`: "));
        let _ = writeln!(
            out,
            "{label}{} steps of {} groups",
            stage.steps(&run.sources),
            stage.train.batch
        );
    }
    for source in run.untrained() {
        let _ =
            writeln!(out, "source `{}`: no [[stage]] trains it, it is only evaluated", source.name);
    }
    let _ = writeln!(out, "{}", run.memory.table());
    print(&out)?;
    for stage in run.stages() {
        let label = stage.name.as_ref().map_or(String::new(), |name| format!("stage `{name}`, "));
        print(&format!("{label}{}", first_step(&mut run, &stage)?))?;
    }
    Ok(())
}

fn rows(source: &crate::data::Source) -> String {
    let tokens = |e: &crate::data::Example| e.group.rows();
    let (total, longest) =
        source.train.iter().fold((0, 0), |(t, l), e| (t + tokens(e), l.max(e.group.longest())));
    let trained: usize =
        source.train.iter().flat_map(|e| e.group.segments()).map(|s| s.tokens()).sum();
    format!(
        "source `{}`: {} of {} rows used, {} groups, {total} tokens, {trained} of them trained, longest sequence \
         {longest}; {} of {} held-out rows used; objective `{}` (needs: {})",
        source.name,
        source.account.used,
        source.account.rows,
        source.train.len(),
        source.held_out_account.used,
        source.held_out_account.rows,
        source.objective.name,
        match source.objective.needs.names().as_slice() {
            [] => "nothing".to_owned(),
            names => names.join(", "),
        }
    )
}

/// A stage's first batch forward and backward with the adapter as it is now, and whether its rewards are
/// what they must be.
fn first_step(run: &mut Run, stage: &Stage) -> Result<String> {
    let identical = run.identical(stage.train.reference)?;
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
        at: At { number: 0, steps: stage.steps(&run.sources), training: false },
        steps_repeat: false,
        identical,
    };
    let outcome = pass.run(
        &mut run.sources,
        Rows::Train,
        &items,
        &mut ReferenceLogps::nowhere(),
        Some(&mut grads),
    )?;
    let mut out = format!("first step: loss {:.6}, {} tokens", outcome.loss, outcome.tokens);
    for source in outcome.metrics.sources() {
        let loss = outcome.metrics.of(source, "loss").unwrap_or(f64::NAN);
        let _ = write!(out, ", {source} {loss:.6}");
    }
    let needed = stage.sources.iter().any(|&s| run.sources[s].needs_reference());
    out.push_str(match (needed, identical) {
        (false, _) => "\nno objective reads a reference\n",
        (true, true) => "\nstep-0 identity: every implicit reward is exactly 0\n",
        (true, false) => "\nstep-0 identity: does not apply, the adapter is not new\n",
    });
    Ok(out)
}

fn show_mask(run: &Run, source: Option<&str>, line: usize) -> Result<()> {
    let source = match source {
        None => &run.sources[0],
        Some(name) => run.sources.iter().find(|s| s.name == name).ok_or_else(|| {
            let known: Vec<&str> = run.sources.iter().map(|s| s.name.as_str()).collect();
            Error::config(format!(
                "--source: no [[data]] is named `{name}`{}",
                nearest(name, &known)
            ))
        })?,
    };
    let shown: Vec<_> =
        source.train.iter().chain(&source.held_out).filter(|e| e.origin.line == line).collect();
    if shown.is_empty() {
        return Err(Error::data(format!(
            "source `{}` has no usable row in line {line} of its files",
            source.name
        )));
    }
    for example in shown {
        print(&format!("{}\n{}", example.origin, mask::render(&run.text, &example.group)))?;
    }
    Ok(())
}

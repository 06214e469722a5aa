//! `uft score`: log-probs and implicit rewards of the responses in a data file.

use super::print;
use crate::config::{Device as DeviceChoice, EndOfTurn, LongRows, PluginRef};
use crate::data::rows;
use crate::data::source::in_vocabulary;
use crate::group::Group;
use crate::model::inference::{Loaded, Setting};
use crate::model::memory::Size;
use crate::model::{Device, Forward, Inference, ModelConfig, Packed, peft};
use crate::plugins::{Adapter, Registry};
use crate::text::{Limits, Text};
use crate::train::setup::use_threads;
use crate::{Error, Result};
use clap::Args;
use serde_json::{Value, json};
use std::path::PathBuf;

#[derive(Args)]
pub struct ScoreArgs {
    /// Directory of the base model, which is the reference
    #[arg(long)]
    model: PathBuf,
    /// PEFT adapter directory: the policy; without one, policy and reference are the same
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// JSONL file
    #[arg(long)]
    data: String,
    /// Feedback adapter that reads it: a name, or a table such as '{ plugin = "scores", range = [0, 4] }'
    #[arg(long)]
    format: String,
    /// Scale of the reward: beta * (logp - ref_logp)
    #[arg(long, default_value_t = 0.1)]
    beta: f64,
    /// Print token ids and the log-prob of every token too
    #[arg(long)]
    tokens: bool,
    /// Longest sequence in tokens; a longer row is an error
    #[arg(long, default_value_t = 1 << 20)]
    max_length: usize,
    /// Most tokens in one forward pass
    #[arg(long, default_value_t = 4096)]
    micro_tokens: usize,
    /// Folders to search for plugins
    #[arg(long = "plugin-dir", value_name = "DIR")]
    plugin_dirs: Vec<PathBuf>,
    /// Where to compute
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceChoice,
    /// Threads; 0 takes every core
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

pub fn run(args: &ScoreArgs) -> Result<()> {
    if !args.beta.is_finite() {
        return Err(Error::config("--beta must be a finite number"));
    }
    use_threads(args.threads)?;
    let device = Device::open(args.device).map_err(|e| e.at("--device"))?;
    let plugin = plugin_ref(&args.format)?;
    let adapter = Registry::new(args.plugin_dirs.iter().cloned()).adapter(&plugin)?;
    let config = ModelConfig::load(&args.model)?;
    let text = Text::load(&args.model)?;
    let scored = read(args, &adapter, &text, config.vocab)?;
    let lora = match &args.adapter {
        Some(dir) => Some(peft::load(dir, &config)?),
        None => None,
    };
    let inference = Inference { dir: &args.model, config: &config, lora, device: &device };
    let loaded = load(inference, &scored, args.micro_tokens)?;
    for batch in batches(&scored, args.micro_tokens, |scored| scored.group.rows()) {
        score(args, &loaded, batch)?;
    }
    loaded.expect_as_planned();
    Ok(())
}

/// Neighbours, together at most `micro_tokens` rows, or one that has more.
fn batches<T>(
    items: &[T],
    micro_tokens: usize,
    rows: impl Fn(&T) -> usize,
) -> impl Iterator<Item = &[T]> {
    let mut rest = items;
    std::iter::from_fn(move || {
        let mut all = rows(rest.first()?);
        let more = rest[1..].iter().take_while(|item| {
            all += rows(item);
            all <= micro_tokens
        });
        let (batch, after) = rest.split_at(1 + more.count());
        rest = after;
        Some(batch)
    })
}

/// Model and adapter, with memory for the batches.
fn load(inference: Inference, scored: &[Scored], micro_tokens: usize) -> Result<Loaded> {
    let heads = &inference.config.heads;
    let laid_out = |scored: &Scored| Alone {
        size: Size::of(&Packed::new(&[&scored.group]), heads),
        positions: scored.group.longest(),
    };
    let alone: Vec<Alone> = match inference.device {
        Device::Cpu => Vec::new(),
        Device::Gpu(_) => scored.iter().map(laid_out).collect(),
    };
    let longest = alone.iter().map(|alone| alone.positions).max().unwrap_or(0);
    let smaller = Setting {
        value: micro_tokens,
        passes: &|micro_tokens| passes(&alone, micro_tokens),
        advice: &|micro_tokens| format!("--micro-tokens {micro_tokens}"),
    };
    let shorter = Setting {
        value: longest,
        passes: &|longest| {
            let short = alone.iter().filter(|alone| alone.positions <= longest).copied();
            passes(&short.collect::<Vec<_>>(), 1)
        },
        advice: &|longest| format!("without rows of more than {longest} tokens, --micro-tokens 1"),
    };
    inference.load(&passes(&alone, micro_tokens), &[smaller, shorter])
}

/// What a group takes.
#[derive(Clone, Copy)]
struct Alone {
    size: Size,
    /// Tokens of its longest text.
    positions: usize,
}

/// The passes of all groups.
fn passes(alone: &[Alone], micro_tokens: usize) -> Vec<Forward> {
    let batches = batches(alone, micro_tokens, |alone| alone.size.rows);
    let pass = |batch: &[Alone]| Forward::LogProbs {
        size: batch.iter().fold(Size::default(), |all, alone| all + alone.size),
        positions: batch.iter().map(|alone| alone.positions).max().unwrap_or(0),
    };
    batches.map(pass).collect()
}

/// A group of the file, and the place of its first response.
struct Scored {
    row: usize,
    first_response: usize,
    group: Group,
}

/// `--format` as the configuration would have it.
fn plugin_ref(format: &str) -> Result<PluginRef> {
    if !format.trim_start().starts_with('{') {
        return Ok(PluginRef { plugin: format.to_owned(), params: toml::Table::new() });
    }
    #[derive(serde::Deserialize)]
    struct Line {
        format: PluginRef,
    }
    let line: std::result::Result<Line, _> = toml::from_str(&format!("format = {format}"));
    line.map(|l| l.format).map_err(|e| Error::config(format!("--format: {}", e.message())))
}

fn read(args: &ScoreArgs, adapter: &Adapter, text: &Text, vocab: usize) -> Result<Vec<Scored>> {
    let limits = Limits {
        max_length: args.max_length,
        long_rows: LongRows::Error,
        end_of_turn: EndOfTurn::Ignore,
    };
    let mut out = Vec::new();
    for (row, record) in rows::read(std::slice::from_ref(&args.data))?.iter().enumerate() {
        let mut first_response = 0;
        for sample in adapter.adapt(record.text()).map_err(|e| e.at(&record.origin))? {
            let groups = text.encode_sample(&sample, &limits);
            for group in groups.map_err(|why| Error::data(why.detail).at(&record.origin))? {
                in_vocabulary(&group, vocab).map_err(|e| e.at(&record.origin))?;
                let responses = group.segments().count();
                out.push(Scored { row, first_response, group });
                first_response += responses;
            }
        }
    }
    Ok(out)
}

/// Prints one line for every response of a batch.
fn score(args: &ScoreArgs, loaded: &Loaded, batch: &[Scored]) -> Result<()> {
    let (model, lora) = (&loaded.model, loaded.lora.as_ref());
    let packed = Packed::new(&batch.iter().map(|s| &s.group).collect::<Vec<_>>());
    let ref_logps = model.logps(&packed, None)?;
    let logps = match lora {
        Some(_) => model.logps(&packed, lora)?,
        None => ref_logps.clone(),
    };
    let mut start = 0;
    let mut out = String::new();
    for Scored { row, first_response, group } in batch {
        for (index, segment) in group.segments().enumerate() {
            let range = start..start + segment.tokens();
            start = range.end;
            let sum = |values: &[f32]| values.iter().map(|&v| f64::from(v)).sum::<f64>();
            let (logp, ref_logp) = (sum(&logps[range.clone()]), sum(&ref_logps[range.clone()]));
            if !(logp.is_finite() && ref_logp.is_finite()) {
                return Err(Error::non_finite(format!(
                    "row {row}, response {}: its log-prob is not finite; are model and adapter whole?",
                    first_response + index
                )));
            }
            let mut line = json!({
                "row": row,
                "response": first_response + index,
                "tokens": range.len(),
                "logp": logp,
                "ref_logp": ref_logp,
                "reward": args.beta * (logp - ref_logp),
            });
            if args.tokens {
                line["ids"] = packed.targets.tokens[range.clone()].into();
                line["token_logps"] = floats(&logps[range.clone()]);
                line["ref_token_logps"] = floats(&ref_logps[range]);
            }
            out.push_str(&line.to_string());
            out.push('\n');
        }
    }
    print(&out)
}

/// f32 values as JSON, with the digits that they have.
fn floats(values: &[f32]) -> Value {
    values
        .iter()
        .map(|v| serde_json::from_str::<Value>(&v.to_string()).unwrap_or(Value::Null))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{refused, total};
    use super::*;
    use crate::group::{Branch, Segment};
    use uft_core::Feedback;

    fn scored(row: usize, tokens: usize) -> Scored {
        let trained = std::iter::once(0..tokens).collect();
        let segments = vec![Segment { feedback: Feedback::Demonstration, trained }];
        let branches = vec![Branch { tokens: vec![3; tokens], segments }];
        Scored { row, first_response: 0, group: Group { prompt: vec![5; 10], branches } }
    }

    #[test]
    fn batches_are_as_large_as_they_may_be() {
        let batches = |micro_tokens| -> Vec<Vec<usize>> {
            let items = [4, 4, 9, 1, 1, 1];
            super::batches(&items, micro_tokens, |rows| *rows).map(<[_]>::to_vec).collect()
        };
        assert_eq!(batches(8), [vec![4, 4], vec![9], vec![1, 1, 1]]);
        assert_eq!(batches(1), [[4], [4], [9], [1], [1], [1]]);
        assert_eq!(batches(100), [[4, 4, 9, 1, 1, 1]]);
    }

    #[test]
    fn smaller_batches_or_shorter_rows_are_what_would_fit() {
        let rows: Vec<Scored> =
            [30, 30, 30, 90].into_iter().enumerate().map(|(row, n)| scored(row, n)).collect();
        let heads = super::super::tests::config().heads;
        let pass = |rows: &[Scored]| {
            let groups: Vec<&Group> = rows.iter().map(|scored| &scored.group).collect();
            let longest = groups.iter().map(|group| group.longest()).max().unwrap();
            let size = Size::of(&Packed::new(&groups), &heads);
            total(&[Forward::LogProbs { size, positions: longest }])
        };
        // Two rows together, as long as one alone.
        let message = refused(pass(&rows[3..]), |inference| load(inference, &rows, 4096));
        let (_, advice) = message.split_once(" available: --micro-tokens ").expect(&message);
        let micro_tokens: usize = advice.strip_suffix(" would fit").unwrap().parse().unwrap();
        assert!((80..120).contains(&micro_tokens), "{message}");
        let message = refused(pass(&rows[..1]), |inference| load(inference, &rows, 4096));
        let says = " available: without rows of more than 99 tokens, --micro-tokens 1 would fit";
        assert!(message.ends_with(says), "{message}");
    }
}

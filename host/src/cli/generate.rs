//! `uft generate`.

use super::print;
use crate::config::Device as DeviceChoice;
use crate::model::inference::{Loaded, Setting};
use crate::model::{Device, Forward, Inference, ModelConfig, SampleOptions, peft};
use crate::text::Text;
use crate::train::setup::use_threads;
use crate::{Error, Result};
use clap::Args;
use std::path::PathBuf;
use uft_core::Message;

#[derive(Args)]
pub struct GenerateArgs {
    /// Directory of the base model
    #[arg(long)]
    model: PathBuf,
    /// PEFT adapter directory
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// What the user says; `-` reads it from stdin
    #[arg(long)]
    prompt: String,
    /// A system message before it
    #[arg(long)]
    system: Option<String>,
    /// Continue the prompt as plain text, without the chat template
    #[arg(long, conflicts_with = "system")]
    raw: bool,
    /// Most tokens to generate
    #[arg(long, default_value_t = 256)]
    max_tokens: u32,
    /// 0 takes the likeliest token every time
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Sample from the smallest set of tokens with this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Sample from so many likeliest tokens at most
    #[arg(long)]
    top_k: Option<usize>,
    /// Seed of the sampling
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where to compute
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceChoice,
    /// Threads; 0 takes every core
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

pub fn run(args: &GenerateArgs) -> Result<()> {
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return Err(Error::config("--temperature must not be negative"));
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        return Err(Error::config("--top-p must be above 0 and at most 1"));
    }
    use_threads(args.threads)?;
    let device = Device::open(args.device).map_err(|e| e.at("--device"))?;
    let prompt = match args.prompt.as_str() {
        "-" => std::io::read_to_string(std::io::stdin())
            .map_err(|e| Error::data(format!("stdin: {e}")))?,
        text => text.to_owned(),
    };
    let config = ModelConfig::load(&args.model)?;
    let text = Text::load(&args.model)?;
    let ids = if args.raw {
        text.encode_prompt(&prompt)?
    } else {
        let system = args.system.iter().map(|content| Message::new("system", content.as_str()));
        let messages: Vec<Message> = system.chain([Message::new("user", prompt)]).collect();
        text.encode(&text.render(&messages, "", true)?, false)?
    };
    if ids.is_empty() {
        return Err(Error::data("the prompt has no tokens, and the tokenizer adds none"));
    }
    let lora = match &args.adapter {
        Some(dir) => Some(peft::load(dir, &config)?),
        None => None,
    };
    let max_tokens = args.max_tokens as usize;
    let inference = Inference { dir: &args.model, config: &config, lora, device: &device };
    let loaded = load(inference, ids.len(), max_tokens)?;
    let options = SampleOptions {
        max_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        seed: args.seed,
        eos: text.eos_ids().to_vec(),
    };
    let answer = loaded.model.generate(&ids, &options, loaded.lora.as_ref())?;
    loaded.expect_as_planned();
    print(&format!("{}\n", text.decode(&answer, true)?.trim_end()))
}

/// Model and adapter, with memory for a prompt and an answer of so many tokens.
fn load(inference: Inference, prompt: usize, tokens: usize) -> Result<Loaded> {
    let continuation = |prompt, tokens| vec![Forward::Continuation { prompt, tokens }];
    let fewer = Setting {
        value: tokens,
        passes: &|tokens| continuation(prompt, tokens),
        advice: &|tokens| format!("--max-tokens {tokens}"),
    };
    let shorter = Setting {
        value: prompt,
        passes: &|prompt| continuation(prompt, 1),
        advice: &|prompt| format!("a prompt of {prompt} tokens with --max-tokens 1"),
    };
    inference.load(&continuation(prompt, tokens), &[fewer, shorter])
}

#[cfg(test)]
mod tests {
    use super::super::tests::{refused, total};
    use super::*;

    #[test]
    fn fewer_tokens_or_a_shorter_prompt_are_what_would_fit() {
        let fits = |prompt, tokens| total(&[Forward::Continuation { prompt, tokens }]);
        let message = refused(fits(40, 200), |inference| load(inference, 40, 300));
        assert!(message.ends_with(" available: --max-tokens 200 would fit"), "{message}");
        let message = refused(fits(20, 1), |inference| load(inference, 40, 300));
        let says = " available: a prompt of 20 tokens with --max-tokens 1 would fit";
        assert!(message.ends_with(says), "{message}");
    }
}

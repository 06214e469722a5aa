//! Generation: one token after the other, with the keys and values of all earlier ones kept.

use super::cuda;
use super::decoder::Decoder;
use super::engine::Model;
use super::layer::Context;
use super::linear::Product;
use super::lora::Lora;
use super::packed::{Packed, Targets};
use super::trained::Adapters;
use crate::{Error, Result, signals};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use uft_kernels::{embedding, logprob, rmsnorm};

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleOptions {
    /// Stop after so many tokens.
    pub max_tokens: usize,
    /// 0 takes the most probable token each time; 1 samples from the model's distribution.
    pub temperature: f32,
    /// Sample from the smallest set of tokens with this much probability; 1 is all.
    pub top_p: f32,
    /// Sample from so many most probable tokens at most.
    pub top_k: Option<usize>,
    /// Token t depends on the seed and t alone.
    pub seed: u64,
    /// Tokens that end the text; the one that does is part of the result.
    pub eos: Vec<u32>,
}

/// A text in the making.
pub struct Generator<'m> {
    model: &'m Model,
    text: Text<'m>,
}

/// Where it is made.
enum Text<'m> {
    Cpu(Continuation<'m>),
    Cuda(Box<cuda::Continuation<'m>>),
}

impl<'m> Generator<'m> {
    /// Reads a prompt, in one pass. It must not be empty, and at most `more` tokens may follow.
    pub fn new(
        model: &'m Model,
        lora: Option<&'m Adapters>,
        prompt: &[u32],
        more: usize,
    ) -> Result<Self> {
        if prompt.is_empty() {
            return Err(Error::data("generation needs a prompt of a token or more"));
        }
        model.check_tokens(prompt)?;
        let text = match model {
            Model::Cpu(model) => {
                Text::Cpu(Continuation::new(model, lora.map(Adapters::cpu), prompt)?)
            }
            Model::Cuda(model) => {
                let lora = lora.map(Adapters::cuda);
                Text::Cuda(Box::new(cuda::Continuation::new(model, lora, prompt, more)?))
            }
        };
        Ok(Self { model, text })
    }

    /// `[V]`: the logits of the next token.
    pub fn logits(&self) -> &[f32] {
        match &self.text {
            Text::Cpu(text) => &text.logits,
            Text::Cuda(text) => text.logits(),
        }
    }

    /// Appends a token.
    pub fn push(&mut self, token: u32) -> Result<()> {
        self.model.check_tokens(&[token])?;
        match &mut self.text {
            Text::Cpu(text) => {
                text.push(token);
                Ok(())
            }
            Text::Cuda(text) => text.push(token),
        }
    }
}

/// A text in the making, on the processor.
struct Continuation<'m> {
    model: &'m Decoder,
    lora: Option<&'m Lora>,
    /// `[L]`: keys and values of all positions so far, `[n, K]` each.
    caches: Vec<[Vec<f32>; 2]>,
    /// `[V]`: what may come next.
    logits: Vec<f32>,
}

impl<'m> Continuation<'m> {
    /// Reads a prompt, in one pass; it is not empty, and its tokens are the model's.
    fn new(model: &'m Decoder, lora: Option<&'m Lora>, prompt: &[u32]) -> Result<Self> {
        let last = prompt.len() - 1;
        // The last row alone goes through the top of the model; its target doesn't matter.
        let targets = Targets { rows: vec![last as u32], tokens: vec![0] };
        let packed = Packed { targets, ..Packed::prompt(prompt) };
        let mut caches = Vec::with_capacity(model.config.layers);
        let top = model.run(&packed, lora, |_, tape| {
            caches.push(tape.keys_and_values().map(<[f32]>::to_vec));
        })?;
        let mut text = Self { model, lora, caches, logits: vec![0.0; model.config.vocab] };
        text.read_logits(&top.hidden);
        Ok(text)
    }

    /// Appends a token, which is one of the model's.
    fn push(&mut self, token: u32) {
        let model = self.model;
        let mut x = model.pool.take(model.config.hidden);
        embedding::gather(&model.embedding, &[token], &mut x);
        let with = Context { product: Product::Token, ..model.context() };
        for (layer, [k, v]) in model.layers.iter().zip(&mut self.caches) {
            x = layer.decode(x, k, v, self.lora, with);
        }
        let mut hidden = model.pool.take(x.len());
        rmsnorm::forward(&x, &model.norm, model.config.norm_eps, &mut hidden, &mut [0.0]);
        self.read_logits(&hidden);
    }

    fn read_logits(&mut self, hidden: &[f32]) {
        logprob::forward_logits(hidden, &self.model.head(self.lora), &mut self.logits);
    }
}

impl Model {
    /// Continues a prompt until a token of `options.eos` or `options.max_tokens`.
    ///
    /// # Errors
    /// If a token is not the model's, a logit not finite, or a signal arrives (see [`signals`]).
    pub fn generate(
        &self,
        prompt: &[u32],
        options: &SampleOptions,
        lora: Option<&Adapters>,
    ) -> Result<Vec<u32>> {
        // The last token is not read.
        let more = options.max_tokens.saturating_sub(1);
        let mut generator = Generator::new(self, lora, prompt, more)?;
        let mut tokens = Vec::new();
        while tokens.len() < options.max_tokens {
            signals::check()?;
            let token = options.choose(generator.logits(), tokens.len() as u64)?;
            tokens.push(token);
            if options.eos.contains(&token) {
                break;
            }
            if tokens.len() < options.max_tokens {
                generator.push(token)?;
            }
        }
        Ok(tokens)
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocab = self.config().vocab;
        match tokens.iter().find(|token| **token as usize >= vocab) {
            Some(token) => Err(Error::data(format!("token {token} in a vocabulary of {vocab}"))),
            None => Ok(()),
        }
    }
}

impl SampleOptions {
    /// The most probable token each time, 256 at most, no end token.
    pub fn greedy() -> Self {
        Self {
            max_tokens: 256,
            temperature: 0.0,
            top_p: 1.0,
            top_k: None,
            seed: 0,
            eos: Vec::new(),
        }
    }

    /// Chooses token number `step` of a text from its logits, `[V]`.
    pub fn choose(&self, logits: &[f32], step: u64) -> Result<u32> {
        if let Some(logit) = logits.iter().find(|logit| !logit.is_finite()) {
            return Err(Error::non_finite(format!("generation: a logit is {logit}")));
        }
        // Most probable first, and of equals the lower id, so that the order is one.
        let by_rank =
            |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        if self.temperature <= 0.0 {
            return Ok(ids.into_iter().min_by(by_rank).unwrap_or(0));
        }
        if let Some(top_k) = self.top_k.filter(|k| *k > 0 && *k < ids.len()) {
            ids.select_nth_unstable_by(top_k - 1, by_rank);
            ids.truncate(top_k);
        }
        ids.sort_unstable_by(by_rank);
        let top = f64::from(logits[ids[0] as usize]);
        let weight = |id: &u32| {
            ((f64::from(logits[*id as usize]) - top) / f64::from(self.temperature)).exp()
        };
        let mut weights: Vec<f64> = ids.iter().map(weight).collect();
        let total: f64 = weights.iter().sum();
        let mut before = 0.0;
        let kept = weights.iter().position(|weight| {
            let enough = before >= f64::from(self.top_p) * total;
            before += weight;
            enough
        });
        // At least the most probable one, whatever top_p is.
        weights.truncate(kept.unwrap_or(ids.len()).max(1));
        let mut left = self.uniform(step) * weights.iter().sum::<f64>();
        let chosen = weights.iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        Ok(ids[chosen.unwrap_or(weights.len() - 1)])
    }

    /// In [0, 1).
    fn uniform(&self, step: u64) -> f64 {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream(step);
        (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}

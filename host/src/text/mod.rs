//! From samples to token groups: chat templates, tokenisation, what is trained.
//!
//! A [`Text`] holds what a model directory says about text. It is read-only after loading, so rows
//! can be encoded on many threads.

mod builtins;
mod chat;
mod clock;
mod encode;
mod fuel;
mod limits;
mod mask;
mod pieces;
mod program;
mod python;
mod specials;
pub mod template;
mod templates;
mod tokenizer;
mod turns;
pub mod values;

pub use limits::{Limits, Reason, Refused};
pub use mask::{Mask, MaskedToken};
pub use specials::Specials;

use crate::Result;
use minijinja::Value;
use std::path::Path;
use templates::Templates;
use tokenizer::Tokenizer;
use uft_core::Message;

/// Tokenizer, special tokens and chat template of a model.
pub struct Text {
    tokenizer: Tokenizer,
    specials: Specials,
    templates: Templates,
    eos_ids: Vec<u32>,
}

impl Text {
    /// Reads tokenizer and chat template of a model directory: `tokenizer.json`, and if they exist
    /// `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`,
    /// `additional_chat_templates/tool_use.jinja`, and the end-of-sequence ids of `config.json` and
    /// `generation_config.json`.
    ///
    /// # Errors
    /// A missing tokenizer.json; a file that cannot be read; a template with broken syntax.
    pub fn load(dir: &Path) -> Result<Self> {
        Self::load_with(dir, None)
    }

    /// [`Text::load`] with a chat template (its text) instead of the model's own.
    ///
    /// # Errors
    /// As [`Text::load`].
    pub fn load_with(dir: &Path, template: Option<&str>) -> Result<Self> {
        let config = specials::read_object(&dir.join("tokenizer_config.json"))?;
        let specials = Specials::load(dir, &config)?;
        let templates = match template {
            Some(source) => Templates::of(source, "the given chat template")?,
            None => Templates::load(dir, &config)?,
        };
        Ok(Self::new(Tokenizer::load(dir, &specials)?, specials, templates))
    }

    fn new(tokenizer: Tokenizer, specials: Specials, templates: Templates) -> Self {
        let eos = specials.get("eos_token").and_then(|text| tokenizer.id(text));
        let mut eos_ids: Vec<u32> = eos.into_iter().collect();
        for id in &specials.eos_ids {
            if !eos_ids.contains(id) && (*id as usize) < tokenizer.vocab_size() {
                eos_ids.push(*id);
            }
        }
        Self { tokenizer, specials, templates, eos_ids }
    }

    /// Token ids of a text. `add_special`: with what the tokenizer puts around texts (BOS, for some
    /// EOS), but no second BOS if the text already begins with one.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let ids = self.tokenizer.ids(text)?;
        if !add_special {
            return Ok(ids);
        }
        let suffix = self.tokenizer.suffix();
        let mut around = self.with_prefix(&ids);
        if !around.ends_with(suffix) {
            around.extend_from_slice(suffix);
        }
        Ok(around)
    }

    /// Token ids of a text that the model is to continue: as [`Text::encode`] with special tokens,
    /// but without an EOS behind it.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.with_prefix(&self.tokenizer.ids(text)?))
    }

    /// Text of a sequence of ids, as transformers' `decode` gives it.
    ///
    /// # Errors
    /// Whatever the tokenizer's decoder refuses.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.tokenizer.decode(ids, skip_special)
    }

    /// The text of one token, for displays; bytes that are no whole character become U+FFFD.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.tokenizer.token_bytes(id)).into_owned()
    }

    /// The ids that end a response: the tokenizer's EOS first, then those of generation_config.json
    /// and config.json.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// One more than the highest token id; the model's vocabulary must not be smaller.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.vocab_size()
    }

    /// The special tokens that the model directory names.
    pub fn specials(&self) -> &Specials {
        &self.specials
    }

    /// Whether there is a chat template.
    pub fn has_template(&self) -> bool {
        self.templates.exists()
    }

    /// Whether the chat template can write today's date (UTC, taken when it was loaded), so that
    /// the same rows may give other tokens tomorrow.
    pub fn uses_clock(&self) -> bool {
        self.templates.uses_clock()
    }

    /// Messages as text. `template_args` is [`uft_core::Sample::template_args`].
    ///
    /// # Errors
    /// No template; whatever the template refuses, with file and line.
    pub fn render(
        &self,
        messages: &[Message],
        template_args: &str,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let messages = messages.iter().map(values::message).collect::<Result<Vec<_>>>()?;
        let variables = self.variables(template_args)?;
        let template = self.templates.choose(&variables)?;
        Ok(template.render(&messages, &variables, add_generation_prompt)?.text)
    }

    /// What the template sees beside the messages: special tokens, tools, further arguments.
    fn variables(&self, template_args: &str) -> Result<Vec<(String, Value)>> {
        let specials = self.specials.iter().map(|(name, text)| (name.to_owned(), text.into()));
        Ok(specials.chain(values::arguments(template_args)?).collect())
    }

    /// Puts the tokenizer's BOS in front, unless it is there.
    fn with_prefix(&self, ids: &[u32]) -> Vec<u32> {
        [self.tokenizer.prefix(), self.without_prefix(ids)].concat()
    }

    fn without_prefix<'a>(&self, ids: &'a [u32]) -> &'a [u32] {
        ids.strip_prefix(self.tokenizer.prefix()).unwrap_or(ids)
    }

    pub(self) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

#[cfg(test)]
mod tests;

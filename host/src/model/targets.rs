//! Which linear layers get an adapter, and with which rank and alpha: PEFT's rules.

use super::config::ModelConfig;
use crate::{Error, Result};
use regex::{Regex, RegexBuilder};

/// The linear layers of a decoder block, in the order in which adapters are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Projection {
    /// Every projection with its path inside a block.
    pub const ALL: [(Projection, &'static str); 7] = [
        (Projection::Q, "self_attn.q_proj"),
        (Projection::K, "self_attn.k_proj"),
        (Projection::V, "self_attn.v_proj"),
        (Projection::O, "self_attn.o_proj"),
        (Projection::Gate, "mlp.gate_proj"),
        (Projection::Up, "mlp.up_proj"),
        (Projection::Down, "mlp.down_proj"),
    ];
}

/// A place for an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    Layer(usize, Projection),
    Head,
}

/// A linear layer of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSite {
    /// Hugging Face's module path, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    pub site: Site,
    pub inputs: usize,
    pub outputs: usize,
}

/// The module path of the head.
pub const HEAD: &str = "lm_head";

impl ModelConfig {
    /// All linear layers: block by block, then the head.
    pub fn linears(&self) -> Vec<LinearSite> {
        let (h, i) = (self.hidden, self.intermediate);
        let (q, k) = (self.query_width(), self.key_width());
        let layer = |layer: usize| {
            Projection::ALL.map(|(projection, path)| {
                let (inputs, outputs) = match projection {
                    Projection::Q => (h, q),
                    Projection::K | Projection::V => (h, k),
                    Projection::O => (q, h),
                    Projection::Gate | Projection::Up => (h, i),
                    Projection::Down => (i, h),
                };
                let name = format!("model.layers.{layer}.{path}");
                LinearSite { name, site: Site::Layer(layer, projection), inputs, outputs }
            })
        };
        let head =
            LinearSite { name: HEAD.into(), site: Site::Head, inputs: h, outputs: self.vocab };
        (0..self.layers).flat_map(layer).chain([head]).collect()
    }

    /// The modules that PEFT's patterns could match by mistake.
    fn other_modules(&self) -> Vec<String> {
        let top = ["model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb"];
        let mut names: Vec<String> = top.map(String::from).to_vec();
        for layer in 0..self.layers {
            let block = format!("model.layers.{layer}");
            let parts = ["self_attn", "mlp", "mlp.act_fn", "input_layernorm"];
            names.extend(parts.map(|part| format!("{block}.{part}")));
            names.push(format!("{block}.post_attention_layernorm"));
            if self.qk_norm {
                names.push(format!("{block}.self_attn.q_norm"));
                names.push(format!("{block}.self_attn.k_norm"));
            }
            names.push(block);
        }
        names
    }
}

/// `target_modules`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Whole module paths, or what they end with after a dot.
    List(Vec<String>),
    /// A regular expression for whole module paths.
    Regex(String),
    /// All linear layers but the head.
    AllLinear,
}

impl Targets {
    /// A single string, as in a configuration: `all-linear` or a regular expression.
    pub fn from_text(text: &str) -> Self {
        match text.eq_ignore_ascii_case("all-linear") {
            true => Targets::AllLinear,
            false => Targets::Regex(text.to_string()),
        }
    }

    /// The linear layers that are meant, in the model's order. With `strict` every entry of a list
    /// must match something; PEFT is content if any does.
    pub fn select(&self, model: &ModelConfig, strict: bool) -> Result<Vec<LinearSite>> {
        let matcher = self.matcher()?;
        if let Some(name) = model.other_modules().iter().find(|name| matcher.matches(name)) {
            let why = match name.ends_with("embed_tokens") {
                true => "the embedding, which takes no adapter here",
                false => "which is not a linear layer",
            };
            return Err(Error::config(format!("targets match {name}, {why}")));
        }
        let all = model.linears();
        if let (Targets::List(entries), true) = (self, strict)
            && let Some(entry) = entries
                .iter()
                .find(|entry| !all.iter().any(|linear| is_suffix(entry, &linear.name)))
        {
            return Err(no_match(entry, &all));
        }
        let chosen: Vec<LinearSite> =
            all.iter().filter(|linear| matcher.matches(&linear.name)).cloned().collect();
        match (chosen.is_empty(), self) {
            (false, _) => Ok(chosen),
            (true, Targets::Regex(text)) => Err(no_match(text, &all)),
            (true, Targets::List(entries)) => Err(no_match(&entries.join(", "), &all)),
            (true, Targets::AllLinear) => Err(Error::config("the model has no layers")),
        }
    }

    fn matcher(&self) -> Result<Matcher<'_>> {
        Ok(match self {
            Targets::List(entries) => Matcher::Suffixes(entries),
            Targets::Regex(text) => Matcher::Whole(whole(text)?),
            Targets::AllLinear => Matcher::AllLinear,
        })
    }
}

/// [`Targets`] with the regular expression compiled.
enum Matcher<'a> {
    Suffixes(&'a [String]),
    Whole(Regex),
    AllLinear,
}

impl Matcher<'_> {
    fn matches(&self, name: &str) -> bool {
        match self {
            Matcher::Suffixes(entries) => entries.iter().any(|entry| is_suffix(entry, name)),
            Matcher::Whole(regex) => regex.is_match(name),
            Matcher::AllLinear => Projection::ALL.iter().any(|(_, path)| is_suffix(path, name)),
        }
    }
}

/// Values for single modules, from names or regular expressions to what holds there instead of the
/// default. The first that matches counts: PEFT's `rank_pattern` and `alpha_pattern`.
#[derive(Clone, Debug, PartialEq)]
pub struct Patterns<T>(pub Vec<(String, T)>);

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Copy> Patterns<T> {
    /// For each module its value, if any pattern matches its path or what it ends with after a dot.
    pub fn of(&self, modules: &[LinearSite]) -> Result<Vec<Option<T>>> {
        let mut values = vec![None; modules.len()];
        for (pattern, value) in &self.0 {
            let regex = suffix_regex(pattern)?;
            for (module, found) in modules.iter().zip(&mut values) {
                if found.is_none() && regex.is_match(&module.name) {
                    *found = Some(*value);
                }
            }
        }
        Ok(values)
    }

    /// Makes sure that every pattern means one of the adapted modules.
    pub fn expect_used(&self, names: &[&str]) -> Result<()> {
        for (pattern, _) in &self.0 {
            let regex = suffix_regex(pattern)?;
            if !names.iter().any(|name| regex.is_match(name)) {
                return Err(Error::config(format!("{pattern:?} matches no adapted module")));
            }
        }
        Ok(())
    }
}

fn is_suffix(entry: &str, name: &str) -> bool {
    name.strip_suffix(entry).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// A pattern for a module's path or what it ends with after a dot.
fn suffix_regex(pattern: &str) -> Result<Regex> {
    whole(&format!(r"(?:.*\.)?(?:{pattern})"))
}

/// Most bytes of a compiled pattern. Those for module names need some thousand.
const REGEX_SIZE: usize = 1 << 18;

/// Python's `re.fullmatch`.
fn whole(pattern: &str) -> Result<Regex> {
    let whole = format!(r"\A(?:{pattern})\z");
    RegexBuilder::new(&whole).size_limit(REGEX_SIZE).build().map_err(|e| {
        Error::config(format!("{pattern:?} is not a regular expression that is supported: {e}"))
    })
}

fn no_match(entry: &str, all: &[LinearSite]) -> Error {
    let mut names: Vec<&str> = Vec::new();
    for linear in all {
        let last = linear.name.rsplit('.').next().unwrap_or(&linear.name);
        if !names.contains(&last) {
            names.push(last);
        }
    }
    Error::config(format!(
        "targets: {entry:?} matches no linear layer; there are {} (in model.layers.0 and so on)",
        names.join(", ")
    ))
}

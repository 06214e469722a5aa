//! The values that config keys take, besides numbers and texts.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name { $($(#[$variant_doc])* $variant),* }
    };
}

words! {
    /// Shape of the learning rate after the warm-up.
    Schedule { Cosine, Linear, Constant }
}
words! {
    /// Where the arithmetic runs.
    Device {
        /// The GPU where there is one, otherwise the CPU
        Auto,
        /// The processor, in f32
        Cpu,
        /// The first GPU, in bf16
        Cuda,
        /// A GPU's kernels on the processor, thousands of times slower: to test them
        Emulated,
    }
}
words! {
    /// The reference model of implicit rewards.
    Reference {
        /// The base model: the adapter off.
        Base,
        /// The adapter as it is when the stage starts.
        Previous,
    }
}
words! {
    /// How the losses of sources are added.
    Mixing {
        /// Each source's mean over its own items.
        Sources,
        /// The mean over all items of the step.
        Items,
    }
}
words! {
    /// What to do with a response whose end of turn is not trained.
    EndOfTurn { Require, Ignore }
}
words! {
    /// What to do with rows over the longest length.
    LongRows { Skip, CutPrompt, Error }
}
words! {
    /// What to do with rows that cannot be used.
    BadRows { Error, Skip }
}

words! {
    /// What to do with a step whose loss or gradient is not finite.
    NonFinite { Stop, Skip }
}

words! {
    /// Which layers are computed again on the way back instead of being kept.
    Recompute {
        Auto,
        None,
        All,
        /// All, and what they are computed from is in the host's memory meanwhile.
        Offload,
    }
}

words! {
    /// A gain that can be switched off, to measure it.
    Gain {
        /// Several groups in one micro-batch.
        Packing,
        /// A prompt computed once for all of its responses.
        SharedPrompts,
        /// Log-probs without all logits in memory.
        FusedLogProbs,
        /// Gradients that no adapter needs left out.
        SkippedGradients,
        /// Reference log-probs kept for later epochs, stages and runs.
        ReferenceCache,
    }
}

/// Which linear layers get an adapter.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(
    untagged,
    expecting = "expected \"all-linear\", a regular expression or a list of module names"
)]
pub enum Targets {
    /// "all-linear" or a regular expression.
    Pattern(String),
    /// Names of modules, matched as suffixes.
    List(Vec<String>),
}

/// A plugin with its parameters: `"name"` or `{ plugin = "name", … }`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PluginRef {
    pub plugin: String,
    pub params: toml::Table,
}

impl PluginRef {
    /// The parameters as the JSON object that plugins take.
    pub fn params_json(&self) -> String {
        serde_json::to_string(&self.params).expect("a TOML table is JSON")
    }
}

impl<'de> Deserialize<'de> for PluginRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match toml::Value::deserialize(deserializer)? {
            toml::Value::String(plugin) => Ok(Self { plugin, params: toml::Table::new() }),
            toml::Value::Table(mut params) => match params.remove("plugin") {
                Some(toml::Value::String(plugin)) => Ok(Self { plugin, params }),
                _ => Err(D::Error::custom("a plugin table needs `plugin = \"name\"`")),
            },
            _ => Err(D::Error::custom("expected a plugin's name or { plugin = \"name\", … }")),
        }
    }
}

impl Serialize for PluginRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.params.is_empty() {
            return self.plugin.serialize(serializer);
        }
        let mut table = toml::Table::new();
        table.insert("plugin".into(), self.plugin.clone().into());
        table.extend(self.params.clone());
        table.serialize(serializer)
    }
}

//! A line of a data file: through a feedback adapter as it is loaded, then to tokens. The first byte
//! chooses adapter, model and limits. The adapters are all that are bundled, with their defaults and as their
//! fixtures set them.

use super::{NUMBERS, Target, committed};
use crate::{beside, golden};
use std::sync::LazyLock;
use uft::ErrorKind;
use uft::config::{EndOfTurn, LongRows, PluginRef};
use uft::data::source::in_vocabulary;
use uft::plugins::{Adapter, Registry};
use uft::text::{Limits, Text};
use uft_core::abi::Role;

pub const TARGET: Target = Target { name: "records", run, seeds, tokens: &TOKENS };

const TOKENS: [&str; 26] = [
    "\"prompt\":",
    "\"completion\":",
    "\"completions\":",
    "\"messages\":",
    "\"role\":",
    "\"content\":",
    "\"assistant\"",
    "\"user\"",
    "\"system\"",
    "\"tool\"",
    "\"tool_calls\":",
    "\"tools\":",
    "\"chat_template_kwargs\":",
    "\"score\":",
    "\"scores\":",
    "\"label\":",
    "\"chosen\":",
    "\"rejected\":",
    "\"helpfulness\":",
    "\"conversations\":",
    "\"instruction\":",
    "<extra_id_1>",
    "\\ud800",
    NUMBERS[5],
    NUMBERS[7],
    NUMBERS[8],
];

/// Between them: BOS and none, templates that end turns and that change earlier ones.
const MODELS: [&str; 3] = ["llama", "mistral", "qwen3"];

struct Loaded {
    adapters: Vec<(PluginRef, Adapter)>,
    texts: [Text; MODELS.len()],
}

static LOADED: LazyLock<Loaded> = LazyLock::new(|| {
    let mut registry = Registry::default();
    for library in bundled::LIBRARIES {
        registry.load(library.name).expect("a bundled plugin");
    }
    let bare = |name: &str| PluginRef { plugin: name.into(), ..PluginRef::default() };
    let entries = registry.entries().filter(|(_, entry)| entry.role == Role::Adapter);
    let mut plugins: Vec<PluginRef> = entries.map(|(_, entry)| bare(&entry.name)).collect();
    for fixture in beside::fixtures() {
        let plugin = of(&fixture.adapter);
        if !plugins.contains(&plugin) {
            plugins.push(plugin);
        }
    }
    assert!(plugins.len() * MODELS.len() * LIMITS.len() <= 256, "a byte chooses");
    let load = |plugin: PluginRef| {
        let adapter = registry.adapter(&plugin).expect("a bundled adapter");
        (plugin, adapter)
    };
    Loaded {
        adapters: plugins.into_iter().map(load).collect(),
        texts: MODELS.map(|name| Text::load(&golden("models").join(name)).expect("a golden model")),
    }
});

/// An adapter as a configuration names it.
fn of(adapter: &toml::Value) -> PluginRef {
    adapter.clone().try_into().expect("a plugin")
}

const LIMITS: [Limits; 2] = [
    Limits { max_length: 64, long_rows: LongRows::CutPrompt, end_of_turn: EndOfTurn::Ignore },
    Limits { max_length: 2048, long_rows: LongRows::Skip, end_of_turn: EndOfTurn::Require },
];

fn run(input: &[u8]) {
    let Some((choice, line)) = input.split_first() else { return };
    let Ok(line) = std::str::from_utf8(line) else { return };
    let Loaded { adapters, texts } = &*LOADED;
    let choice = usize::from(*choice);
    let (adapter, choice) = (&adapters[choice % adapters.len()].1, choice / adapters.len());
    let (text, choice) = (&texts[choice % texts.len()], choice / texts.len());
    let limits = &LIMITS[choice % LIMITS.len()];
    let samples = match adapter.adapt(line) {
        Ok(samples) => samples,
        // A panic of the plugin, or a sample that cannot be.
        Err(e) => return assert_eq!(e.kind, ErrorKind::Data, "{e}"),
    };
    for sample in &samples {
        for group in text.encode_sample(sample, limits).into_iter().flatten() {
            in_vocabulary(&group, text.vocab_size()).expect("the tokenizer's own ids");
            assert!(group.longest() <= limits.max_length);
            for branch in &group.branches {
                for range in branch.segments.iter().flat_map(|segment| &segment.trained) {
                    assert!(!range.is_empty() && range.end <= branch.tokens.len(), "{range:?}");
                }
            }
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let adapters = &LOADED.adapters;
    let mut seeds = Vec::new();
    let mut add = |plugin: &PluginRef, file: &[u8]| {
        let adapter = adapters.iter().position(|(known, _)| known == plugin).expect("loaded");
        for (index, line) in
            file.split(|b| *b == b'\n').filter(|l| !l.is_empty()).take(8).enumerate()
        {
            let others = index % (MODELS.len() * LIMITS.len());
            let choice = adapter + adapters.len() * others;
            seeds.push([&[u8::try_from(choice).expect("a byte chooses")], line].concat());
        }
    };
    for (name, file) in [
        ("demonstrations", "tests/golden/data/demos.jsonl"),
        ("demonstrations", "tests/golden/data/turns.jsonl"),
        ("demonstrations", "examples/data/demonstrations.jsonl"),
        ("scores", "tests/golden/data/scores.jsonl"),
        ("scores", "examples/data/scores.jsonl"),
        ("labels", "tests/golden/data/labels.jsonl"),
        ("labels", "examples/data/thumbs.jsonl"),
        ("preferences", "tests/golden/data/pairs.jsonl"),
        ("preferences", "examples/data/pairs.jsonl"),
    ] {
        add(&PluginRef { plugin: name.into(), ..PluginRef::default() }, &committed(file));
    }
    for fixture in beside::fixtures() {
        add(&of(&fixture.adapter), &std::fs::read(&fixture.file).expect("a fixture"));
    }
    seeds
}

//! A line of a data file: through a feedback adapter as it is loaded, then to tokens. The first byte
//! chooses adapter, model and limits.

use super::{NUMBERS, Target, committed};
use crate::golden;
use std::sync::LazyLock;
use uft::ErrorKind;
use uft::config::{EndOfTurn, LongRows, PluginRef};
use uft::data::source::in_vocabulary;
use uft::plugins::{Adapter, Registry};
use uft::text::{Limits, Text};

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

const ADAPTERS: [&str; 4] = ["demonstrations", "scores", "labels", "preferences"];
/// Between them: BOS and none, templates that end turns and that change earlier ones.
const MODELS: [&str; 3] = ["llama", "mistral", "qwen3"];

struct Loaded {
    adapters: [Adapter; ADAPTERS.len()],
    texts: [Text; MODELS.len()],
}

static LOADED: LazyLock<Loaded> = LazyLock::new(|| {
    let mut registry = Registry::default();
    let adapter = |name: &str| PluginRef { plugin: name.into(), ..PluginRef::default() };
    Loaded {
        adapters: ADAPTERS.map(|name| registry.adapter(&adapter(name)).expect("a bundled plugin")),
        texts: MODELS.map(|name| Text::load(&golden("models").join(name)).expect("a golden model")),
    }
});

fn run(input: &[u8]) {
    let Some((choice, line)) = input.split_first() else { return };
    let Ok(line) = std::str::from_utf8(line) else { return };
    let choice = usize::from(*choice);
    let adapter = &LOADED.adapters[choice % 4];
    let text = &LOADED.texts[choice / 4 % 3];
    let limits = match choice / 12 % 2 {
        0 => Limits {
            max_length: 64,
            long_rows: LongRows::CutPrompt,
            end_of_turn: EndOfTurn::Ignore,
        },
        _ => {
            Limits { max_length: 2048, long_rows: LongRows::Skip, end_of_turn: EndOfTurn::Require }
        }
    };
    let samples = match adapter.adapt(line) {
        Ok(samples) => samples,
        // A panic of the plugin, or a sample that cannot be.
        Err(e) => return assert_eq!(e.kind, ErrorKind::Data, "{e}"),
    };
    for sample in &samples {
        for group in text.encode_sample(sample, &limits).into_iter().flatten() {
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
    let files = [
        (0, "tests/golden/data/demos.jsonl"),
        (0, "tests/golden/data/turns.jsonl"),
        (0, "examples/data/demonstrations.jsonl"),
        (1, "tests/golden/data/scores.jsonl"),
        (1, "examples/data/scores.jsonl"),
        (2, "tests/golden/data/labels.jsonl"),
        (2, "examples/data/thumbs.jsonl"),
        (3, "tests/golden/data/pairs.jsonl"),
        (3, "examples/data/pairs.jsonl"),
    ];
    let mut seeds = Vec::new();
    for (adapter, file) in files {
        for (index, line) in committed(file).split(|b| *b == b'\n').take(8).enumerate() {
            let choice = adapter + 4 * u8::try_from(index).expect("a few lines");
            seeds.push([&[choice], line].concat());
        }
    }
    for (choice, record) in [
        (0, r#"{"instruction": "Add.", "input": "1 2", "output": "3"}"#),
        (
            0,
            r#"{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]}"#,
        ),
        (
            8,
            r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": [1, 2.5, null]}}}]}, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "Three."}], "tools": "[{\"name\": \"f\"}]", "chat_template_kwargs": {"enable_thinking": false}}"#,
        ),
        (
            1,
            r#"{"prompt": "<extra_id_1>User\nHi\n<extra_id_1>Assistant\n", "response": "Yes", "helpfulness": 3, "correctness": 4, "coherence": 2, "complexity": 1, "verbosity": 0}"#,
        ),
        (1, r#"{"prompt": "a", "completions": ["b", "c"], "scores": [0.5, 1]}"#),
        (
            13,
            r#"{"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Yes"}], "score": 1e0}"#,
        ),
    ] {
        seeds.push([&[choice], record.as_bytes()].concat());
    }
    seeds
}

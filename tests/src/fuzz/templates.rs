//! A chat template with a fixed conversation: bounded in time and memory, and no way to any file.

use super::{Target, committed_in};
use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;
use uft::text::{template::Template, values};
use uft_core::Message;

pub const TARGET: Target = Target { name: "templates", run, seeds, tokens: &TOKENS };

const TOKENS: [&str; 39] = [
    "{{",
    "}}",
    "{%",
    "%}",
    "{%-",
    "-%}",
    "{#",
    "#}",
    "messages",
    "message['role']",
    "content",
    "add_generation_prompt",
    "bos_token",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if ",
    "{% endif %}",
    "{% set ns = namespace(x=0) %}",
    "{% set a = a ~ a %}",
    "{% generation %}",
    "{% endgeneration %}",
    "range(99999)",
    "|tojson",
    "|string",
    "|join(',')",
    "|replace('', 'xxxxxxxx')",
    "|indent(99999)",
    "|list",
    "* 999999999",
    "[::-1]",
    ".zfill(99999999)",
    "{% macro f(x) %}",
    "{% endmacro %}",
    "{% include '/etc/passwd' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "strftime_now('%Y')",
    "|format(9)",
    "**",
];

/// A file that a template might try to read.
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");

/// Keyed anew in every process: a fuzzer that watches comparisons must not learn the file's text from them.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// The hash of the file's longest line.
static ITS_LINE: LazyLock<u64> = LazyLock::new(|| {
    let text = std::fs::read_to_string(FILE).expect("the tests' manifest");
    HASHER.hash_one(text.lines().max_by_key(|line| line.len()).expect("a manifest has lines"))
});

/// Whether a text shows the file's longest line.
fn shows_the_file(text: &str) -> bool {
    text.lines().any(|line| HASHER.hash_one(line) == *ITS_LINE)
}

/// Messages and variables.
type Conversation = (Vec<values::Value>, Vec<(String, values::Value)>);

static CONVERSATION: LazyLock<Conversation> = LazyLock::new(|| {
    let mut call = Message::new("assistant", "");
    call.extra =
        r#"{"content": null, "reasoning_content": "hm", "tool_calls": [{"type": "function",
        "function": {"name": "f", "arguments": {"x": [1, 2.5, null, "é"]}}}]}"#
            .into();
    let messages = [
        Message::new("system", "Be brief."),
        Message::new("user", "What is 1 + 2? <|im_end|>\n"),
        call,
        Message::new("tool", "3"),
        Message::new("assistant", "Three."),
    ];
    let arguments = r#"{"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type":
        "object", "properties": {"x": {"type": "array"}}}}}], "chat_template_kwargs": {"enable_thinking": true}}"#;
    let mut variables = values::arguments(arguments).expect("valid arguments");
    variables.extend([("bos_token".into(), "<s>".into()), ("eos_token".into(), "</s>".into())]);
    (messages.iter().map(|m| values::message(m).expect("a valid message")).collect(), variables)
});

fn run(input: &[u8]) {
    let Ok(source) = std::str::from_utf8(input) else { return };
    let Ok(template) = Template::new(source, "template", 0) else { return };
    let (messages, variables) = &*CONVERSATION;
    for header in [false, true] {
        let Ok(rendered) = template.render(messages, variables, header) else { continue };
        assert!(!shows_the_file(&rendered.text), "read {FILE}");
        for block in rendered.generation {
            assert!(rendered.text.is_char_boundary(block.start), "{block:?}");
            assert!(rendered.text.is_char_boundary(block.end), "{block:?}");
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = committed_in("tests/fixtures/text", "jinja");
    seeds.push(super::committed("tests/golden/models/qwen2/chat_template.jinja"));
    let deep = |last: &str| {
        format!(
            "{{% set ns = namespace(x=['x']) %}}{{% for i in range(99999) %}}{{% set ns.x = [ns.x] %}}{{% endfor %}}{last}"
        )
    };
    let hostile = [
        deep("{{ ns.x }}"),
        deep("{{ ns.x == [ns.x] }}"),
        deep("{{ ns.x | tojson }}"),
        "{% set x = messages * 9999 %}{% for i in range(99999) %}{% set y = x | tojson %}{% endfor %}".into(),
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(999) %}{% set ns.s = ns.s + ns.s %}{% endfor %}".into(),
        "{{ 'x' * 999999999999 }}{{ 'x'.ljust(999999999) }}{{ '%999999999d' | format(1) }}".into(),
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}".into(),
        format!("{{% include '{FILE}' %}}{{% import '{FILE}' as x %}}"),
        format!("{{% extends '{FILE}' %}}"),
        "{{ self }}{{ caller() }}{{ cycler }}{{ joiner }}{{ lipsum }}{{ debug() }}".into(),
    ];
    seeds.extend(hostile.map(String::into_bytes));
    seeds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_shows_the_file_is_recognised() {
        let text = std::fs::read_to_string(FILE).expect("the tests' manifest");
        assert!(shows_the_file(&format!("before\n{text}")));
        assert!(!shows_the_file("nothing of it"));
    }
}

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
    seeds.extend(hostile().into_iter().map(String::into_bytes));
    seeds
}

/// Templates that would take hours or all memory, or would read files, if they were let.
fn hostile() -> Vec<String> {
    let nested = |turns: usize, x: &str, y: &str, last: &str| {
        format!(
            "{{% set ns = namespace(x=['x'], y=['x']) %}}{{% for i in range({turns}) %}}{{% set ns.x = {x} %}}\
             {{% set ns.y = {y} %}}{{% endfor %}}{last}"
        )
    };
    let deep = |last| nested(99999, "[ns.x]", "ns.x", last);
    let twice = |last| nested(60, "[ns.x, ns.x]", "[ns.y, ns.y]", last);
    let repeated = |before: &str, turn: &str| {
        format!("{{% set s = {before} %}}{{% for i in range(99999) %}}{turn}{{% endfor %}}")
    };
    let mut hostile = vec![
        deep("{{ ns.x }}"),
        deep("{{ ns.x == ns.y }}"),
        deep("{{ ns.x | tojson }}"),
        nested(99999, "[ns.x] | replace('', 'xxxxxxxx')", "1", ""),
        nested(99, "ns.x + ns.x", "1", "{{ ns.x | length }}"),
        nested(99999, "ns.x * 1", "ns.y[:]", "{% for z in ns.x * 999999 %}{% endfor %}"),
        nested(99999, "[ns.x | reverse] | map('reverse') | list", "1", "{{ ns.x | first | length }}"),
        nested(99999, "{'a': ns.x}", "1", "{{ ([ns.x] * 9999) | map(attribute='a.a.a.a') | length }}"),
        "{% set x = messages * 9999 %}{% for i in range(99999) %}{% set y = x | tojson %}{% endfor %}".into(),
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(999) %}{% set ns.s = ns.s + ns.s %}{% endfor %}".into(),
        "{{ 'x' * 999999999999 }}{{ 'x'.ljust(999999999) }}".into(),
        "{{ '%999999999d' | format(1) }}{{ '%.999999999f' | format(1) }}".into(),
        "{{ '{:999999999}'.format(1) }}".into(),
        "{{ ('{0}' * 99999).format('x' * 99999) }}".into(),
        "{{ ('%(a)s' * 99999) | format(a='x' * 99999) }}".into(),
        "{{ [[1] * 9999] * 9999 == [[1] * 9999] * 9999 }}".into(),
        "{% set a, b = [1] * 99999999 %}".into(),
        "{{ ([1] * 99999999)[99999998:] }}{{ 2 in [1] * 99999999 }}".into(),
        "{{ ([['a'] * 1000] * 1000) | sum(start=[]) | length }}".into(),
        "{{ ([1] * 999) | tojson(separators=['x' * 999999, 'x' * 999999]) }}".into(),
        "{% for x in [1] %}{{ loop.cycle() }}{% endfor %}".into(),
        "{{ strftime_now('%B' * 9999999) }}{{ raise_exception('x' * 60000000) }}".into(),
        "{% include ['a'] * 99999999 ignore missing %}".into(),
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}".into(),
        format!("{{% include '{FILE}' %}}{{% import '{FILE}' as x %}}"),
        format!("{{% extends '{FILE}' %}}"),
        "{{ self }}{{ caller() }}{{ cycler }}{{ joiner }}{{ lipsum }}{{ debug() }}".into(),
    ];
    hostile.extend(
        [
            "{{ 1 < ns.x < ns.y }}{{ ns.x == ns.y }}",
            "{{ ns.x in [ns.y] }}{{ [ns.x].count(ns.y) }}",
            "{{ [ns.x, ns.y] | sort }}",
            "{{ {'a': ns.x, 'b': ns.y} | dictsort(by='value') }}",
            "{{ [{'a': ns.x}, {'a': ns.y}] | groupby('a') | list }}",
            "{{ {ns.x: 1}[ns.y] }}{{ messages[ns.x] }}",
            "{{ ns.x ~ 'a' }}",
            "{{ [ns.x] | join('a') }}{{ ','.join([ns.x]) }}",
            "{{ [ns.x] | map('upper') | list }}",
            "{{ [{'a': ns.x}] | selectattr('a', 'in', [ns.y]) | list }}",
            "{% for z in [ns.x, ns.y] %}{{ loop.changed(z) }}{% endfor %}",
            "{{ '{}'.format(ns.x) }}{{ ns.x is startingwith 'a' }}",
        ]
        .map(twice),
    );
    hostile.extend([
        repeated("'x' * 20000000", "{{ s == s ~ '' }}{{ s in [s] }}{{ {s: s}[s] }}"),
        repeated("'é' * 10000000", "{{ s[:1] }}{{ s[-1] }}{{ s is lower }}{{ s.isupper() }}"),
        repeated("'ΑΣ' * 300000", "{% set x = s | title | length %}"),
        repeated("'x' * 60000000", "{{ s.split('x') | length }}{{ s.splitlines() }}"),
        repeated("'x' * 9999999", "{{ s.strip(s) }}{{ s | trim(s) }}"),
        repeated("['y', 'x'] * 300000", "{{ s | unique | sort | length }}"),
    ]);
    hostile
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

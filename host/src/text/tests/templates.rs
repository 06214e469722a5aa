//! Chat templates of real models against transformers' renderings, and what guards against broken
//! or hostile ones.

use super::*;
use crate::text::template::Template;

/// The moment that `make_renders.py` renders at.
const NOW: i64 = 1_721_999_045;

fn render(source: &str, variables: &[(&str, Json)]) -> Result<String> {
    let variables: Vec<_> =
        variables.iter().map(|(k, v)| ((*k).to_owned(), values::from_json(v))).collect();
    Ok(Template::new(source, "chat_template.jinja", NOW)?.render(&[], &variables, false)?.text)
}

#[test]
fn real_templates_render_as_in_transformers() {
    let golden = read_json(folder("fixtures/text/renders.json"));
    let tokens = golden["tokens"].as_object().unwrap();
    let mut compared = 0;
    for (name, renders) in golden["renders"].as_object().unwrap() {
        let path = folder(&format!("fixtures/text/{name}.jinja"));
        let source = std::fs::read_to_string(path).unwrap();
        let template = Template::new(&source, name.as_str(), NOW).unwrap();
        for (case, expected) in renders.as_object().unwrap() {
            let given = &golden["cases"][case];
            let mut variables: Vec<_> =
                tokens.iter().map(|(k, v)| (k.clone(), values::from_json(v))).collect();
            variables.extend(values::arguments(&given["variables"].to_string()).unwrap());
            let messages: Vec<_> =
                messages(&given["messages"]).iter().map(|m| values::message(m).unwrap()).collect();
            let header = given["header"].as_bool().unwrap();
            match template.render(&messages, &variables, header) {
                Err(error) => assert!(!expected["error"].is_null(), "{name}, {case}: {error}"),
                Ok(rendered) => {
                    assert_eq!(expected["text"], json!(rendered.text), "{name}, {case}");
                    let blocks: Vec<[usize; 2]> =
                        rendered.generation.iter().map(|r| [r.start, r.end]).collect();
                    assert_eq!(expected["generation"], json!(blocks), "{name}, {case}");
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 80, "{compared} renderings compared");
}

/// Each expression with what Python's jinja2 makes of it in transformers' environment.
#[test]
fn pythons_ways() {
    let variables = [
        ("list", json!([1, 2, 3])),
        ("map", json!({"b": 1, "a": null, "é": [true, 1.0, 1e-7, 1e16, "x\n\"</b>"]})),
        ("text", json!(" a-b-c ")),
        ("nothing", json!(null)),
    ];
    for (source, expected) in [
        ("{{ list[::-1] }} {{ text[::-1] }} {{ list[-1] }}", "[3, 2, 1]  c-b-a  3"),
        (
            "{{ map | tojson }}",
            r#"{"b": 1, "a": null, "é": [true, 1.0, 1e-07, 1e+16, "x\n\"</b>"]}"#,
        ),
        ("{{ {'a': [], 'b': {}} | tojson(indent=2) }}", "{\n  \"a\": [],\n  \"b\": {}\n}"),
        ("{{ list | tojson(indent=1) }}", "[\n 1,\n 2,\n 3\n]"),
        ("{{ 'é🙂' | tojson(ensure_ascii=true) }}", r#""\u00e9\ud83d\ude42""#),
        (
            "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}",
            r#"{"a":2,"b":1}"#,
        ),
        (
            "{{ text is string }}{{ text is sequence }}{{ text is iterable }}{{ text is mapping }}",
            "TrueTrueTrueFalse",
        ),
        (
            "{{ map is sequence }}{{ map is mapping }}{{ list is iterable }}{{ nothing is iterable }}",
            "TrueTrueTrueFalse",
        ),
        ("{{ missing is iterable }}{{ missing is defined }}{{ missing }}", "TrueFalse"),
        (
            "{{ true }} {{ nothing }} {{ 1.0 }} {{ 0.00001 }} {{ 1e-7 | string }}",
            "True None 1.0 1e-05 1e-07",
        ),
        (
            "{{ text.strip().split('-') }} {{ text.rsplit('-', 1) }}",
            "['a', 'b', 'c'] [' a-b', 'c ']",
        ),
        (
            "{{ text.partition('-')[2] }}|{{ text.rpartition('-')[0] }}|{{ 'x'.partition('-') }}",
            "b-c | a-b|('x', '', '')",
        ),
        (
            "{{ 'abc'.removeprefix('a') }}{{ 'abc'.removesuffix('c') }}{{ '-7'.zfill(4) }}",
            "bcab-007",
        ),
        (
            "{{ 'ab'.startswith(('x', 'a')) }}{{ ' a\n'.rstrip() }}|{{ '\n\na'.lstrip('\n') }}",
            "True a|a",
        ),
        ("{% for k, v in map.items() if v %}{{ k }}{% endfor %}{{ map.get('x', 'd') }}", "béd"),
        ("{{ map | dictsort | map('first') | join(',') }}{{ list | length }}", "a,b,é3"),
        (
            "{% for x in list %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{{ loop.previtem }}{% endfor %}",
            "132",
        ),
        ("{% for x in list %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1"),
        (
            "{% set ns = namespace(n=0) %}{% for x in list %}{% set ns.n = ns.n + x %}{% endfor %}{{ ns.n }}",
            "6",
        ),
        ("{% macro m(a, b='-') %}{{ a ~ b }}{% endmacro %}{{ m('x') }}{{ m('y', b=1) }}", "x-y1"),
        ("{% set x %}\n  a {{ 1 }}\n{% endset %}[{{ x | trim }}]", "[a 1]"),
        (
            "{{ [{'r': 'u', 'n': 1}, {'r': 'a', 'n': 2}] | selectattr('r', 'equalto', 'a') | map(attribute='n') | list }}",
            "[2]",
        ),
        (
            "{{ '%s and %d' | format('a', 3) }} {{ 'x' if missing else 'y' }} {{ 'b' in 'abc' }}",
            "a and 3 y True",
        ),
        ("a\n  {% if true %}\n    b\n  {% endif %}\nc\n", "a\n    b\nc"),
        ("a\r\n  {%- if true %}\r\nb\r\n{%- endif %}\r\n", "ab"),
        (
            "{{ 2 * 'ab' }}{{ [0] * 2 }}{{ 2 * -1.5 }}{{ 2 ** 3 * 2 }}{{ (1,) * 2 }}",
            "abab[0, 0]-3.016(1, 1)",
        ),
        ("{% macro a(x, y) %}{{ x * y }}{% endmacro %}{{ a(*list[1:]) }}{{ a(3, *[4]) }}", "612"),
        (
            "{{ 1 < 2 < 3 }}{{ 1 < 2 in list }}{{ 9 not in list }}{{ {'a': 1}.get('a') }}",
            "TrueTrueTrue1",
        ),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{% generation %}\n  {{ 1 }}\n  {% endgeneration %}\n|", "  1\n|"),
        ("a {%- generation -%} b {%- endgeneration -%} c", "abc"),
    ] {
        assert_eq!(render(source, &variables).as_deref(), Ok(expected), "{source}");
    }
}

#[test]
fn generation_blocks_have_their_bytes() {
    let source = "{% set ns = namespace(n=0) %}{% for m in ['é', 'b'] %}<{{ m }}>\
                  {% generation %}{% set ns.n = ns.n + 1 %}{% set x = 1 %}{{ m }}{{ ns.n }}{% endgeneration %}\
                  {{ x }}{% endfor %}";
    let template = Template::new(source, "t", NOW).unwrap();
    let rendered = template.render(&[], &[], false).unwrap();
    assert_eq!(rendered.text, "<é>é1<b>b2");
    assert_eq!(rendered.generation, [4..7, 10..12]);
}

#[test]
fn errors_name_file_and_line() {
    let error = |source: &str| render(source, &[("s", json!("x"))]).unwrap_err().message;
    assert_eq!(
        error("\n{{ raise_exception('only users') }}"),
        "chat_template.jinja, line 2: only users"
    );
    assert!(error("\n\n{% if %}").starts_with("chat_template.jinja, line 3: syntax error"));
    // minijinja 3.1 panics on this one.
    assert!(
        error("{% import 'a' as x % y %}").starts_with("chat_template.jinja: the template engine")
    );
    assert!(error("{{ s.frobnicate() }}").contains("no method named frobnicate"));
    assert!(error("{{ missing.field }}").contains("undefined value"));
    assert!(error("{{ missing | tojson }}").contains("undefined is not JSON"));
    assert!(error("{{ strftime_now('%Q') }}").contains("\"%Q\" is not supported"));
}

#[test]
fn a_template_that_does_not_end_is_stopped() {
    let loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}{% endfor %}{% endfor %}";
    let message = render(loops, &[]).unwrap_err().message;
    assert!(message.contains("does not come to an end"), "{message}");
    let doubling = "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(999) %}{% set ns.s = ns.s + ns.s %}{% endfor %}";
    let message = render(doubling, &[]).unwrap_err().message;
    assert!(message.contains("does not come to an end"), "{message}");
    let nested = |turns: usize, wrapped: fn(&str) -> String, last: &str| {
        let (x, y) = (wrapped("ns.x"), wrapped("ns.y"));
        format!(
            "{{% set ns = namespace(x=['x'], y=['x']) %}}{{% for i in range(9) %}}{{% for j in range({turns}) %}}\
             {{% set ns.x = {x} %}}{{% set ns.y = {y} %}}{{% endfor %}}{{% endfor %}}{last}"
        )
    };
    for last in [
        "{{ ns.x }}",
        "{{ ns.x | string }}",
        "{{ ns.x | tojson }}",
        "{{ ns.x | upper }}",
        "{{ [ns.x] | join('-') }}",
        "{{ ns.x ~ '-' }}",
        "{{ {ns.x: 1} }}",
        "{{ ns.x == ns.y }}",
        "{{ ns.x in [ns.y] }}",
        "{{ 1 < ns.x < ns.y }}",
        "{{ [ns.x, ns.y] | sort }}",
        "{{ [ns.x] | map('trim') | list }}",
        "{{ [ns.x] | select('eq', ns.y) | list }}",
        "{{ [{'y': ns.x}] | selectattr('y', 'in', [ns.y]) | list }}",
        "{{ [ns.x].count(ns.y) }}",
        "{% for y in [ns.x, ns.y] %}{{ loop.changed(y) }}{% endfor %}",
    ] {
        for wrapped in [|x: &str| format!("[{x}]"), |x: &str| format!("{{'a': {x}}}")] {
            let message = render(&nested(3333, wrapped, last), &[]).unwrap_err().message;
            assert!(message.contains("nested more than 100 deep"), "{last}: {message}");
        }
        let twice = |x: &str| format!("[{x}, {x}]");
        let message = render(&nested(7, twice, last), &[]).unwrap_err().message;
        assert!(message.contains("does not come to an end"), "{last}: {message}");
    }
    let repeated = "{% set x = [1, 'y'] * 9999 %}{% for i in range(9999) %}{% set y = x | tojson %}{% endfor %}";
    let message = render(repeated, &[]).unwrap_err().message;
    assert!(message.contains("does not come to an end"), "{message}");
    assert!(render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", &[]).is_err());
    assert!(render("{% include '/etc/passwd' %}", &[]).is_err());
    let message = render("{{ [1] | tojson(indent=3000000000) }}", &[]).unwrap_err().message;
    assert!(message.contains("an indent of more than 16"), "{message}");
}

/// 250 long turns of a conversation need less than an eighth of what a template may do.
#[test]
fn long_conversations_come_to_their_end() {
    let golden = read_json(folder("fixtures/text/renders.json"));
    let turns: Vec<_> = ["user", "assistant"]
        .iter()
        .cycle()
        .take(250)
        .map(|role| {
            values::from_json(&json!({"role": role, "content": "Some words. ".repeat(200)}))
        })
        .collect();
    let tokens = golden["tokens"].as_object().unwrap();
    let variables: Vec<_> = tokens.iter().map(|(k, v)| (k.clone(), values::from_json(v))).collect();
    let mut rendered = 0;
    for name in golden["renders"].as_object().unwrap().keys() {
        let source =
            std::fs::read_to_string(folder(&format!("fixtures/text/{name}.jinja"))).unwrap();
        let mut template = Template::new(&source, name.as_str(), NOW).unwrap();
        template.limit(250_000);
        match template.render(&turns, &variables, true) {
            Ok(_) => rendered += 1,
            Err(error) => assert!(!error.message.contains("come to an end"), "{name}: {error}"),
        }
    }
    assert_eq!(rendered, golden["renders"].as_object().unwrap().len());
}

#[test]
fn a_generation_block_that_is_cut_apart_is_refused() {
    let source = "{% set x %}a{% generation %}b{% endgeneration %}{% endset %}{{ x[:2] }}";
    let message = render(source, &[]).unwrap_err().message;
    assert!(message.contains("cuts apart"), "{message}");
}

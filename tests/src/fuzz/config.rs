//! A run's TOML file. Lines that begin with `--set ` are overrides of the command line.

use super::{NUMBERS, Target, committed};
use uft::config::Config;

pub const TARGET: Target = Target { name: "config", run, seeds, tokens: &TOKENS };

const TOKENS: [&str; 16] = [
    NUMBERS[3],
    NUMBERS[5],
    NUMBERS[6],
    "nan",
    "inf",
    "[[data]]\n",
    "[[stage]]\n",
    "[train]\n",
    "--set ",
    "[0]",
    "\"\"\"",
    "{ plugin = ",
    "1979-05-27T07:32:00Z",
    "\\u0000",
    " = ",
    "\n",
];

fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let (set, lines): (Vec<&str>, Vec<&str>) =
        text.split('\n').partition(|line| line.starts_with("--set "));
    let set: Vec<String> = set.iter().map(|line| line["--set ".len()..].to_owned()).collect();
    let Ok(config) = Config::parse(&lines.join("\n"), &set) else { return };
    // What a run makes of a configuration before it opens any file.
    for data in &config.data {
        data.adapter.params_json();
        for term in &data.objective.terms {
            term.plugin.params_json();
            let weights = [0, 3, u64::MAX].map(|step| term.weight.at(step, 10));
            assert!(weights.iter().all(|w| *w >= 0.0), "{weights:?}");
        }
    }
    uft::train::identity::settings(&config);
}

fn seeds() -> Vec<Vec<u8>> {
    let quickstart = committed("examples/quickstart.toml");
    let with = |set: &str| [quickstart.as_slice(), set.as_bytes()].concat();
    let deep = format!("\n--set {}=1\n", ["a"; 3000].join("."));
    vec![
        quickstart.clone(),
        committed("examples/smollm2/run.toml"),
        uft::config::docs::annotated().into_bytes(),
        with("\n--set train.lr=3e-5\n--set data[demonstrations].weight=2\n--set stage[0].steps=10"),
        with("\n--set data[0].objective.beta = { a = [1, nan], b = 1979-05-27 }"),
        with(&deep),
        with(
            "\n--set data[0].objective = [{ plugin = 'sft', weight = { schedule = 'linear', from = 1, to = 0 } }]",
        ),
        with(
            "\n--set data[0].objective.beta = { schedule = 'cosine', from = 0.1, to = 1, over = 0.5 }",
        ),
        with("\n[eval]\nevery = 18446744073709551615\n"),
    ]
}

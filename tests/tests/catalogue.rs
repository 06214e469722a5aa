//! The bundled plugins: their list and their table are those of the libraries, every objective passes the
//! check with its defaults, its numbers are TRL's or its authors' (tests/golden/README.md), and every adapter reads
//! records of real schema. What a plugin is held against lies beside it.

use serde_json::Value;
use std::collections::BTreeSet;
use uft::config::PluginRef;
use uft::plugins::{Registry, table};
use uft_core::abi::{ObjectiveObject, Role};
use uft_core::check::{self, Case};
use uft_core::{Feedback, Kinds};
use uft_tests::{beside, golden, lines, numbers, root, succeed};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");

/// Every bundled library, loaded.
fn registry() -> Registry {
    let mut registry = Registry::new([]);
    for library in bundled::LIBRARIES {
        registry.load(library.name).expect("it was built");
    }
    registry
}

/// A bundled objective, by its name alone.
fn objective(registry: &mut Registry, name: &str, params: &Value) -> ObjectiveObject {
    let params = toml::Table::try_from(params).expect("parameters are a table");
    let plugin = PluginRef { plugin: name.to_owned(), params };
    registry.objective(&plugin).expect("a bundled objective").into_object()
}

/// The names of all bundled objectives.
fn objectives(registry: &Registry) -> Vec<String> {
    let of_role = registry.entries().filter(|(_, e)| e.role == Role::Objective);
    of_role.map(|(_, e)| e.name.to_string()).collect()
}

/// No parameters.
fn defaults() -> Value {
    Value::Object(Default::default())
}

#[test]
fn the_list_is_what_the_libraries_export_and_what_is_in_the_folder() {
    for library in bundled::LIBRARIES {
        let mut registry = Registry::new([]);
        registry.load(library.name).expect("it was built");
        let exported: Vec<_> = registry.entries().map(|(_, e)| e.name.as_str()).collect();
        assert_eq!(exported, library.entries, "plugins/bundled/src/lib.rs: {}", library.name);
    }
    let folders: Vec<String> = beside::folders().iter().map(|f| beside::name(f)).collect();
    let listed = bundled::LIBRARIES.map(|library| library.name.to_owned());
    for folder in &folders {
        assert!(listed.contains(folder), "plugins/bundled/src/lib.rs has no library `{folder}`");
    }
    assert_eq!(folders.len(), listed.len(), "plugins/bundled/src/lib.rs: {listed:?}");
    let manifest = std::fs::read_to_string(root().join("plugins/bundled/Cargo.toml"));
    let manifest = manifest.expect("the manifest of `bundled`");
    for library in bundled::LIBRARIES {
        let line = format!("\n{} = {{ path = \"../{0}\" }}\n", library.name);
        assert!(manifest.contains(&line), "plugins/bundled/Cargo.toml lacks:{line}");
    }
}

#[test]
fn the_table_is_current() {
    let page = std::fs::read_to_string(root().join("plugins/README.md")).unwrap_or_default();
    let current = table::page().expect("the bundled plugins load");
    assert!(
        page == current,
        "plugins/README.md is stale: uft plugin list --markdown > plugins/README.md"
    );
}

#[test]
fn every_objective_says_its_formula_and_its_paper() {
    let registry = registry();
    for (_, entry) in registry.entries().filter(|(_, e)| e.role == Role::Objective) {
        let (formula, source) = table::split(&entry.about);
        let number = source.split("arXiv ").nth(1).unwrap_or_default();
        let cited = number.len() >= 10 && number.as_bytes()[4] == b'.';
        assert!(!formula.is_empty() && cited, "{}: {}", entry.name, entry.about);
    }
}

#[test]
fn every_objective_passes_the_check() {
    let mut registry = registry();
    for name in objectives(&registry) {
        let mut make = || Ok(objective(&mut registry, &name, &defaults()));
        check::check_objective(&name, &mut make).expect_passed();
    }
}

#[test]
fn every_adapter_passes_the_check_on_its_fixtures() {
    let mut registry = registry();
    for fixture in beside::fixtures() {
        let records = std::fs::read_to_string(&fixture.file).expect("records");
        let plugin: PluginRef = fixture.adapter.try_into().expect("a plugin");
        let mut make = || Ok(registry.adapter(&plugin).expect("a bundled adapter").into_object());
        let records: Vec<&str> = records.lines().collect();
        check::check_adapter(&plugin.plugin, &mut make, &records).expect_passed();
    }
}

/// A step of a golden.json.
fn step(described: &Value) -> Case {
    let mut case = Case::new();
    for prompt in described.as_array().expect("prompts") {
        let responses = prompt.as_array().expect("responses").iter().map(|response| {
            let value = response["value"].as_f64().expect("a value") as f32;
            let feedback = match response["kind"].as_str().expect("a kind") {
                "demonstration" => Feedback::Demonstration,
                "score" => Feedback::Score(value),
                "binary" => Feedback::Binary(value > 0.5),
                "chosen" => Feedback::Chosen(Some(value).into()),
                _ => Feedback::Rejected(Some(value).into()),
            };
            let logps = |key| numbers(&response[key]).into_iter().map(|x| x as f32).collect();
            (feedback, logps("logps"), logps("ref_logps"))
        });
        let responses: Vec<(Feedback, Vec<f32>, Vec<f32>)> = responses.collect();
        let borrowed = responses.iter().map(|(f, l, r)| (*f, l.as_slice(), r.as_slice()));
        case = case.group(&borrowed.collect::<Vec<_>>());
    }
    case
}

#[test]
fn numbers_are_those_of_trl_and_of_the_papers_authors() {
    let (mut compared, mut by_name) = (BTreeSet::new(), Registry::new([]));
    for (plugin, golden) in beside::golden() {
        for expected in golden["expected"].as_array().expect("expectations") {
            let name = expected["objective"].as_str().expect("a name");
            assert_eq!(bundled::library_of(name), Some(plugin.as_str()), "{name} is another's");
            compare(
                &mut objective(&mut by_name, name, &expected["params"]),
                expected,
                &golden["steps"],
            );
            compared.insert(name.to_owned());
        }
    }
    // Theirs are in tests/golden/expected, at the end of a model.
    let elsewhere = ["sft", "uft-sft", "una-score", "una-binary", "kto"];
    for name in objectives(&registry()) {
        let is = elsewhere.contains(&name.as_str()) || compared.contains(&name);
        assert!(is, "{name} is compared with nothing: its plugin's golden.json lacks it");
    }
}

/// Holds an objective against an expectation of a golden.json with these steps.
fn compare(objective: &mut ObjectiveObject, expected: &Value, steps: &Value) {
    for before in expected["before"].as_array().expect("steps") {
        let before = step(&steps[before.as_str().expect("a name")]);
        before.run(objective).expect("a step");
    }
    let case = step(&steps[expected["step"].as_str().expect("a name")]);
    let seen = case.run(objective).expect("a step");
    let (loss, dlogp) = (expected["loss"].as_f64().expect("a loss"), numbers(&expected["dlogp"]));
    let scale = dlogp.iter().fold(0.0, |max: f64, g| max.max(g.abs()));
    let [name, params, source] = ["objective", "params", "source"].map(|key| &expected[key]);
    let place = format!("{name} {params} against {source}");
    assert!((seen.loss - loss).abs() <= 1e-6 * loss.abs(), "{place}: {} {loss}", seen.loss);
    assert_eq!(seen.dlogp.len(), dlogp.len(), "{place}");
    for (t, (ours, theirs)) in seen.dlogp.iter().zip(&dlogp).enumerate() {
        let apart = (f64::from(*ours) - theirs).abs();
        assert!(apart <= 1e-6 * scale, "{place}: token {t}: {ours} {theirs}");
    }
}

/// A run with a source for every bundled objective, on the golden data that it takes.
fn every_objective(micro_tokens: usize) -> String {
    let model = golden("models/qwen2").display().to_string();
    let mut run = format!(
        "[model]\npath = \"{model}\"\nadapter = \"{model}/adapter\"\n\
         [train]\noutput = \"out\"\nshuffle = false\nthreads = 2\nmicro_tokens = {micro_tokens}\n"
    );
    let mut registry = registry();
    let names = objectives(&registry);
    for name in &names {
        let accepts = objective(&mut registry, name, &defaults()).accepts();
        let (file, adapter) = if accepts.contains(Kinds::PAIR) {
            ("pairs", "preferences")
        } else if accepts.contains(Kinds::SCORE) {
            ("scores", "scores")
        } else if accepts.contains(Kinds::BINARY) {
            ("labels", "labels")
        } else {
            ("demos", "demonstrations")
        };
        let file = golden(&format!("data/{file}.jsonl"));
        run += &format!(
            "[[data]]\nname = \"{name}\"\nfiles = [\"{}\"]\nadapter = \"{adapter}\"\nobjective = \"{name}\"\n",
            file.display()
        );
    }
    // All eight rows of every source in one step.
    run.replace("[train]\n", &format!("[train]\nbatch = {}\n", 8 * names.len()))
}

#[test]
fn all_objectives_train_in_one_step_whatever_its_micro_batches_are() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let loss = |micro_tokens: usize| {
        let path = dir.path().join("run.toml");
        std::fs::write(&path, every_objective(micro_tokens)).expect("the run is written");
        let out = dir.path().join("grad.safetensors");
        let [path, out] = [&path, &out].map(|path| path.to_str().expect("a path"));
        let printed = succeed(UFT, &["grad", path, "--out", out]);
        lines(&printed)[0]["loss"].as_f64().expect("a loss")
    };
    let (large, small) = (loss(65_536), loss(256));
    assert!((large - small).abs() <= 1e-6 * large.abs(), "{large} {small}");
}

#[test]
fn objectives_that_see_the_whole_step_see_it_in_a_sum_too() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, data) = (golden("models/qwen2"), golden("data/pairs.jsonl"));
    let loss = |objective: &str| {
        let [model, data] = [&model, &data].map(|path| path.display().to_string());
        let run = format!(
            "[model]\npath = \"{model}\"\nadapter = \"{model}/adapter\"\n\
             [train]\noutput = \"out\"\nbatch = 8\nthreads = 2\nmicro_tokens = 256\n\
             [[data]]\nname = \"pairs\"\nfiles = [\"{data}\"]\nadapter = \"preferences\"\nobjective = {objective}\n"
        );
        let path = dir.path().join("run.toml");
        std::fs::write(&path, run).expect("the run is written");
        let out = dir.path().join("grad.safetensors");
        let [path, out] = [&path, &out].map(|path| path.to_str().expect("a path"));
        let printed = succeed(UFT, &["grad", path, "--out", out]);
        lines(&printed)[0]["loss"].as_f64().expect("a loss")
    };
    let apart = loss("\"aot\"") + loss("\"bco\"");
    let sum = loss("[{ plugin = \"aot\" }, { plugin = \"bco\" }]");
    assert!((sum - apart).abs() <= 1e-6 * apart, "{sum} {apart}");
}

#[test]
fn records_of_published_data_sets_reach_the_model() {
    let model = golden("models/qwen3").display().to_string();
    let mut read = BTreeSet::new();
    for fixture in beside::fixtures() {
        let (data, adapter) = (fixture.file.display().to_string(), &fixture.adapter);
        let format = adapter.as_str().map_or_else(|| adapter.to_string(), str::to_owned);
        let arguments = ["score", "--model", &model, "--data", &data, "--format", &format];
        let seen = lines(&succeed(UFT, &arguments)).len();
        assert_eq!(seen, fixture.responses, "{data} as {format}");
        let plugin: PluginRef = fixture.adapter.try_into().expect("a plugin");
        let name = plugin.plugin;
        assert_eq!(
            bundled::library_of(&name),
            Some(fixture.plugin.as_str()),
            "{name} is another's"
        );
        read.insert(name);
    }
    let registry = registry();
    let adapters = registry.entries().filter(|(_, entry)| entry.role == Role::Adapter);
    for (library, entry) in adapters {
        let of = format!("plugins/{}/fixtures/index.toml", library.name());
        assert!(read.contains(entry.name.as_str()), "{of} has no records for {}", entry.name);
    }
}

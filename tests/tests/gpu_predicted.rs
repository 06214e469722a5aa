//! What tests/gpu predicts and runs are the shapes that the documentation and the plan have.

use uft_tests::mixed::temporary;
use uft_tests::scripts::{here, python, snippet, stdout};
use uft_tests::{root, succeed};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");

#[test]
fn what_is_predicted_is_what_the_documentation_says() {
    let documented = std::fs::read_to_string(root().join("docs/kernels.md")).expect("the docs");
    let predicted = ["predict.py", "predict_32b.py"]
        .map(|script| stdout(python(&here(script)).output().expect("runs")))
        .concat();
    for line in predicted.lines().filter(|line| line.starts_with("| `")) {
        // Measurements take the place of the dash.
        let (name, rest) = line.split_once(" | — |").expect("not measured");
        let found = documented.lines().find(|line| line.starts_with(name));
        let found = found.unwrap_or_else(|| panic!("docs/kernels.md has no line {name}"));
        assert!(found.ends_with(rest), "{found}: predicted is {line}");
    }
}

/// The configuration of the whole steps is one that uft takes, the data has the tokens that it says, and a plan exists for a
/// GPU of 80 GiB; no weights are needed for that.
#[test]
fn the_steps_of_mistral_7b_fit_on_a_gpu() {
    let (_guard, dir) = temporary();
    let write = format!(
        "import json, pathlib, model, whole_steps as w\n\
         folder = pathlib.Path({dir:?}); (folder / 'model').mkdir()\n\
         model.write_tokenizer(folder / 'model', 32000)\n\
         (folder / 'model/config.json').write_text(json.dumps(model.config('mistral-7b')))\n\
         model.write_data(folder, 'mistral-7b', w.GROUPS)\n\
         for task in w.GROUPS: (folder / f'{{task}}.toml').write_text(w.configuration(task, 'mistral-7b', 'cuda', 1, folder))\n\
         print(*(w.tokens(task, 'mistral-7b') for task in w.GROUPS))",
    );
    assert_eq!(snippet(&write).trim(), "16384 16384");
    // A text's last token and a response's are not fed; a prompt is computed once.
    for (task, rows) in [("texts", 4 * 4095), ("pairs", 2 * (2048 + 2 * 2047))] {
        let config = dir.join(format!("{task}.toml")).display().to_string();
        let planned = succeed(UFT, &["check", &config, "--gpu", "80"]);
        assert!(planned.contains("of 81920.0 MiB available on such a GPU"), "{planned}");
        assert!(planned.contains(&rows.to_string()), "{rows} rows: {planned}");
    }
}

/// What is predicted of steps of Qwen2.5-32B is of what the plan chooses for the memory of one GPU.
#[test]
fn the_steps_of_qwen_32b_are_computed_as_predicted() {
    let (_guard, dir) = temporary();
    let write = format!(
        "import json, pathlib, model, predict_32b as p, whole_steps as w\n\
         folder = pathlib.Path({dir:?}); (folder / 'model').mkdir()\n\
         model.SHAPES['32b'], model.LENGTHS['32b'] = p.SHAPE, dict(text=p.LENGTH, prompt=8, response=8)\n\
         model.write_tokenizer(folder / 'model', p.VOCABULARY)\n\
         (folder / 'model/config.json').write_text(json.dumps(model.config('32b')))\n\
         model.write_data(folder, '32b', dict(texts=8, pairs=0))\n\
         (folder / 'texts.toml').write_text(w.configuration('texts', '32b', 'cuda', 1, folder))\n\
         print(p.MEMORY, p.LENGTH)\n\
         for choice in p.CHOICES: print(*choice)",
    );
    let said = snippet(&write);
    let numbers = |line: &str| -> Vec<usize> {
        line.split(' ').map(|number| number.parse().expect("a number")).collect()
    };
    let mut lines = said.lines().map(numbers);
    let (memory, length) = lines.next().map(|first| (first[0].to_string(), first[1])).expect("two");
    let config = dir.join("texts.toml").display().to_string();
    for choice in lines {
        let [tokens, gates, whole, offloaded] = choice[..] else { panic!("four numbers") };
        let batch = format!("train.batch={}", tokens / length);
        let micro_tokens = format!("train.micro_tokens={tokens}");
        let set = ["--gpu", &memory, "--set", &batch, "--set", &micro_tokens];
        let planned = succeed(UFT, &[&["check", &config][..], &set].concat());
        let again = format!("{} of 64 layers computed again", gates + whole);
        let of_gates = format!("of {gates} gate and up alone");
        let inputs = format!("the input of {offloaded} in the machine's memory");
        assert!(planned.contains(&again), "{tokens} tokens: {planned}");
        assert_eq!(planned.contains(&of_gates), gates > 0, "{tokens} tokens: {planned}");
        assert_eq!(planned.contains(&inputs), offloaded > 0, "{tokens} tokens: {planned}");
    }
}

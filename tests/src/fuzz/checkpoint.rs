//! A checkpoint of a run, one file of it changed, through what `train --resume` does before its first
//! step. The manifest's hashes and the run's identity would refuse nearly every input, so what comes
//! behind them gets the files all the same.

use super::directory::Directory;
use super::{NUMBERS, Target, scratch};
use crate::golden;
use std::path::Path;
use std::sync::{LazyLock, Mutex};
use uft::config::Config;
use uft::train::identity::Identity;
use uft::train::logs::Logs;
use uft::train::reference::ReferenceLogps;
use uft::train::setup::Run;
use uft::train::{checkpoint, checkpoint::Position, train};

pub const TARGET: Target = Target { name: "checkpoint", run, seeds, tokens: &TOKENS };

const TOKENS: [&str; 24] = [
    NUMBERS[0],
    NUMBERS[1],
    NUMBERS[3],
    NUMBERS[5],
    NUMBERS[6],
    NUMBERS[7],
    "null",
    "\"stage\":",
    "\"step\":",
    "\"steps\":",
    "\"tokens\":",
    "\"updates\":",
    "\"revision\":",
    "\"objectives\":",
    "\"files\":",
    "\"../../x\"",
    "\"/dev/zero\"",
    "\"F32\"",
    "\"F16\"",
    "\"shape\":[",
    "\"data_offsets\":[",
    ".exp_avg_sq",
    "\"eval_loss\":",
    "\n{",
];

/// Reference log-probs, which a run goes on with as it does with its checkpoint.
const LOGPS: &str = "reference.logps";

/// The name of the checkpoint that the run below leaves.
const NAME: &str = "checkpoint-2";

struct Saved {
    run: Run,
    identity: Identity,
}

static SAVED: LazyLock<(Mutex<Saved>, Directory)> = LazyLock::new(|| {
    let dir = scratch();
    let mut run = Run::prepare(configuration(dir.path())).expect("a small run");
    let identity = Identity::of(&run).expect("a small run");
    train(&mut run, false).expect("two steps");
    let file = |name| {
        let bytes =
            std::fs::read(dir.path().join(NAME).join(name)).expect("a file of a checkpoint");
        (name, bytes)
    };
    let files = [
        "uft_state.json",
        "manifest.json",
        "optimizer.safetensors",
        "adapter_model.safetensors",
        "metrics.jsonl",
        "eval.jsonl",
        "adapter_config.json",
        "trainer_state.json",
        "README.md",
    ];
    let mut files = files.map(file).to_vec();
    let cache = std::fs::read_dir(dir.path().join("reference")).expect("a cache");
    let logps = cache.flatten().next().expect("a reference").path();
    files.push((LOGPS, std::fs::read(logps).expect("reference log-probs")));
    (Mutex::new(Saved { run, identity }), Directory(files))
});

fn configuration(output: &Path) -> Config {
    let model = golden("models/llama");
    let rows = golden("data/pairs.jsonl");
    let text = format!(
        r#"
        [model]
        path = "{}"
        [lora]
        rank = 1
        targets = ["q_proj"]
        [[data]]
        name = "pairs"
        files = ["{}"]
        eval_fraction = 0.5
        adapter = "preferences"
        objective = "una-pairwise"
        [train]
        output = "{output}"
        reference_cache = "{output}/reference"
        steps = 2
        batch = 1
        save_every = 2
        "#,
        model.display(),
        rows.display(),
        output = output.display()
    );
    Config::parse(&text, &[]).expect("a valid configuration")
}

fn run(input: &[u8]) {
    // Whether it is refused is not the question here.
    let _ = resume(input);
}

/// The position that a checkpoint gives back.
fn resume(input: &[u8]) -> uft::Result<Position> {
    let (saved, files) = &*SAVED;
    let mut saved = saved.lock().expect("no earlier input has panicked");
    let Saved { run, identity } = &mut *saved;
    let output = scratch();
    let dir = output.path().join(NAME);
    std::fs::create_dir(&dir).expect("a temporary folder");
    files.write(&dir, input);

    let _ = checkpoint::newest(output.path());
    let _ = checkpoint::expect(&dir, identity);
    let (_, logps) = files.0.iter().find(|(name, _)| *name == LOGPS).expect("it is there");
    let hash = logps[8..40].try_into().expect("a file begins with its reference's hash");
    let _ = ReferenceLogps::open(&dir.join(LOGPS), hash);
    let _ = Logs::open(output.path(), Some(&dir)).and_then(|logs| logs.history());
    Ok(checkpoint::restore(&dir, run)?.position)
}

fn seeds() -> Vec<Vec<u8>> {
    let (_, files) = &*SAVED;
    let mut seeds = files.seeds();
    let state = files.0.iter().find(|(name, _)| *name == "uft_state.json").map(|(_, bytes)| bytes);
    let state = String::from_utf8(state.expect("it is there").clone()).expect("JSON is text");
    for (key, from) in [("stage", 0), ("step", 2), ("steps", 2), ("updates", 2)] {
        let (old, new) = (format!("\"{key}\": {from}"), format!("\"{key}\": 9223372036854775807"));
        assert!(state.contains(&old), "{state}");
        seeds.push(files.seed("uft_state.json", &state.replace(&old, &new)));
    }
    let manifest = r#"{"files": {"/dev/zero": [1, ""], "../../../../etc/passwd": [1, ""]}}"#;
    seeds.push(files.seed("manifest.json", manifest));
    seeds.push(files.seed("metrics.jsonl", r#"{"loss": 1.0}"#));
    seeds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_that_the_run_never_has_is_refused() {
        let whole = resume(&seeds()[0]).expect("the checkpoint as it was saved");
        assert_eq!((whole.stage, whole.step, whole.steps), (0, 2, 2));
        let changed = |seed: &Vec<u8>| String::from_utf8_lossy(seed).contains(NUMBERS[5]);
        let refused: Vec<_> = seeds().into_iter().filter(changed).map(|s| resume(&s)).collect();
        assert_eq!(refused.len(), 4);
        for result in refused {
            let message = result.expect_err("no run goes so far").message;
            assert!(message.contains("the run has no such position"), "{message}");
        }
    }
}

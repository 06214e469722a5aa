//! Writes that fail, one at a time: one line that says so, whole files, and a run that goes on to
//! the same bits.
//!
//! tests/preload makes the calls fail. By default a sample of them does; `UFT_FAULTS=all` takes
//! every one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use uft_tests::mixed::{Finished, assert_recovered, assert_whole, finished, temporary, write_run};
use uft_tests::{fail, golden, root, succeed};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");

/// Every so many of all faults, without `UFT_FAULTS=all`.
const SAMPLE: usize = 23;

/// What makes the mixed run short, with a checkpoint after every step and one of them kept.
const SHORT: [&str; 4] =
    ["stage[0].steps=2", "stage[1].steps=1", "train.save_every=1", "train.save_total_limit=1"];

fn arguments<'a>(run: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["train", run];
    SHORT.iter().for_each(|set| arguments.extend(["--set", set]));
    arguments.extend(more);
    arguments
}

/// One fault.
#[derive(Clone, Copy, Debug)]
struct Fault {
    /// Number of the call.
    at: usize,
    how: &'static str,
    errno: i32,
    says: &'static str,
}

/// The errors of a full disk, a broken one and one that became read-only, by turns.
const ERRORS: [(&str, i32, &str); 5] = [
    ("once", libc::ENOSPC, "No space left on device"),
    ("onwards", libc::ENOSPC, "No space left on device"),
    ("once", libc::EIO, "Input/output error"),
    ("short", libc::ENOSPC, "No space left on device"),
    ("onwards", libc::EROFS, "Read-only file system"),
];

/// Runs it with the preloaded library.
fn preloaded(run: &str, dir: &Path, variables: &[(&str, &str)]) -> Output {
    let deps = Path::new(UFT).parent().expect("a folder").join("deps");
    let mut command = Command::new(UFT);
    command.args(arguments(run, &[])).current_dir(root()).env("RUST_LOG", "warn");
    command.env_remove("RUST_BACKTRACE").env("LD_PRELOAD", deps.join("libfail_writes.so"));
    command.env("FAIL_BELOW", dir.join("out")).envs(variables.iter().copied());
    command.output().expect("the binary under test runs")
}

/// The calls of a run that write below its output: name and path from there.
fn calls(whole: &Path) -> Vec<(String, String)> {
    let run = write_run(whole, "");
    let log = whole.join("calls");
    let output = preloaded(&run, whole, &[("FAIL_LOG", log.to_str().expect("a path"))]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(&log).expect("the library is loaded and logs calls");
    let out = whole.join("out").display().to_string();
    let call = |line: &str| {
        let mut words = line.splitn(3, ' ').skip(1);
        let name = words.next().expect("a name").to_owned();
        (name, words.next().expect("a path").replace(&out, ""))
    };
    text.lines().map(call).collect()
}

/// Runs it with a fault, checks what it says and leaves, and resumes it. Gives the exit code.
fn survives(whole: &Finished, fault: Fault, call: &(String, String)) -> i32 {
    let what = format!("{fault:?}, {} {}", call.0, call.1);
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "");
    let variables = [
        ("FAIL_AT", &*fault.at.to_string()),
        ("FAIL_HOW", fault.how),
        ("FAIL_ERRNO", &*fault.errno.to_string()),
    ];
    let output = preloaded(&run, &dir, &variables);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let code = output.status.code().unwrap_or_else(|| panic!("{what}: {}", output.status));
    let (warnings, lines): (Vec<&str>, Vec<&str>) =
        stderr.lines().partition(|line| line.starts_with("warn: "));
    match code {
        // What cannot be removed is not needed; everything else that fails ends the run.
        0 => {
            let removal = ["unlinkat", "rename"].contains(&&*call.0);
            assert!(removal && !warnings.is_empty(), "{what}: goes on\n{stderr}");
        }
        1 => {
            assert_eq!(lines.len(), 1, "{what}: {stderr}");
            assert!(lines[0].starts_with("error: ") && lines[0].contains(fault.says), "{stderr}");
            assert!(lines[0].contains(&dir.join("out").display().to_string()), "{what}: {stderr}");
        }
        _ => panic!("{what}: exit code {code}\n{stderr}"),
    }
    let out = dir.join("out");
    assert_whole(&out, &what);
    let saved = !uft::train::checkpoint::all(&out).expect("the output can be read").is_empty();
    let says = stderr.contains("--resume goes on from it");
    assert!(code == 0 || says == saved, "{what}: {stderr}");
    succeed(UFT, &arguments(&run, &["--resume"]));
    assert_recovered(whole, &out, &what);
    code
}

#[test]
fn every_write_may_fail_once() {
    let (_guard, dir) = temporary();
    let calls = calls(&dir);
    let whole = finished(&dir.join("out"));
    for part in
        ["metrics.jsonl", "eval.jsonl", "manifest", "/stage-first", "/adapter_config", ".logps"]
    {
        assert!(calls.iter().any(|(_, path)| path.contains(part)), "no write to {part}");
    }
    let mut cases: Vec<Fault> = (0..calls.len())
        .flat_map(|call| ERRORS.map(|(how, errno, says)| Fault { at: call + 1, how, errno, says }))
        .filter(|fault| fault.how != "short" || calls[fault.at - 1].0 == "write")
        .collect();
    if !std::env::var("UFT_FAULTS").is_ok_and(|which| which == "all") {
        cases = cases.into_iter().step_by(SAMPLE).collect();
    }
    for (how, errno, _) in ERRORS {
        assert!(
            cases.iter().any(|fault| (fault.how, fault.errno) == (how, errno)),
            "{how} {errno}"
        );
    }
    let (next, codes) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let work = || {
        while let Some(fault) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let code = survives(&whole, *fault, &calls[fault.at - 1]);
            *codes.lock().expect("a test that failed").entry(code).or_insert(0) += 1;
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2).map(|_| scope.spawn(work)).collect();
        workers.into_iter().for_each(|worker| worker.join().expect("every fault is survived"));
    });
    let (writes, faults) = (calls.len(), cases.len());
    println!("{faults} faults of {writes} calls; exit codes: {:?}", codes.into_inner());
}

/// A power cut undoes what is not synced: before a file or a checkpoint gets its name, all of it must
/// be on the disk, and afterwards the folder that holds the name.
#[test]
fn what_has_its_name_is_on_the_disk() {
    let (_guard, dir) = temporary();
    let mut unsynced = BTreeSet::new();
    let mut named = 0;
    for (call, path) in calls(&dir) {
        // A record of reference log-probs has its own hash, and can be computed again.
        if path.ends_with(".logps") {
            continue;
        }
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", ""));
        match call.as_str() {
            "open64" | "write" => drop(unsynced.insert(path)),
            "fsync" => drop(unsynced.remove(&path)),
            "mkdir" => drop(unsynced.insert(folder.to_owned())),
            "rename" if !name.ends_with(".removed") => {
                let partial = format!("{folder}/.{name}.partial");
                let early = unsynced.iter().find(|path| path.starts_with(&partial));
                assert!(early.is_none(), "{early:?} is not synced when it becomes {path}");
                unsynced.insert(folder.to_owned());
                named += 1;
            }
            // Removals may come undone.
            "rename" | "unlink" | "unlinkat" | "rmdir" => {}
            _ => panic!("{call} {path}: another way to write"),
        }
    }
    // A file before it was renamed is not there any more; of the logs a checkpoint holds a copy.
    unsynced.retain(|path| dir.join("out").join(path.trim_start_matches('/')).exists());
    assert_eq!(Vec::from_iter(&unsynced), ["/eval.jsonl", "/metrics.jsonl"]);
    assert!(named > 40, "{named} files and folders got their names");
}

#[test]
fn an_output_that_cannot_be_written_is_said_before_training() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "");
    let file = dir.join("file");
    std::fs::write(&file, "").expect("written");
    let below = format!("train.output={}", file.join("out").display());
    let stderr = fail(UFT, 1, &["train", &run, "--set", &below]);
    assert!(stderr.contains("file/out: cannot be read: Not a directory"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");

    let read_only = [("FAIL_AT", "1"), ("FAIL_HOW", "onwards"), ("FAIL_ERRNO", "30")];
    let output = preloaded(&run, &dir, &read_only);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("make it writable") && stderr.lines().count() == 1, "{stderr}");
    assert!(!dir.join("out").exists());
}

/// A copy of the model that a test may damage.
fn own_model(dir: &Path) -> PathBuf {
    let model = dir.join("model");
    uft_tests::mixed::copy(&golden("models/qwen2"), &model);
    model
}

#[test]
fn files_that_vanish_or_are_cut_off_are_named() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "");
    let model = own_model(&dir);
    let data = dir.join("demos.jsonl");
    std::fs::copy(golden("data/demos.jsonl"), &data).expect("a copy");
    let set = [
        format!("model.path={}", model.display()),
        format!("data[demos].files=[\"{}\"]", data.display()),
    ];
    let refused = |code: i32, says: &[&str]| {
        let more = ["--set", &set[0], "--set", &set[1], "--resume"];
        let stderr = fail(UFT, code, &arguments(&run, &more));
        assert!(says.iter().all(|part| stderr.contains(part)), "{stderr} does not say {says:?}");
    };
    let cut = |path: &Path| {
        let bytes = std::fs::read(path).expect("read");
        std::fs::write(path, &bytes[..bytes.len() - 20]).expect("written");
        bytes
    };
    // A run with a checkpoint, which none of this may touch.
    let more = ["--set", &set[0], "--set", &set[1], "--set", "stage[1].steps=1"];
    succeed(UFT, &arguments(&run, &more));
    let whole = finished(&dir.join("out"));

    let rows = cut(&data);
    refused(3, &["demos.jsonl:", "not valid JSON"]);
    std::fs::remove_file(&data).expect("removed");
    refused(3, &["demos.jsonl", "cannot be read"]);
    std::fs::write(&data, rows).expect("written");

    let weights = model.join("model.safetensors");
    let bytes = cut(&weights);
    refused(5, &["model.safetensors", "was it cut off?"]);
    std::fs::remove_file(&weights).expect("removed");
    refused(5, &["neither model.safetensors nor"]);
    std::fs::write(&weights, bytes).expect("written");

    let tokenizer = model.join("tokenizer.json");
    let bytes = cut(&tokenizer);
    refused(3, &["tokenizer.json"]);
    std::fs::remove_file(&tokenizer).expect("removed");
    refused(3, &["tokenizer.json"]);
    std::fs::write(&tokenizer, bytes).expect("written");

    succeed(UFT, &arguments(&run, &["--set", &set[0], "--set", &set[1], "--resume"]));
    assert_recovered(&whole, &dir.join("out"), "with everything in its place again");
}

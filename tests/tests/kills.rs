//! Runs that are ended at random moments, and resumed to the same bits.
//!
//! `UFT_KILLS` is how many, 10 by default; `UFT_KILLS_SEED` another seed.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use uft_tests::mixed::{
    assert_recovered, assert_same, assert_whole, finished, hidden, temporary, write_run,
};
use uft_tests::{golden, root, succeed};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");

/// After this long the handlers of signals are in place, on a slow machine too.
const STARTED: Duration = Duration::from_millis(150);

/// A run that ended before the signal came, which is no kill.
const OVER: &str = "over before the signal";

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// SplitMix64: moments that are the same in every run of the test.
struct Random(u64);

impl Random {
    /// In [0, 1).
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn start(arguments: &[impl AsRef<OsStr>]) -> Child {
    Command::new(UFT)
        .args(arguments)
        .current_dir(root())
        .env("RUST_LOG", "warn")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary under test runs")
}

fn send(child: &Child, signal: i32) {
    // SAFETY: the child is not waited for yet, so its id is its own.
    unsafe { libc::kill(child.id() as i32, signal) };
}

/// Ends a run `after` its start, and says in what it was met.
fn interrupt(run: &str, out: &Path, after: Duration, signal: i32) -> &'static str {
    let child = start(&["train", run, "--resume"]);
    std::thread::sleep(after);
    send(&child, signal);
    let sent = Instant::now();
    let output = child.wait_with_output().expect("the child ends");
    let took = sent.elapsed();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let adapter = out.join("adapter_config.json").exists();
    let expected = match signal {
        libc::SIGTERM => 143,
        _ => 130,
    };
    match (output.status.code(), output.status.signal()) {
        (Some(0), _) => OVER,
        (None, Some(libc::SIGKILL)) if !hidden(out).is_empty() => "saving (SIGKILL)",
        (None, Some(libc::SIGKILL)) if adapter => "the last report (SIGKILL)",
        (None, Some(libc::SIGKILL)) => "loading or training (SIGKILL)",
        // A process that has not begun to run cannot have an exit code of its own.
        (None, Some(_)) if after < STARTED => "the start of the process",
        (Some(code), None) if code == expected => {
            assert!(took < Duration::from_secs(5), "it took {took:?} to end");
            match stderr.trim() {
                "" => "loading or the first evaluation",
                line if line.contains("training is over") => "the last report",
                line if line.contains("the state after step") => "training",
                line => panic!("an unknown end: {line}"),
            }
        }
        _ => panic!("signal {signal} after {after:?}: {}: {stderr}", output.status),
    }
}

#[test]
fn killed_at_any_moment_and_resumed_it_is_the_same_run() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "");
    let timed = |arguments: &[&str]| {
        let started = Instant::now();
        succeed(UFT, arguments);
        started.elapsed()
    };
    timed(&["train", &run]);
    let whole = finished(&dir.join("out"));
    let (_guard, again) = temporary();
    let length = timed(&["train", &write_run(&again, "")]);
    let mut random = Random(number("UFT_KILLS_SEED", 1));
    let mut met = BTreeMap::new();
    let (mut kills, mut runs) = (0, 0);
    while kills < number("UFT_KILLS", 10) {
        let (_guard, other) = temporary();
        let run = write_run(&other, "");
        let out = other.join("out");
        // One kill, or several in a row before the run gets to its end.
        let row = 1 + (random.next() * random.next() * 5.0) as u64;
        for _ in 0..row {
            let signal = match kills % 4 {
                0 => libc::SIGTERM,
                2 => libc::SIGINT,
                _ => libc::SIGKILL,
            };
            let after = length.mul_f64(random.next());
            let what = interrupt(&run, &out, after, signal);
            *met.entry(what).or_insert(0) += 1;
            assert_whole(&out, &format!("signal {signal} after {after:?}"));
            if what == OVER {
                break;
            }
            kills += 1;
        }
        runs += 1;
        succeed(UFT, &["train", &run, "--resume"]);
        assert_recovered(&whole, &out, &format!("kill {kills}, {row} in a row"));
    }
    println!("{kills} kills in {runs} runs of {length:?} met them in: {met:#?}");
}

/// Waits until a run has done some steps.
fn wait_for(child: &mut Child, out: &Path, steps: usize) {
    let metrics = out.join("metrics.jsonl");
    let started = Instant::now();
    let done = || std::fs::read_to_string(&metrics).map_or(0, |text| text.lines().count());
    while done() < steps && child.try_wait().expect("a child").is_none() {
        assert!(started.elapsed() < Duration::from_secs(120), "the run does not get on");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_second_signal_ends_it_at_once_and_leaves_whole_files() {
    let (_guard, dir) = temporary();
    let run = write_run(&dir, "");
    succeed(UFT, &["train", &run]);
    let whole = finished(&dir.join("out"));
    for (steps, second, code) in [(2, libc::SIGINT, 130), (6, libc::SIGTERM, 143)] {
        let (_guard, other) = temporary();
        let run = write_run(&other, "");
        let out = other.join("out");
        let mut child = start(&["train", &run]);
        wait_for(&mut child, &out, steps);
        // The first one is saved for; what the second one meets is saving, most of the time.
        send(&child, libc::SIGINT);
        send(&child, second);
        let status = child.wait().expect("the child ends");
        // The two may come together as one, or the first one's work be done before the second comes.
        let codes = [Some(code), Some(130)];
        assert!(codes.contains(&status.code()), "{status}");
        assert_whole(&out, "two signals");
        succeed(UFT, &["train", &run, "--resume"]);
        assert_same(&whole, &finished(&out), "two signals");
    }
}

#[test]
fn an_evaluation_that_was_interrupted_is_made_up_for() {
    let (_guard, dir) = temporary();
    // So many held-out rows that a signal after the step before cannot miss their evaluation.
    let rows = format!("\"{}\"", golden("data/pairs.jsonl").display());
    let held_out = format!("data[pairs].eval_files=[{}]", vec![rows; 60].join(", "));
    let set = [&held_out, "stage[0].steps=3", "stage[1].steps=1"].map(|set| ["--set", set]);
    let train = |run: &str, resume: &[&str]| {
        let arguments = [&["train", run], set.as_flattened(), resume].concat();
        arguments.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let succeed = |arguments: Vec<String>| {
        uft_tests::succeed(UFT, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let run = write_run(&dir, "");
    succeed(train(&run, &[]));
    let whole = finished(&dir.join("out"));

    let (_guard, other) = temporary();
    let run = write_run(&other, "");
    let out = other.join("out");
    let mut child = start(&train(&run, &[]));
    wait_for(&mut child, &out, 3);
    send(&child, libc::SIGTERM);
    let output = child.wait_with_output().expect("the child ends");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(143), "{stderr}");
    assert!(stderr.contains("the state after step 3 is in"), "{stderr}");
    let evaluations = std::fs::read(out.join("checkpoint-3/eval.jsonl")).expect("a log");
    assert!(evaluations.is_empty(), "the evaluation after step 3 was not interrupted");
    succeed(train(&run, &["--resume"]));
    assert_recovered(&whole, &out, "SIGTERM in the evaluation");
}

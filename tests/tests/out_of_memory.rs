//! A run that gets no more memory ends in a line and a code of its own, and goes on where there is
//! more.

use std::process::{Command, Stdio};
use uft_tests::mixed::{assert_recovered, assert_whole, copy, finished, temporary, write_run};
use uft_tests::{root, succeed};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");

/// Megabytes above what the first stage takes: more than the allocator's own reserves, and far less
/// than what the second stage takes.
const ABOVE: u64 = 100;

/// The second stage's only step is four hundred times as large as the first stage's.
fn arguments<'a>(run: &'a str, batch: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["train", run];
    for set in ["train.micro_tokens=1000000", "stage[1].steps=1", batch] {
        arguments.extend(["--set", set]);
    }
    arguments.extend(more);
    arguments
}

/// The most address space that a run had, in megabytes.
fn peak(arguments: &[&str]) -> u64 {
    let mut child = Command::new(UFT)
        .args(arguments)
        .current_dir(root())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary under test runs");
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().expect("a child").is_none() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmPeak:"));
        let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        peak = kilobytes.map_or(peak, |kilobytes| kilobytes / 1024);
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert!(peak > 0, "{status} says nothing");
    peak
}

#[test]
fn out_of_memory_is_one_line_with_its_code_and_resumed_the_run_is_the_same() {
    let (_guard, small) = temporary();
    let limit = ABOVE + peak(&arguments(&write_run(&small, ""), "stage[1].batch=6", &[]));

    let large = "stage[1].batch=2400";
    let (_guard, dir) = temporary();
    succeed(UFT, &arguments(&write_run(&dir, ""), large, &[]));
    let whole = finished(&dir.join("out"));

    // A run that has come to its sixth step.
    let (_guard, other) = temporary();
    let run = write_run(&other, "");
    let out = other.join("out");
    for name in ["checkpoint-3", "checkpoint-6"] {
        copy(&dir.join("out").join(name), &out.join(name));
    }
    let output = Command::new("sh")
        .args(["-c", &format!("ulimit -v {} && exec \"$@\"", limit * 1024), "sh", UFT])
        .args(arguments(&run, large, &["--resume"]))
        .current_dir(root())
        .env("RUST_LOG", "warn")
        .output()
        .expect("a shell");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(7), "{}, {limit} MB: {stderr}", output.status);
    assert!(stderr.starts_with("error: out of memory: "), "{stderr}");
    assert!(stderr.contains("micro_tokens") && stderr.lines().count() == 1, "{stderr}");
    assert_whole(&out, "out of memory");
    assert!(out.join("checkpoint-6").is_dir());
    succeed(UFT, &arguments(&run, large, &["--resume"]));
    assert_recovered(&whole, &out, "after it ran out of memory");
}

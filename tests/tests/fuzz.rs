//! Inputs from outside under seeded mutations: no panic, no hang, no allocation out of proportion.
//! libFuzzer drives the same functions for longer, see docs/reliability.md.

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, mpsc};
use std::time::Duration;
use uft_tests::fuzz::mutate::{Random, mutated};
use uft_tests::fuzz::{TARGETS, Target};

/// Longest time for one input.
const LONGEST: Duration = Duration::from_secs(10);
/// Most bytes allocated at once for one input, beside [`PER_BYTE`] for each of its own.
const MOST_BYTES: usize = 64 << 20;
const PER_BYTE: usize = 1000;
/// A template may use up its fuel, worth 64 bytes a unit, in strings that double.
const TEMPLATE_BYTES: usize = 256 << 20;

/// Counts what is allocated in this process.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grown(by: usize) {
    PEAK.fetch_max(NOW.fetch_add(by, Relaxed) + by, Relaxed);
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        NOW.fetch_sub(layout.size(), Relaxed);
        grown(size);
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One target at a time, so that what is counted is its own.
static TURN: Mutex<()> = Mutex::new(());

/// Runs the seeds and `count` mutations of them.
fn drive(name: &str, count: u64, most_bytes: usize) {
    let _turn = TURN.lock().unwrap_or_else(|earlier| earlier.into_inner());
    let target = TARGETS.iter().find(|t| t.name == name).expect("a target");
    let seeds = (target.seeds)();
    let mut inputs = seeds.clone();
    let mut random = Random::new(1);
    inputs.extend((0..count).map(|_| mutated(&seeds, target.tokens, &mut random)));

    let (sender, results) = mpsc::channel();
    let theirs = inputs.clone();
    // A thread of its own, with the stack of the threads that rows are read on.
    std::thread::spawn(move || {
        for input in &theirs {
            if sender.send(one(target, input)).is_err() {
                break;
            }
        }
    });
    for input in &inputs {
        let shown = || {
            let text = String::from_utf8_lossy(input);
            format!("{} bytes: {:?}", input.len(), text.chars().take(2000).collect::<String>())
        };
        match results.recv_timeout(LONGEST) {
            Ok(Ok(bytes)) => {
                let most = most_bytes + PER_BYTE * input.len();
                assert!(bytes <= most, "{name}: {bytes} bytes allocated for {}", shown());
            }
            Ok(Err(panicked)) => panic!("{name}: panicked ({panicked}) on {}", shown()),
            Err(_) => panic!("{name}: more than {LONGEST:?} on {}", shown()),
        }
    }
}

/// Runs one input: the most bytes that it had allocated at once, or what it panicked with.
fn one(target: &Target, input: &[u8]) -> Result<usize, String> {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    match catch_unwind(AssertUnwindSafe(|| (target.run)(input))) {
        Ok(()) => Ok(PEAK.load(Relaxed).saturating_sub(before)),
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            Err(text.or_else(|| panic.downcast_ref().cloned()).unwrap_or_default())
        }
    }
}

#[test]
fn config() {
    drive("config", 4000, MOST_BYTES);
}

#[test]
fn records() {
    drive("records", 16_000, MOST_BYTES);
}

#[test]
fn templates() {
    drive("templates", 400, TEMPLATE_BYTES);
}

#[test]
fn tokenizer() {
    drive("tokenizer", 4000, MOST_BYTES);
}

#[test]
fn safetensors() {
    drive("safetensors", 4000, MOST_BYTES);
}

#[test]
fn adapter_config() {
    drive("adapter_config", 4000, MOST_BYTES);
}

#[test]
fn checkpoint() {
    drive("checkpoint", 3000, MOST_BYTES);
}

#[test]
fn plugin_file() {
    drive("plugin_file", 20000, MOST_BYTES);
}

//! How long each kernel takes on a GPU, at the shapes of a training step of Mistral-7B with rank 16 on all linear
//! layers and 16k tokens.
//!
//! ```text
//! cargo run --release -p uft-tests --bin gpu-kernels -- [--device cuda|emulated|emulated-hopper]
//!     [--only TEXT] [--without CASE]… [--seconds S]
//! ```
//!
//! One line of JSON where a case begins, since it may never end, and one of what came of it: what it must at least compute
//! and move, the median of its times in milliseconds by the GPU's events, and what another library would have to do for
//! the same, as `peer`, for tests/gpu/peers.py; then `launches`, what each kernel of it is called, how often it is
//! launched, and its part of the time. A case whose name does not contain TEXT, or is CASE, is left out; each runs for
//! about S seconds. Before every run the level-2 cache is overwritten. Emulated, every case runs once at a small size and
//! has no time: that proves the script.

mod memory_bound;
mod products;
mod sequences;
mod sizes;

use half::bf16;
use sizes::Sizes;
use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};
use uft_kernels::cuda::{DeviceBuffer, Gpu, Plain, Result};

/// Larger than any level-2 cache.
const FLUSHED: usize = 256 << 20;
/// Runs of a case, at least and at most.
const RUNS: std::ops::RangeInclusive<usize> = 5..=200;
/// Runs of which every launch is timed for itself.
const TRACED: usize = 5;
/// Different numbers in what is random; longer operands repeat them, each from another place on.
const NUMBERS: usize = 1 << 20;

/// A case's work and least traffic.
#[derive(Clone, Copy)]
struct Cost {
    /// Floating-point operations.
    flops: usize,
    bytes: usize,
}

struct Bench {
    gpu: Gpu,
    sizes: Sizes,
    only: String,
    without: Vec<String>,
    seconds: f64,
    flush: RefCell<DeviceBuffer<u8>>,
    numbers: Vec<bf16>,
    /// Where the next random operand begins.
    next: Cell<usize>,
}

impl Bench {
    fn wants(&self, case: &str) -> bool {
        case.contains(&self.only) && !self.without.iter().any(|left_out| left_out == case)
    }

    /// Measures `work`. `peer`: JSON of what to compare with.
    fn case(&self, case: &str, peer: &str, cost: Cost, work: impl FnMut() -> Result<()>) {
        if !self.wants(case) {
            return;
        }
        println!(r#"{{"begins":"{case}"}}"#);
        let Cost { flops, bytes } = cost;
        let head = format!(r#"{{"case":"{case}","flops":{flops},"bytes":{bytes},"peer":{peer}"#);
        match self.measured(work) {
            Ok((times, launches)) if times.is_empty() => {
                println!(r#"{head},"ms":null,"runs":1,"launches":{launches}}}"#);
            }
            Ok((times, launches)) => {
                let (first, last) = (times[0], times[times.len() - 1]);
                let (median, runs) = (times[times.len() / 2], times.len());
                println!(
                    r#"{head},"ms":{median:.5},"fastest_ms":{first:.5},"slowest_ms":{last:.5},"runs":{runs},"launches":{launches}}}"#
                );
            }
            Err(error) => println!(r#"{head},"error":"{}"}}"#, escaped(&error.to_string())),
        }
    }

    /// Times of all launches together, and those of each in JSON.
    fn measured(&self, mut work: impl FnMut() -> Result<()>) -> Result<(Vec<f64>, String)> {
        // Compiles, loads and warms up.
        let first = self.gpu.traced(&mut work)?;
        self.gpu.synchronize()?;
        let times = self.times(&mut work)?;
        let mut runs = vec![first];
        if !times.is_empty() {
            runs.clear();
            for _ in 0..TRACED {
                self.gpu.zero(&mut self.flush.borrow_mut())?;
                runs.push(self.gpu.traced(&mut work)?);
            }
        }
        Ok((times, launches(&runs)))
    }

    /// Sorted; empty on a device whose times say nothing.
    fn times(&self, mut work: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
        let mut flush = self.flush.borrow_mut();
        let (start, enough) = (Instant::now(), Duration::from_secs_f64(self.seconds));
        let mut times = Vec::new();
        while times.len() < *RUNS.end() && (times.len() < *RUNS.start() || start.elapsed() < enough)
        {
            self.gpu.zero(&mut flush)?;
            match self.gpu.timed(&mut work)? {
                Some(milliseconds) => times.push(milliseconds),
                None => break,
            }
        }
        times.sort_by(f64::total_cmp);
        Ok(times)
    }
}

/// `[["name", launches, milliseconds], …]` of runs alike, a kernel in the place of its first launch. Its time is that of all its
/// launches, each the median of the runs.
fn launches(runs: &[Vec<(&str, Option<f64>)>]) -> String {
    let mut found: Vec<(&str, usize, f64)> = Vec::new();
    let timed = runs.iter().flatten().all(|(_, time)| time.is_some());
    for (i, &(name, _)) in runs[0].iter().enumerate() {
        let mut times: Vec<f64> = runs.iter().filter_map(|run| run[i].1).collect();
        times.sort_by(f64::total_cmp);
        let median = times.get(times.len() / 2).copied().unwrap_or(0.0);
        match found.iter_mut().find(|(known, ..)| *known == name) {
            Some((_, count, time)) => (*count, *time) = (*count + 1, *time + median),
            None => found.push((name, 1, median)),
        }
    }
    let each = found.into_iter().map(|(name, count, time)| match timed {
        true => format!(r#"["{name}",{count},{time:.5}]"#),
        false => format!(r#"["{name}",{count},null]"#),
    });
    format!("[{}]", each.collect::<Vec<_>>().join(","))
}

/// Memory on the device for operands.
impl Bench {
    fn empty<T: Plain>(&self, len: usize) -> Result<DeviceBuffer<T>> {
        self.gpu.alloc(len)
    }

    /// Normal numbers of unit variance, never zeros: those make a GPU faster than it is.
    fn random(&self, len: usize) -> Result<DeviceBuffer<bf16>> {
        let mut buffer = self.gpu.alloc(len)?;
        let mut done = 0;
        while done < len {
            let first = self.next.get() % NUMBERS;
            self.next.set(first + 7919);
            let count = (NUMBERS - first).min(len - done);
            let piece = &self.numbers[first..first + count];
            self.gpu.upload(piece, &mut buffer[done..done + count])?;
            done += count;
        }
        Ok(buffer)
    }

    fn random_f32(&self, len: usize) -> Result<DeviceBuffer<f32>> {
        let wide: Vec<f32> = self.numbers.iter().map(|x| x.to_f32()).collect();
        let mut buffer = self.gpu.alloc(len)?;
        for first in (0..len).step_by(NUMBERS) {
            let end = len.min(first + NUMBERS);
            self.gpu.upload(&wide[..end - first], &mut buffer[first..end])?;
        }
        Ok(buffer)
    }

    /// `len` numbers below `bound`, scattered over it.
    fn ids(&self, len: usize, bound: usize) -> Vec<u32> {
        (0..len).map(|i| (i * 7919 % bound) as u32).collect()
    }
}

/// Sums of twelve uniforms less six, by a generator that needs no dependency.
fn normal(count: usize) -> Vec<bf16> {
    let mut state = 1u64;
    let mut uniform = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..count).map(|_| bf16::from_f32((0..12).map(|_| uniform()).sum::<f32>() - 6.0)).collect()
}

/// Inside a JSON string.
fn escaped(text: &str) -> String {
    let each = text.chars().map(|c| match c {
        '"' | '\\' => format!("\\{c}"),
        c if c.is_control() => " ".into(),
        c => c.into(),
    });
    each.collect()
}

struct Options {
    device: String,
    only: String,
    without: Vec<String>,
    seconds: f64,
}

fn options() -> std::result::Result<Options, String> {
    let mut options =
        Options { device: "cuda".into(), only: String::new(), without: vec![], seconds: 0.3 };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--device" => options.device = value,
            "--only" => options.only = value,
            "--without" => options.without.push(value),
            "--seconds" => {
                options.seconds = value.parse().map_err(|_| format!("--seconds {value}"))?;
            }
            _ => {
                return Err(format!("{name}: there are --device, --only, --without and --seconds"));
            }
        }
    }
    Ok(options)
}

fn bench(options: &Options) -> std::result::Result<Bench, String> {
    let (gpu, sizes) = match options.device.as_str() {
        "cuda" => (Gpu::open(0), sizes::MISTRAL_7B),
        "emulated" => (Gpu::emulated(0), sizes::SMALL),
        "emulated-hopper" => (Gpu::emulated_hopper(0), sizes::SMALL_ON_HOPPER),
        other => {
            return Err(format!("--device {other}: there are cuda, emulated and emulated-hopper"));
        }
    };
    let gpu = gpu.map_err(|error| error.to_string())?;
    let bytes = if gpu.is_emulated() { 4096 } else { FLUSHED };
    let flush = RefCell::new(gpu.alloc(bytes).map_err(|error| error.to_string())?);
    let (only, without) = (options.only.clone(), options.without.clone());
    let (seconds, numbers, next) = (options.seconds, normal(NUMBERS), Cell::new(0));
    Ok(Bench { gpu, sizes, only, without, seconds, flush, numbers, next })
}

fn main() {
    let bench = match options().and_then(|options| bench(&options)) {
        Ok(bench) => bench,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(2);
        }
    };
    // What a section cannot set up, it says; the others go on.
    for (name, section) in [
        ("products", products::measure as fn(&Bench) -> Result<()>),
        ("memory bound", memory_bound::measure),
        ("attention", sequences::attention),
        ("head", sequences::head),
    ] {
        if let Err(error) = section(&bench) {
            println!(r#"{{"case":"{name}","error":"{}"}}"#, escaped(&error.to_string()));
        }
    }
}

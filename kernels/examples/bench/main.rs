//! How far each op is from what the machine can do, at the shapes of a 110M-parameter decoder.
//!
//! ```text
//! cargo run --release -p uft-kernels --example bench [section] [rounds]
//! ```
//!
//! The ceiling is the best matrix product seen, so figures compare within one run only. Every op is
//! timed once per round, and the best round counts: on a busy machine the others show the neighbours.

mod layer;

use std::hint::black_box;
use std::time::Instant;
use uft_kernels::attention::{self, Heads};
use uft_kernels::layout::Layout;
use uft_kernels::logprob::{self, Chunk, Head};
use uft_kernels::rope::Rope;
use uft_kernels::{adamw, embedding, matmul, rmsnorm, swiglu};

const T: usize = 3000;
const HIDDEN: usize = 768;
const FFN: usize = 2304;
const RANK: usize = 16;
const VOCAB: usize = 32_000;
const HEADS: Heads = Heads { heads: 12, kv_heads: 4, head_dim: 64 };

struct Op<'a> {
    name: String,
    flops: f64,
    bytes: f64,
    run: Box<dyn FnMut() + 'a>,
    best: f64,
}

#[derive(Default)]
struct Bench<'a> {
    ops: Vec<Op<'a>>,
}

impl<'a> Bench<'a> {
    /// An op with its floating-point operations and the bytes that it must at least move.
    fn add(&mut self, name: &str, flops: usize, floats: usize, run: impl FnMut() + 'a) {
        self.ops.push(Op {
            name: name.to_owned(),
            flops: flops as f64,
            bytes: 4.0 * floats as f64,
            run: Box::new(run),
            best: f64::INFINITY,
        });
    }

    fn measure(&mut self, rounds: usize) {
        let mut ceiling = Ceiling::new();
        for _ in 0..=rounds {
            ceiling.sample();
            for op in &mut self.ops {
                let start = Instant::now();
                (op.run)();
                op.best = op.best.min(start.elapsed().as_secs_f64());
            }
        }
        let rate = |op: &Op| op.flops / op.best / 1e9;
        let ceiling = self.ops.iter().map(rate).fold(ceiling.best, f64::max);
        println!("{} threads, best of {rounds} rounds", rayon::current_num_threads());
        println!("{:42} {:>9} {:>9} {:>6} {:>7}", "op", "ms", "GFLOP/s", "of max", "GB/s");
        for op in &self.ops {
            println!(
                "{:42} {:9.3} {:9.1} {:5.0}% {:7.1}",
                op.name,
                op.best * 1e3,
                rate(op),
                100.0 * rate(op) / ceiling,
                op.bytes / op.best / 1e9
            );
        }
    }
}

/// The rate of a product that fits in the caches, sampled between the ops so that it sees the same
/// machine as they do.
struct Ceiling {
    x: Vec<f32>,
    w: Vec<f32>,
    y: Vec<f32>,
    /// Best GFLOP/s so far.
    best: f64,
}

impl Ceiling {
    const N: usize = 768;

    fn new() -> Self {
        let [x, w] = [1, 2].map(|_| numbers(Self::N * Self::N));
        Self { x, w, y: vec![0.0; Self::N * Self::N], best: 0.0 }
    }

    fn sample(&mut self) {
        const N: usize = Ceiling::N;
        for _ in 0..5 {
            let start = Instant::now();
            matmul::nt(&self.x, &self.w, &mut self.y, N, N, N, 1.0, 0.0);
            let rate = 2.0 * (N * N * N) as f64 / start.elapsed().as_secs_f64() / 1e9;
            self.best = self.best.max(rate);
        }
        black_box(&self.y);
    }
}

/// Numbers between -1 and 1 that need no dependency.
fn numbers(n: usize) -> Vec<f32> {
    let mut state = n as u32 | 1;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(next).collect()
}

fn products(bench: &mut Bench) {
    for (m, k, n) in [
        (T, HIDDEN, HIDDEN),
        (T, HIDDEN, 256),
        (T, HIDDEN, FFN),
        (T, FFN, HIDDEN),
        (T, HIDDEN, RANK),
        (T, RANK, FFN),
        (1, HIDDEN, FFN),
        (1, HIDDEN, VOCAB),
        (4, HIDDEN, FFN),
        (8, HIDDEN, FFN),
    ] {
        let (x, w, mut y) = (numbers(m * k), numbers(n * k), vec![0.0; m * n]);
        let (flops, floats) = (2 * m * k * n, m * k + n * k + m * n);
        bench.add(&format!("nt {m}x{k}x{n}"), flops, floats, move || {
            matmul::nt(&x, &w, &mut y, m, k, n, 1.0, 0.0);
            black_box(&y);
        });
    }
    for (m, n, k) in [
        (T, HIDDEN, HIDDEN),
        (T, 256, HIDDEN),
        (T, FFN, HIDDEN),
        (T, HIDDEN, FFN),
        (T, HIDDEN, RANK),
        (T, RANK, FFN),
    ] {
        let (dy, w, mut dx) = (numbers(m * n), numbers(n * k), vec![0.0; m * k]);
        let (flops, floats) = (2 * m * k * n, m * n + n * k + 2 * m * k);
        bench.add(&format!("nn {m}x{n}x{k} +="), flops, floats, move || {
            matmul::nn(&dy, &w, &mut dx, m, n, k, 1.0, 1.0);
            black_box(&dx);
        });
    }
    for (m, p, q) in
        [(T, FFN, RANK), (T, RANK, FFN), (T, HIDDEN, RANK), (T, RANK, HIDDEN), (T, HIDDEN, HIDDEN)]
    {
        let (a, b, mut c) = (numbers(m * p), numbers(m * q), vec![0.0; p * q]);
        let (flops, floats) = (2 * m * p * q, m * p + m * q + 2 * p * q);
        bench.add(&format!("tn {m}x{p}x{q} +="), flops, floats, move || {
            matmul::tn(&a, &b, &mut c, m, p, q, 1.0, 1.0);
            black_box(&c);
        });
    }
}

/// Attention; `name` says which texts, `pairs` is the number of (query, key) pairs that count.
fn attention_over(bench: &mut Bench, name: &str, layout: Layout, window: Option<usize>) {
    let rows = layout.rows();
    let pairs: usize =
        layout.positions.iter().map(|p| (*p as usize + 1).min(window.unwrap_or(usize::MAX))).sum();
    let product = 2 * pairs * HEADS.heads * HEADS.head_dim;
    let (queries, keys) = (rows * HIDDEN, rows * HEADS.kv_heads * HEADS.head_dim);
    let (q, k, v, dout) = (numbers(queries), numbers(keys), numbers(keys), numbers(queries));
    let (mut out, mut lse) = (vec![0.0; queries], vec![0.0; rows * HEADS.heads]);
    attention::forward(&q, &k, &v, &layout, &HEADS, window, &mut out, &mut lse);
    let (mut dq, mut dk, mut dv) = (vec![0.0; queries], vec![0.0; keys], vec![0.0; keys]);
    let shared = std::rc::Rc::new((q, k, v, dout, layout));
    let (given, saved, saved_lse) = (shared.clone(), out.clone(), lse.clone());
    bench.add(&format!("attention forward {name}"), 2 * product, 2 * (queries + keys), move || {
        let (q, k, v, _, layout) = &*shared;
        attention::forward(q, k, v, layout, &HEADS, window, &mut out, &mut lse);
        black_box(&out);
    });
    bench.add(
        &format!("attention backward {name}"),
        5 * product,
        4 * (queries + keys),
        move || {
            let (q, k, v, dout, layout) = &*given;
            attention::backward(
                dout, q, k, v, &saved, &saved_lse, layout, &HEADS, window, &mut dq, &mut dk,
                &mut dv,
            );
            black_box(&dq);
        },
    );
}

fn attentions(bench: &mut Bench) {
    attention_over(bench, "10 x 300", Layout::new(&vec![(100, vec![200]); 10]), None);
    attention_over(bench, "5 x (115 + 4 x 120)", Layout::new(&vec![(115, vec![120; 4]); 5]), None);
    attention_over(bench, "1 x 3000", Layout::new(&[(0, vec![T])]), None);
    attention_over(bench, "1 x 3000, window 512", Layout::new(&[(0, vec![T])]), Some(512));
    for n in [300, 3000] {
        let width = HEADS.kv_heads * HEADS.head_dim;
        let (q, k, v, mut out) =
            (numbers(HIDDEN), numbers(n * width), numbers(n * width), vec![0.0; HIDDEN]);
        bench.add(&format!("attention decode {n}"), 4 * n * HIDDEN, 2 * n * width, move || {
            attention::decode(&q, &k, &v, n, &HEADS, None, &mut out);
            black_box(&out);
        });
    }
}

fn head(weight: &[f32], vocab: usize) -> Head<'_> {
    let weight = weight.into();
    Head { weight, vocab, hidden: HIDDEN, adapter: None, chunk: Chunk::FUSED }
}

fn heads(bench: &mut Bench) {
    for (n, vocab) in [(2000, VOCAB), (500, 152_000)] {
        let (hidden, weight) = (numbers(n * HIDDEN), numbers(vocab * HIDDEN));
        let targets: Vec<u32> = (0..n as u32).map(|t| t * 7 % vocab as u32).collect();
        let (mut logp, mut unit) = (vec![0.0; n], vec![0.0; n * HIDDEN]);
        let mut chunk = vec![0.0; head(&weight, vocab).chunk_len(n)];
        let mut other_chunk = chunk.clone();
        let shared = std::rc::Rc::new((hidden, weight, targets));
        let given = shared.clone();
        let product = 2 * n * vocab * HIDDEN;
        bench.add(&format!("logprob forward {n} of {vocab}"), product, vocab * HIDDEN, move || {
            let (hidden, weight, targets) = &*shared;
            let head = head(weight, vocab);
            logprob::forward(hidden, targets, &head, &mut chunk, &mut logp);
            black_box(&logp);
        });
        let mut logp = vec![0.0; n];
        bench.add(
            &format!("logprob with gradient {n} of {vocab}"),
            2 * product,
            vocab * HIDDEN,
            move || {
                let (hidden, weight, targets) = &*given;
                let head = head(weight, vocab);
                let chunk = &mut other_chunk;
                logprob::forward_with_gradient(hidden, targets, &head, chunk, &mut logp, &mut unit);
                black_box(&unit);
            },
        );
    }
}

fn elementwise(bench: &mut Bench) {
    let n = T * HIDDEN;
    let (x, w, dy) = (numbers(n), numbers(HIDDEN), numbers(n));
    let (mut y, mut inv_rms) = (vec![0.0; n], vec![0.0; T]);
    rmsnorm::forward(&x, &w, 1e-5, &mut y, &mut inv_rms);
    let (x2, w2, saved, mut dx) = (x.clone(), w.clone(), inv_rms.clone(), vec![0.0; n]);
    bench.add("rmsnorm forward", 4 * n, 2 * n, move || {
        rmsnorm::forward(&x, &w, 1e-5, &mut y, &mut inv_rms);
        black_box(&y);
    });
    bench.add("rmsnorm backward", 8 * n, 4 * n, move || {
        rmsnorm::backward(&dy, &x2, &w2, &saved, &mut dx);
        black_box(&dx);
    });

    let inv_freq = (0..32).map(|i| 1e4f64.powf(-f64::from(i) / 32.0)).collect();
    let rope = Rope::new(inv_freq, 1.0);
    let positions: Vec<u32> = (0..T as u32).map(|t| t % 300).collect();
    let mut q = numbers(n);
    bench.add("rope forward", 3 * n, 2 * n, move || {
        rope.forward(&mut q, HEADS.heads, &positions);
        black_box(&q);
    });

    let n = T * FFN;
    let (gate, up, dout) = (numbers(n), numbers(n), numbers(n));
    let (mut out, mut dgate, mut dup) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
    let (gate2, up2) = (gate.clone(), up.clone());
    bench.add("swiglu forward", 4 * n, 3 * n, move || {
        swiglu::forward(&gate, &up, &mut out);
        black_box(&out);
    });
    bench.add("swiglu backward", 8 * n, 5 * n, move || {
        swiglu::backward(&dout, &gate2, &up2, &mut dgate, &mut dup);
        black_box(&dup);
    });

    let (table, mut out) = (numbers(VOCAB * HIDDEN), vec![0.0; T * HIDDEN]);
    let ids: Vec<u32> = (0..T as u32).map(|t| t * 977 % VOCAB as u32).collect();
    bench.add("embedding gather", 0, 2 * T * HIDDEN, move || {
        embedding::gather(&table, &ids, &mut out);
        black_box(&out);
    });

    let n = 3_000_000;
    let (mut param, grad, mut m, mut v) = (numbers(n), numbers(n), vec![0.0; n], vec![0.0; n]);
    let settings = adamw::AdamW {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        step: 1,
        grad_scale: 1.0,
    };
    let grad2 = grad.clone();
    bench.add("adamw step 3M", 12 * n, 7 * n, move || {
        adamw::step(&mut param, &grad, &mut m, &mut v, &settings);
        black_box(&param);
    });
    bench.add("adamw norm 3M", 2 * n, n, move || {
        black_box(adamw::norm_squared(&grad2));
    });
}

type Section = fn(&mut Bench);

fn main() {
    let mut arguments = std::env::args().skip(1);
    let section = arguments.next().unwrap_or_else(|| "all".to_owned());
    let rounds = arguments.next().map_or(5, |rounds| rounds.parse().expect("a number of rounds"));
    let sections: [(&str, Section); 4] = [
        ("products", products),
        ("attention", attentions),
        ("heads", heads),
        ("elementwise", elementwise),
    ];
    if section == "ceiling" {
        let mut ceiling = Ceiling::new();
        (0..10 * rounds).for_each(|_| ceiling.sample());
        return println!("products reach {:.1} GFLOP/s", ceiling.best);
    }
    let mut bench = Bench::default();
    for (name, fill) in sections {
        if section == name || section == "all" {
            fill(&mut bench);
        }
    }
    if !bench.ops.is_empty() {
        bench.measure(rounds);
    }
    if section == "layer" || section == "all" {
        layer::measure(rounds);
    }
}

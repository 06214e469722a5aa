//! One decoder layer in the order of a training step.

use crate::{Ceiling, FFN, HEADS, HIDDEN, RANK, T, numbers};
use std::hint::black_box;
use std::time::Instant;
use uft_kernels::attention;
use uft_kernels::layout::Layout;
use uft_kernels::rope::Rope;
use uft_kernels::{matmul, rmsnorm, swiglu};

/// The best time of each piece of a repeated sequence: short enough that some round is undisturbed.
struct Laps {
    laps: Vec<Lap>,
    next: usize,
    since: Instant,
    ceiling: Ceiling,
}

struct Lap {
    name: &'static str,
    flops: usize,
    best: f64,
}

impl Laps {
    fn new() -> Self {
        Self { laps: Vec::new(), next: 0, since: Instant::now(), ceiling: Ceiling::new() }
    }

    fn restart(&mut self) {
        self.ceiling.sample();
        self.next = 0;
        self.since = Instant::now();
    }

    /// The piece since the last call, which took this many floating-point operations.
    fn lap(&mut self, name: &'static str, flops: usize) {
        let seconds = self.since.elapsed().as_secs_f64();
        if self.next == self.laps.len() {
            self.laps.push(Lap { name, flops, best: seconds });
        }
        let lap = &mut self.laps[self.next];
        lap.best = lap.best.min(seconds);
        self.next += 1;
        self.since = Instant::now();
    }

    fn print(&self) {
        let fastest = |lap: &Lap| lap.flops as f64 / lap.best / 1e9;
        let ceiling = self.laps.iter().map(fastest).fold(self.ceiling.best, f64::max);
        let line = |name: &str, laps: &[&Lap]| {
            let seconds: f64 = laps.iter().map(|lap| lap.best).sum();
            let rate = laps.iter().map(|lap| lap.flops).sum::<usize>() as f64 / seconds / 1e9;
            let of_max = 100.0 * rate / ceiling;
            println!("{name:42} {:9.3} {rate:9.1} {of_max:5.0}%", seconds * 1e3);
        };
        let mut names: Vec<&str> = Vec::new();
        for lap in &self.laps {
            if !names.contains(&lap.name) {
                names.push(lap.name);
            }
        }
        println!("\n{:42} {:>9} {:>9} {:>6}", "decoder layer", "ms", "GFLOP/s", "of max");
        for name in names {
            let laps: Vec<&Lap> = self.laps.iter().filter(|lap| lap.name == name).collect();
            line(name, &laps);
        }
        line("all", &self.laps.iter().collect::<Vec<_>>());
    }
}

/// A linear layer with an adapter: weight `[n, k]`, A `[r, k]`, B `[n, r]`.
struct Linear {
    k: usize,
    n: usize,
    weight: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    da: Vec<f32>,
    db: Vec<f32>,
    low: Vec<f32>,
    dlow: Vec<f32>,
}

impl Linear {
    fn new(k: usize, n: usize) -> Self {
        Self {
            k,
            n,
            weight: numbers(n * k),
            a: numbers(RANK * k),
            b: numbers(n * RANK),
            da: vec![0.0; RANK * k],
            db: vec![0.0; n * RANK],
            low: vec![0.0; T * RANK],
            dlow: vec![0.0; T * RANK],
        }
    }

    fn forward(&mut self, x: &[f32], y: &mut [f32], beta: f32, laps: &mut Laps) {
        matmul::nt(x, &self.weight, y, T, self.k, self.n, 0.01, beta);
        laps.lap("weights forward", 2 * T * self.k * self.n);
        matmul::nt(x, &self.a, &mut self.low, T, self.k, RANK, 0.01, 0.0);
        laps.lap("x·Aᵀ", 2 * T * self.k * RANK);
        matmul::nt(&self.low, &self.b, y, T, RANK, self.n, 0.01, 1.0);
        laps.lap("y += u·Bᵀ", 2 * T * RANK * self.n);
    }

    fn backward(&mut self, x: &[f32], dy: &[f32], dx: &mut [f32], beta: f32, laps: &mut Laps) {
        matmul::nn(dy, &self.weight, dx, T, self.n, self.k, 0.01, beta);
        laps.lap("weights backward", 2 * T * self.n * self.k);
        matmul::nn(dy, &self.b, &mut self.dlow, T, self.n, RANK, 0.01, 0.0);
        laps.lap("du = dy·B", 2 * T * self.n * RANK);
        matmul::nn(&self.dlow, &self.a, dx, T, RANK, self.k, 0.01, 1.0);
        laps.lap("dx += du·A", 2 * T * RANK * self.k);
        matmul::tn(dy, &self.low, &mut self.db, T, self.n, RANK, 0.01, 1.0);
        laps.lap("dB += dyᵀ·u", 2 * T * self.n * RANK);
        matmul::tn(&self.dlow, x, &mut self.da, T, RANK, self.k, 0.01, 1.0);
        laps.lap("dA += duᵀ·x", 2 * T * RANK * self.k);
    }
}

/// Forward and backward of one decoder layer in the order of a training step, all linear layers with
/// adapters: what caches hold is then as it will be, and the figure is the one that matters.
pub fn measure(rounds: usize) {
    let kv_width = HEADS.kv_heads * HEADS.head_dim;
    let layout = Layout::new(&vec![(100, vec![200]); T / 300]);
    let rope = Rope::new((0..32).map(|i| 1e4f64.powf(-f64::from(i) / 32.0)).collect(), 1.0);
    let norm = numbers(HIDDEN);
    let (mut wq, mut wo) = (Linear::new(HIDDEN, HIDDEN), Linear::new(HIDDEN, HIDDEN));
    let (mut wk, mut wv) = (Linear::new(HIDDEN, kv_width), Linear::new(HIDDEN, kv_width));
    let (mut wgate, mut wup) = (Linear::new(HIDDEN, FFN), Linear::new(HIDDEN, FFN));
    let mut wdown = Linear::new(FFN, HIDDEN);
    let pairs: usize = layout.positions.iter().map(|p| *p as usize + 1).sum();

    let wide = || vec![0.0f32; T * HIDDEN];
    let narrow = || vec![0.0f32; T * kv_width];
    let high = || vec![0.0f32; T * FFN];
    let x = numbers(T * HIDDEN);
    let (mut n1, mut n2, mut rms1, mut rms2) = (wide(), wide(), vec![0.0; T], vec![0.0; T]);
    let (mut q, mut k, mut v) = (wide(), narrow(), narrow());
    let (mut out, mut lse, mut middle) = (wide(), vec![0.0; T * HEADS.heads], wide());
    let (mut gate, mut up, mut act, mut y) = (high(), high(), high(), wide());
    let (mut dact, mut dgate, mut dup, mut dn) = (high(), high(), high(), wide());
    let (mut dmiddle, mut dout, mut dq, mut dk, mut dv) =
        (wide(), wide(), wide(), narrow(), narrow());
    let mut dx = wide();
    let dy = numbers(T * HIDDEN);
    let mut laps = Laps::new();
    for _ in 0..=rounds {
        laps.restart();
        rmsnorm::forward(&x, &norm, 1e-5, &mut n1, &mut rms1);
        laps.lap("norms, rope, swiglu, copies", 0);
        wq.forward(&n1, &mut q, 0.0, &mut laps);
        wk.forward(&n1, &mut k, 0.0, &mut laps);
        wv.forward(&n1, &mut v, 0.0, &mut laps);
        rope.forward(&mut q, HEADS.heads, &layout.positions);
        laps.lap("norms, rope, swiglu, copies", 0);
        rope.forward(&mut k, HEADS.kv_heads, &layout.positions);
        laps.lap("norms, rope, swiglu, copies", 0);
        attention::forward(&q, &k, &v, &layout, &HEADS, None, &mut out, &mut lse);
        laps.lap("attention forward", 4 * pairs * HIDDEN);
        middle.copy_from_slice(&x);
        laps.lap("norms, rope, swiglu, copies", 0);
        wo.forward(&out, &mut middle, 1.0, &mut laps);
        rmsnorm::forward(&middle, &norm, 1e-5, &mut n2, &mut rms2);
        laps.lap("norms, rope, swiglu, copies", 0);
        wgate.forward(&n2, &mut gate, 0.0, &mut laps);
        wup.forward(&n2, &mut up, 0.0, &mut laps);
        swiglu::forward(&gate, &up, &mut act);
        laps.lap("norms, rope, swiglu, copies", 0);
        y.copy_from_slice(&middle);
        laps.lap("norms, rope, swiglu, copies", 0);
        wdown.forward(&act, &mut y, 1.0, &mut laps);

        wdown.backward(&act, &dy, &mut dact, 0.0, &mut laps);
        swiglu::backward(&dact, &gate, &up, &mut dgate, &mut dup);
        laps.lap("norms, rope, swiglu, copies", 0);
        wgate.backward(&n2, &dgate, &mut dn, 0.0, &mut laps);
        wup.backward(&n2, &dup, &mut dn, 1.0, &mut laps);
        dmiddle.copy_from_slice(&dy);
        laps.lap("norms, rope, swiglu, copies", 0);
        rmsnorm::backward(&dn, &middle, &norm, &rms2, &mut dmiddle);
        laps.lap("norms, rope, swiglu, copies", 0);
        wo.backward(&out, &dmiddle, &mut dout, 0.0, &mut laps);
        attention::backward(
            &dout, &q, &k, &v, &out, &lse, &layout, &HEADS, None, &mut dq, &mut dk, &mut dv,
        );
        laps.lap("attention backward", 10 * pairs * HIDDEN);
        rope.backward(&mut dq, HEADS.heads, &layout.positions);
        laps.lap("norms, rope, swiglu, copies", 0);
        rope.backward(&mut dk, HEADS.kv_heads, &layout.positions);
        laps.lap("norms, rope, swiglu, copies", 0);
        wq.backward(&n1, &dq, &mut dn, 0.0, &mut laps);
        wk.backward(&n1, &dk, &mut dn, 1.0, &mut laps);
        wv.backward(&n1, &dv, &mut dn, 1.0, &mut laps);
        dx.copy_from_slice(&dmiddle);
        laps.lap("norms, rope, swiglu, copies", 0);
        rmsnorm::backward(&dn, &x, &norm, &rms1, &mut dx);
        laps.lap("norms, rope, swiglu, copies", 0);
        black_box((&y, &dx));
    }
    laps.print();
}

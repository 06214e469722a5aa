//! Attention at the sizes of real models: rows that are drawn against f64, all of them written, and two runs with the same
//! bits. Each check runs in the emulation, too, at a size that it gets through.

use super::super::super::tests::visible_rows;
use super::*;
use crate::testing::{Endless, assert_written, hopper_gpu, places};
use rayon::prelude::*;

/// A batch whose numbers are repeated, and what the kernels make of it.
struct Large {
    layout: Layout,
    heads: Heads,
    window: Option<usize>,
    q: Endless,
    k: Endless,
    v: Endless,
    dout: Endless,
    found: Found,
}

/// What row `i` of head `h` comes to; `p` and `ds` for each key that it sees.
struct Row<R> {
    out: Vec<R>,
    lse: R,
    keys: Vec<usize>,
    p: Vec<R>,
    ds: Vec<R>,
}

impl Large {
    /// By the portable kernels, and by Hopper's where the device has them.
    fn both(gpu: &Gpu, layout: &Layout, heads: Heads, window: Option<usize>) -> Vec<Self> {
        let ways = [None, hopper::Tiling::of(gpu, &heads)];
        let ways = ways.into_iter().enumerate().filter(|(i, way)| *i == 0 || way.is_some());
        ways.map(|(_, way)| Self::new(gpu, way, layout.clone(), heads, window)).collect()
    }

    fn new(
        gpu: &Gpu,
        way: Option<hopper::Tiling>,
        layout: Layout,
        heads: Heads,
        window: Option<usize>,
    ) -> Self {
        let schedule = Schedule::of(way, &layout, &heads, window).unwrap();
        let [q, k, v, dout] = [1, 2, 3, 4].map(Endless::new);
        let rows = layout.rows();
        let (queries, keys) = (rows * heads.query_width(), rows * heads.key_width());
        let run = || {
            let on = |x: &Endless, len| x.uploaded(gpu, len).unwrap();
            let (q, k, v, dout) = (on(&q, queries), on(&k, keys), on(&v, keys), on(&dout, queries));
            let room = schedule.backward_room();
            run_by(gpu, &schedule, [&q, &k, &v, &dout], None, room).unwrap()
        };
        let found = run();
        assert!(run() == found, "another run has other bits");
        for (name, x) in
            [("out", &found.out), ("dq", &found.dq), ("dk", &found.dk), ("dv", &found.dv)]
        {
            assert_written(name, x);
        }
        Self { layout, heads, window, q, k, v, dout, found }
    }

    /// Numbers of a head of a row.
    fn head<R: Real>(&self, x: &Endless, width: usize, row: usize, head: usize) -> Vec<R> {
        let (first, d) = (row * width + head * self.heads.head_dim, self.heads.head_dim);
        (first..first + d).map(|i| R::of(x.at(i).to_f64())).collect()
    }

    /// The formulas, with what the kernels round in between.
    fn row<R: Real>(&self, i: usize, h: usize, round: fn(R) -> R) -> Row<R> {
        let (queries, keys) = (self.heads.query_width(), self.heads.key_width());
        let g = h / self.heads.sharing();
        let dot = |a: &[R], b: &[R]| a.iter().zip(b).fold(R::of(0.0), |sum, (a, b)| sum + *a * *b);
        let (q, dout) =
            (self.head::<R>(&self.q, queries, i, h), self.head::<R>(&self.dout, queries, i, h));
        let seen = visible_rows(&self.layout, i, self.window);
        let scale = R::of(1.0 / (self.heads.head_dim as f64).sqrt());
        let scores: Vec<R> =
            seen.iter().map(|&j| dot(&q, &self.head(&self.k, keys, j, g)) * scale).collect();
        let top = scores.iter().copied().fold(scores[0], |a, b| if b > a { b } else { a });
        let sum = scores.iter().fold(R::of(0.0), |sum, s| sum + (*s - top).exp());
        let lse = top + sum.ln();
        let p: Vec<R> = scores.iter().map(|s| (*s - lse).exp()).collect();
        let mut out = vec![R::of(0.0); q.len()];
        for (p, &j) in p.iter().zip(&seen) {
            let v = self.head::<R>(&self.v, keys, j, g);
            out.iter_mut().zip(v).for_each(|(out, v)| *out += round(*p) * v);
        }
        let rounded: Vec<R> = out.iter().map(|x| round(*x)).collect();
        let delta = dot(&dout, &rounded);
        let slope = |(p, &j): (&R, &usize)| {
            round(*p * (dot(&dout, &self.head(&self.v, keys, j, g)) - delta))
        };
        let ds = p.iter().zip(&seen).map(slope).collect();
        Row { out, lse, p: p.into_iter().map(round).collect(), ds, keys: seen }
    }

    /// Rows that are drawn of two heads: out, lse and dq.
    fn queries<R: Real + Send + Sync>(
        &self,
        rows: &[usize],
        round: fn(R) -> R,
    ) -> (Vec<R>, Vec<R>, Vec<R>) {
        let scale = R::of(1.0 / (self.heads.head_dim as f64).sqrt());
        let each = rows.par_iter().flat_map_iter(|&i| self.some_heads().map(move |h| (i, h)));
        let each: Vec<(Vec<R>, R, Vec<R>)> = each
            .map(|(i, h)| {
                let row = self.row(i, h, round);
                let mut dq = vec![R::of(0.0); row.out.len()];
                for (ds, j) in row.ds.iter().zip(row.keys) {
                    let k = self.head::<R>(
                        &self.k,
                        self.heads.key_width(),
                        j,
                        h / self.heads.sharing(),
                    );
                    dq.iter_mut().zip(k).for_each(|(dq, k)| *dq += *ds * k * scale);
                }
                (row.out, row.lse, dq)
            })
            .collect();
        let (mut out, mut lse, mut dq) = (vec![], vec![], vec![]);
        for (o, l, d) in each {
            out.extend(o);
            lse.push(l);
            dq.extend(d);
        }
        (out, lse, dq)
    }

    fn some_heads(&self) -> impl Iterator<Item = usize> + use<> {
        [0, self.heads.heads - 1].into_iter()
    }

    /// Of one key: dk and dv of the first key head, summed over all queries that see it.
    fn key<R: Real + Send + Sync>(&self, j: usize, round: fn(R) -> R) -> [Vec<R>; 2] {
        let (d, queries) = (self.heads.head_dim, self.heads.query_width());
        let scale = R::of(1.0 / (d as f64).sqrt());
        let group = self.layout.groups.iter().find(|group| group.rows().contains(&j)).unwrap();
        let sees =
            |i: &usize| visible_rows(&self.layout, *i, self.window).binary_search(&j).is_ok();
        let rows: Vec<usize> = group.rows().into_par_iter().filter(sees).collect();
        let zero = || [vec![R::of(0.0); d], vec![R::of(0.0); d]];
        let parts: Vec<[Vec<R>; 2]> = rows
            .par_chunks(64)
            .map(|rows| {
                let mut sums = zero();
                for (&i, h) in
                    rows.iter().flat_map(|i| (0..self.heads.sharing()).map(move |h| (i, h)))
                {
                    let row = self.row(i, h, round);
                    let at = row.keys.binary_search(&j).unwrap();
                    let (q, dout) = (
                        self.head::<R>(&self.q, queries, i, h),
                        self.head::<R>(&self.dout, queries, i, h),
                    );
                    for c in 0..d {
                        sums[0][c] += row.ds[at] * q[c] * scale;
                        sums[1][c] += row.p[at] * dout[c];
                    }
                }
                sums
            })
            .collect();
        parts.into_iter().fold(zero(), |mut all, part| {
            for (all, part) in all.iter_mut().zip(part) {
                all.iter_mut().zip(part).for_each(|(all, part)| *all += part);
            }
            all
        })
    }

    /// `keys`: how many keys' gradients are checked; each costs as much as all scores of its text.
    fn check(&self, rows: usize, keys: &[usize]) {
        let rows = places(self.layout.rows(), rows, 5);
        let to_bf16: fn(f32) -> f32 = |x| bf16::from_f32(x).to_f32();
        let (plain, exact) =
            (self.queries::<f32>(&rows, to_bf16), self.queries::<f64>(&rows, |x| x));
        let d = self.heads.head_dim;
        let of = |x: &[bf16]| -> Vec<bf16> {
            let places = rows.iter().flat_map(|&i| self.some_heads().map(move |h| (i, h)));
            let first = places.map(|(i, h)| i * self.heads.query_width() + h * d);
            first.flat_map(|first| x[first..first + d].to_vec()).collect()
        };
        let name = |what: &str| {
            format!("{what}, {} rows {:?} window {:?}", self.layout.rows(), self.heads, self.window)
        };
        assert_accurate_bf16(&name("out"), &of(&self.found.out), &round(&plain.0), &exact.0);
        let lse: Vec<f32> = rows
            .iter()
            .flat_map(|&i| self.some_heads().map(move |h| self.found.lse[i * self.heads.heads + h]))
            .collect();
        assert_accurate(&name("lse"), &lse, &plain.1, &exact.1);
        assert_accurate_bf16(&name("dq"), &of(&self.found.dq), &round(&plain.2), &exact.2);
        for &j in keys {
            let (plain, exact) = (self.key::<f32>(j, to_bf16), self.key::<f64>(j, |x| x));
            let first = j * self.heads.key_width();
            for (what, found, which) in [("dk", &self.found.dk, 0), ("dv", &self.found.dv, 1)] {
                let what = name(&format!("{what} of {j}"));
                let found = &found[first..first + d];
                assert_accurate_bf16(&what, found, &round(&plain[which]), &exact[which]);
            }
        }
    }
}

/// Both ways.
fn check(
    gpu: &Gpu,
    layout: &Layout,
    heads: Heads,
    window: Option<usize>,
    rows: usize,
    keys: &[usize],
) {
    for large in Large::both(gpu, layout, heads, window) {
        large.check(rows, keys);
    }
}

#[test]
fn drawn_rows_agree_with_f64() {
    let heads = Heads { heads: 4, kv_heads: 2, head_dim: 32 };
    let pair = Layout::new(&[(100, vec![70, 40])]);
    check(&gpu(1), &pair, heads, None, 12, &[0, 99, 150]);
    check(&gpu(1), &Layout::new(&[(0, vec![200])]), heads, Some(70), 12, &[0, 120]);
    let heads = Heads { head_dim: 64, ..heads };
    check(&hopper_gpu(1), &pair, heads, None, 12, &[0, 99, 150]);
}

/// Mistral-7B's heads.
const HEADS_OF_7B: Heads = Heads { heads: 32, kv_heads: 8, head_dim: 128 };

#[test]
#[ignore = "needs a GPU"]
fn texts_of_16k_and_32k_tokens_agree_with_f64() {
    for tokens in [16_384, 32_768] {
        // A key near the end is seen by few.
        let layout = Layout::new(&[(0, vec![tokens])]);
        check(&gpu(1), &layout, HEADS_OF_7B, None, 24, &[tokens - 500]);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_window_over_16k_tokens_agrees_with_f64() {
    let layout = Layout::new(&[(0, vec![16_384])]);
    check(&gpu(1), &layout, HEADS_OF_7B, Some(1024), 24, &[3000, 16_000]);
}

#[test]
#[ignore = "needs a GPU"]
fn pairs_with_shared_prompts_agree_with_f64() {
    let layout = Layout::new(&vec![(1024, vec![1024; 2]); 5]);
    check(&gpu(1), &layout, HEADS_OF_7B, None, 24, &[1023, 3 * 1024 - 1, 5000]);
}

/// Heads of 64, as many to a key head as Qwen2.5-0.5B has.
#[test]
#[ignore = "needs a GPU"]
fn heads_of_64_over_16k_tokens_agree_with_f64() {
    let heads = Heads { heads: 14, kv_heads: 2, head_dim: 64 };
    check(&gpu(1), &Layout::new(&[(0, vec![16_384])]), heads, None, 24, &[15_000]);
}

use super::super::tests::{Reference, ragged, rounded_reference};
use super::*;
use crate::layout::Layout;
use crate::testing::{
    Real, assert_accurate, assert_accurate_bf16, cast, error, gpu, random_bf16, round, widen,
};

mod faults;
mod full_size;

/// One batch.
pub(super) struct Case {
    pub layout: Layout,
    pub heads: Heads,
    pub window: Option<usize>,
    pub q: Vec<bf16>,
    pub k: Vec<bf16>,
    pub v: Vec<bf16>,
    pub dout: Vec<bf16>,
}

/// What the kernels make of it.
#[derive(PartialEq)]
pub(super) struct Found {
    pub out: Vec<bf16>,
    pub lse: Vec<f32>,
    pub dq: Vec<bf16>,
    pub dk: Vec<bf16>,
    pub dv: Vec<bf16>,
}

impl Case {
    pub fn new(layout: Layout, heads: Heads, window: Option<usize>) -> Self {
        let rows = layout.rows();
        let (queries, keys) = (rows * heads.query_width(), rows * heads.key_width());
        // Scores with a spread of a few units, as after training.
        let q: Vec<f32> = widen(&random_bf16(queries, 1)).iter().map(|x| 2.0 * x).collect();
        let [k, v, dout] =
            [(keys, 2), (keys, 3), (queries, 4)].map(|(n, seed)| random_bf16(n, seed));
        Self { layout, heads, window, q: round(&q), k, v, dout }
    }

    /// Rows `rows` of this batch as a batch of their own.
    pub fn part(&self, layout: Layout, rows: std::ops::Range<usize>) -> Self {
        assert_eq!(layout.rows(), rows.len());
        let pick = |x: &[bf16], width: usize| x[rows.start * width..rows.end * width].to_vec();
        let (queries, keys) = (self.heads.query_width(), self.heads.key_width());
        Self {
            layout,
            q: pick(&self.q, queries),
            k: pick(&self.k, keys),
            v: pick(&self.v, keys),
            dout: pick(&self.dout, queries),
            ..*self
        }
    }

    fn run(&self, seed: u64) -> Found {
        self.run_on(&gpu(seed)).unwrap_or_else(|error| panic!("{error}"))
    }

    /// By the portable kernels, whatever the device.
    fn run_on(&self, gpu: &Gpu) -> Result<Found> {
        self.run_by(gpu, &self.schedule(None)?)
    }

    pub fn run_by(&self, gpu: &Gpu, schedule: &Schedule) -> Result<Found> {
        self.run_with(gpu, schedule, None, schedule.backward_room())
    }

    /// With room for so many numbers, and with q and k that were turned.
    pub fn run_with(
        &self,
        gpu: &Gpu,
        schedule: &Schedule,
        turned: Option<Turned>,
        room: usize,
    ) -> Result<Found> {
        let [q, k, v, dout] = [&self.q, &self.k, &self.v, &self.dout].map(|x| gpu.uploaded(x));
        run_by(gpu, schedule, [&q?, &k?, &v?, &dout?], turned, room)
    }

    pub fn schedule(&self, hopper: Option<hopper::Tiling>) -> Result<Schedule> {
        Schedule::of(hopper, &self.layout, &self.heads, self.window)
    }

    pub fn reference<R: Real>(&self, round: fn(R) -> R) -> Reference<R> {
        let inputs = [&self.q, &self.k, &self.v, &self.dout].map(|x| cast::<R>(&widen(x)));
        let [q, k, v, dout] = &inputs;
        rounded_reference([q, k, v, dout], &self.layout, &self.heads, self.window, round)
    }

    #[track_caller]
    fn check(&self, seed: u64) {
        self.assert_accurate(&self.run(seed));
    }

    #[track_caller]
    pub fn assert_accurate(&self, found: &Found) {
        let plain = self.reference::<f32>(|x| bf16::from_f32(x).to_f32());
        let exact = self.reference::<f64>(|x| x);
        let name = |what: &str| format!("{what} {:?} window {:?}", self.heads, self.window);
        assert_accurate_bf16(&name("out"), &found.out, &round(&plain.out), &exact.out);
        assert_accurate(&name("lse"), &found.lse, &plain.lse, &exact.lse);
        assert_accurate_bf16(&name("dq"), &found.dq, &round(&plain.dq), &exact.dq);
        assert_accurate_bf16(&name("dk"), &found.dk, &round(&plain.dk), &exact.dk);
        assert_accurate_bf16(&name("dv"), &found.dv, &round(&plain.dv), &exact.dv);
    }
}

/// Forward and backward of `[q, k, v, dout]`.
fn run_by(
    gpu: &Gpu,
    schedule: &Schedule,
    [q, k, v, dout]: [&DeviceSlice<bf16>; 4],
    turned: Option<Turned>,
    room: usize,
) -> Result<Found> {
    let tables = gpu.uploaded(schedule.numbers())?;
    let (mut out, mut dq) = (gpu.alloc(q.len())?, gpu.alloc(q.len())?);
    let (mut dk, mut dv) = (gpu.alloc(k.len())?, gpu.alloc(k.len())?);
    let statistics = schedule.rows * schedule.heads.heads;
    let (mut lse, mut delta) = (gpu.alloc(statistics)?, gpu.alloc(statistics)?);
    let mut room = gpu.alloc(room)?;
    forward(gpu, q, k, v, schedule, &tables, &mut out, &mut lse)?;
    backward(
        gpu, dout, q, k, v, &out, &lse, schedule, &tables, turned, &mut delta, &mut room, &mut dq,
        &mut dk, &mut dv,
    )?;
    Ok(Found {
        out: gpu.downloaded(&out)?,
        lse: gpu.downloaded(&lse)?,
        dq: gpu.downloaded(&dq)?,
        dk: gpu.downloaded(&dk)?,
        dv: gpu.downloaded(&dv)?,
    })
}

/// Every head_dim has its own tiles: 128 rows a block or 64, permuted in two, four or eight steps, padded or not.
const HEADS: [Heads; 10] = [
    Heads { heads: 4, kv_heads: 2, head_dim: 8 },
    Heads { heads: 2, kv_heads: 2, head_dim: 12 },
    Heads { heads: 4, kv_heads: 2, head_dim: 16 },
    Heads { heads: 6, kv_heads: 2, head_dim: 32 },
    Heads { heads: 3, kv_heads: 1, head_dim: 48 },
    Heads { heads: 7, kv_heads: 1, head_dim: 64 },
    Heads { heads: 2, kv_heads: 2, head_dim: 80 },
    Heads { heads: 8, kv_heads: 1, head_dim: 96 },
    Heads { heads: 5, kv_heads: 1, head_dim: 112 },
    Heads { heads: 4, kv_heads: 1, head_dim: 128 },
];

#[test]
fn agrees_with_f64_for_every_shape_of_heads() {
    for heads in HEADS {
        Case::new(ragged(), heads, None).check(1);
        Case::new(ragged(), heads, Some(40)).check(2);
    }
}

#[test]
fn agrees_with_f64_in_windows_shorter_and_longer_than_a_tile() {
    let heads = Heads { heads: 6, kv_heads: 2, head_dim: 32 };
    for window in [2, 8, 63, 64, 65, 100, 1000] {
        Case::new(ragged(), heads, Some(window)).check(3);
    }
}

/// A row that sees only itself copies its value, and no score matters.
#[test]
fn a_window_of_one_sees_the_token_itself() {
    let heads = Heads { heads: 2, kv_heads: 2, head_dim: 16 };
    let case = Case::new(ragged(), heads, Some(1));
    let found = case.run(1);
    assert!(found.out == case.v && found.dv == case.dout);
    for gradient in [&found.dq, &found.dk] {
        assert!(error(&widen(gradient), &vec![0.0; gradient.len()]) < 1e-5);
    }
}

/// Rows of one text fill blocks to the last row, one more, one less, and several; every stage is used again.
#[test]
fn agrees_with_f64_over_many_tiles() {
    let heads = Heads { heads: 1, kv_heads: 1, head_dim: 16 };
    for window in [None, Some(50), Some(150)] {
        Case::new(Layout::new(&[(193, vec![127, 129]), (0, vec![256])]), heads, window).check(4);
    }
}

/// As many heads over one key head as a tile has rows, so that a tile of queries has one token; and a number
/// that leaves rows of it unused.
#[test]
fn agrees_with_f64_where_many_heads_share_a_key_head() {
    for sharing in [33, 64] {
        let heads = Heads { heads: sharing, kv_heads: 1, head_dim: 16 };
        Case::new(Layout::new(&[(5, vec![3, 2])]), heads, None).check(5);
    }
}

#[test]
fn every_order_of_threads_gives_the_same_bits() {
    let layout = Layout::new(&[(70, vec![30, 90]), (0, vec![20])]);
    let case = Case::new(layout, Heads { heads: 6, kv_heads: 2, head_dim: 32 }, Some(100));
    let first = case.run(0);
    for seed in 1..6 {
        assert!(case.run(seed) == first, "seed {seed}");
    }
}

#[test]
fn a_group_has_the_same_bits_alone_and_in_company() {
    let heads = Heads { heads: 6, kv_heads: 2, head_dim: 32 };
    for window in [None, Some(20)] {
        assert_same_alone_and_in_company(heads, window, |case, seed| case.run(seed));
    }
}

pub(super) fn assert_same_alone_and_in_company(
    heads: Heads,
    window: Option<usize>,
    run: impl Fn(&Case, u64) -> Found,
) {
    let groups: [(usize, Vec<usize>); 4] =
        [(37, vec![5, 0, 61, 1]), (0, vec![70, 3]), (9, vec![]), (100, vec![31, 33])];
    let case = Case::new(Layout::new(&groups), heads, window);
    let together = run(&case, 1);
    for (group, content) in case.layout.groups.iter().zip(&groups) {
        let rows = group.rows();
        let alone = case.part(Layout::new(std::slice::from_ref(content)), rows.clone());
        let alone = run(&alone, 2);
        let (queries, keys) = (heads.query_width(), heads.key_width());
        let of = |width: usize| rows.start * width..rows.end * width;
        assert!(alone.out == together.out[of(queries)]);
        assert!(alone.lse == together.lse[of(heads.heads)]);
        assert!(alone.dq == together.dq[of(queries)]);
        assert!(alone.dk == together.dk[of(keys)]);
        assert!(alone.dv == together.dv[of(keys)]);
    }
}

/// The last row of a text, whose keys before it are the cache.
fn check_decode(case: &Case, seed: u64) {
    let (heads, n) = (&case.heads, case.layout.rows());
    let gpu = gpu(seed);
    let last = (n - 1) * heads.query_width()..n * heads.query_width();
    let found = run_decode(&gpu, case).unwrap_or_else(|error| panic!("{error}"));
    let plain = case.reference::<f32>(|x| bf16::from_f32(x).to_f32());
    let exact = case.reference::<f64>(|x| x);
    let name = format!("decode {n} {heads:?} window {:?}", case.window);
    assert_accurate_bf16(&name, &found, &round(&plain.out[last.clone()]), &exact.out[last]);
}

fn run_decode(gpu: &Gpu, case: &Case) -> Result<Vec<bf16>> {
    let (heads, n, window) = (&case.heads, case.layout.rows(), case.window);
    let q = gpu.uploaded(&case.q[(n - 1) * heads.query_width()..])?;
    // A cache has room for more than is in it.
    let cache = |x: &[bf16]| {
        let mut cache = gpu.alloc(x.len() + 5 * heads.key_width())?;
        gpu.upload(x, &mut cache[..x.len()]).map(|()| cache)
    };
    let (k, v) = (cache(&case.k)?, cache(&case.v)?);
    let mut partial = gpu.alloc(decode_room(n, heads, window))?;
    let mut out = gpu.alloc(heads.query_width())?;
    decode(gpu, &q, &k, &v, n, heads, window, &mut partial, &mut out)?;
    gpu.downloaded(&out)
}

#[test]
fn decoding_agrees_with_f64_for_every_shape_of_heads() {
    let many = Heads { heads: 33, kv_heads: 1, head_dim: 16 };
    for heads in HEADS.into_iter().chain([many]) {
        for (n, window) in [(1, None), (75, None), (75, Some(17))] {
            check_decode(&Case::new(Layout::new(&[(0, vec![n])]), heads, window), 1);
        }
    }
}

#[test]
fn decoding_agrees_with_f64_over_several_parts() {
    let heads = Heads { heads: 4, kv_heads: 2, head_dim: 16 };
    for n in [16, 64, 65, 256, 257, 600] {
        for window in [None, Some(1), Some(255), Some(300)] {
            check_decode(&Case::new(Layout::new(&[(0, vec![n])]), heads, window), n as u64);
        }
    }
}

#[test]
fn decoding_has_the_same_bits_in_every_order_of_threads() {
    let heads = Heads { heads: 4, kv_heads: 2, head_dim: 16 };
    let case = Case::new(Layout::new(&[(0, vec![330])]), heads, None);
    let first = run_decode(&gpu(0), &case).unwrap();
    for seed in 1..6 {
        assert!(run_decode(&gpu(seed), &case).unwrap() == first, "seed {seed}");
    }
}

#[test]
fn no_rows_is_fine() {
    let heads = Heads { heads: 2, kv_heads: 1, head_dim: 16 };
    for layout in [Layout::new(&[]), Layout::new(&[(0, vec![0, 0])])] {
        let found = Case::new(layout, heads, None).run(0);
        assert!(found.out.is_empty() && found.dk.is_empty());
    }
}

#[test]
#[should_panic(expected = "attention: k must be [3, 16]")]
fn a_wrong_shape_is_named() {
    let heads = Heads { heads: 2, kv_heads: 1, head_dim: 16 };
    let mut case = Case::new(Layout::new(&[(3, vec![])]), heads, None);
    case.k.truncate(32);
    case.run(0);
}

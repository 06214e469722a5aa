//! Attention on Hopper against f64 and against the portable kernels.

use super::super::super::tests::ragged;
use super::super::tests::{Case, Found, assert_same_alone_and_in_company};
use super::*;
use crate::layout::Layout;
use crate::rope::Rope;
use crate::testing::{
    assert_accurate, assert_accurate_bf16, assert_faults_are_caught_on_hopper, error,
    hopper_gpu as gpu, round, together, widen,
};

mod faults;

impl Case {
    fn run_on_hopper(&self, gpu: &Gpu) -> Result<Found> {
        self.run_turned_on_hopper(gpu, None)
    }

    /// Back in one pass.
    fn run_turned_on_hopper(&self, gpu: &Gpu, turned: Option<Turned>) -> Result<Found> {
        let tiling = Tiling::of(gpu, &self.heads).expect("heads of Hopper's kernels");
        let schedule = self.schedule(Some(tiling))?;
        together(|| self.run_with(gpu, &schedule, turned, schedule.backward_room()))
    }

    /// Back in two kernels.
    fn run_twice_on_hopper(&self, gpu: &Gpu) -> Result<Found> {
        let tiling = Tiling::of(gpu, &self.heads).expect("heads of Hopper's kernels");
        self.run_with(gpu, &self.schedule(Some(tiling))?, None, 0)
    }

    #[track_caller]
    fn check_on_hopper(&self, seed: u64) {
        let gpu = gpu(seed);
        for found in [self.run_on_hopper(&gpu), self.run_twice_on_hopper(&gpu)] {
            self.assert_accurate(&found.unwrap_or_else(|error| panic!("{error}")));
        }
    }
}

/// A key head each, several, as many as leave rows of a tile unused.
const HEADS: [Heads; 7] = [
    Heads { heads: 2, kv_heads: 2, head_dim: 64 },
    Heads { heads: 4, kv_heads: 2, head_dim: 64 },
    Heads { heads: 7, kv_heads: 1, head_dim: 64 },
    Heads { heads: 1, kv_heads: 1, head_dim: 128 },
    Heads { heads: 8, kv_heads: 2, head_dim: 128 },
    Heads { heads: 5, kv_heads: 1, head_dim: 128 },
    Heads { heads: 33, kv_heads: 1, head_dim: 128 },
];

#[test]
fn agrees_with_f64_for_every_shape_of_heads() {
    for (heads, seed) in HEADS.into_iter().zip(0..) {
        Case::new(ragged(), heads, None).check_on_hopper(seed);
        Case::new(ragged(), heads, Some(40)).check_on_hopper(seed + 1);
    }
}

#[test]
fn agrees_with_f64_in_windows_shorter_and_longer_than_a_tile() {
    let heads = Heads { heads: 3, kv_heads: 1, head_dim: 64 };
    for (window, seed) in [2, 63, 64, 100, 127, 128, 129, 1000].into_iter().zip(0..) {
        Case::new(Layout::new(&[(60, vec![150, 30])]), heads, Some(window)).check_on_hopper(seed);
    }
}

/// Rows of one text fill blocks to the last row, one more, one less, and several; every stage is used again.
#[test]
fn agrees_with_f64_over_many_tiles() {
    let heads = Heads { heads: 1, kv_heads: 1, head_dim: 64 };
    for (window, seed) in [None, Some(150)].into_iter().zip(4..) {
        let layout = Layout::new(&[(193, vec![127, 129]), (0, vec![256]), (0, vec![700])]);
        Case::new(layout, heads, window).check_on_hopper(seed);
    }
    let heads = Heads { head_dim: 128, ..heads };
    Case::new(Layout::new(&[(0, vec![500])]), heads, None).check_on_hopper(6);
}

/// The oracle: other tiles, the same formulas.
#[test]
fn is_as_accurate_as_the_portable_kernels() {
    for (heads, seed) in [HEADS[1], HEADS[4]].into_iter().zip(0..) {
        let case = Case::new(Layout::new(&[(150, vec![20, 170])]), heads, Some(140));
        let gpu = gpu(seed);
        let found = case.run_on_hopper(&gpu).unwrap();
        let portable = case.run_by(&gpu, &case.schedule(None).unwrap()).unwrap();
        let exact = case.reference::<f64>(|x| x);
        assert_accurate_bf16("out", &found.out, &portable.out, &exact.out);
        assert_accurate("lse", &found.lse, &portable.lse, &exact.lse);
        assert_accurate_bf16("dq", &found.dq, &portable.dq, &exact.dq);
        assert_accurate_bf16("dk", &found.dk, &portable.dk, &exact.dk);
        assert_accurate_bf16("dv", &found.dv, &portable.dv, &exact.dv);
    }
}

/// A row that sees only itself copies its value, and no score matters.
#[test]
fn a_window_of_one_sees_the_token_itself() {
    let heads = Heads { heads: 2, kv_heads: 2, head_dim: 64 };
    let case = Case::new(ragged(), heads, Some(1));
    let found = case.run_on_hopper(&gpu(1)).unwrap();
    assert!(widen(&found.out) == widen(&case.v) && widen(&found.dv) == widen(&case.dout));
}

/// The way back beyond the rotation: q and k are taken as they are, their gradients turned. Where a table ends there is no number.
#[test]
fn gradients_are_turned_back() {
    for (heads, seed) in [(HEADS[1], 1), (HEADS[5], 2)] {
        let case = Case::new(Layout::new(&[(150, vec![20, 60])]), heads, Some(140));
        let gpu = gpu(seed);
        let positions = gpu.uploaded(&case.layout.positions).unwrap();
        let half = heads.head_dim / 2;
        let frequencies = (0..half).map(|i| 0.9f64.powi(i as i32)).collect();
        let angles = Rope::new(frequencies, 1.25);
        let table = rope::Table::new(&gpu, &angles, 210).unwrap();
        let turned = Some(Turned { table: &table, positions: &positions });
        let portable = case.run_with(&gpu, &case.schedule(None).unwrap(), turned, 0).unwrap();
        let exact = case.reference::<f64>(|x| x);
        let turned_back = |x: &[f64], heads: usize| {
            let mut x = x.to_vec();
            for (head, x) in x.chunks_exact_mut(2 * half).enumerate() {
                for i in 0..half {
                    let position = f64::from(case.layout.positions[head / heads]);
                    let (sin, cos) = (position * f64::from(angles.inv_freq[i])).sin_cos();
                    let (a, b) = (x[i], x[i + half]);
                    (x[i], x[i + half]) = (1.25 * (a * cos + b * sin), 1.25 * (b * cos - a * sin));
                }
            }
            x
        };
        let (dq, dk) =
            (turned_back(&exact.dq, heads.heads), turned_back(&exact.dk, heads.kv_heads));
        let found = case.run_turned_on_hopper(&gpu, turned).unwrap();
        assert_accurate_bf16("dq", &found.dq, &portable.dq, &dq);
        assert_accurate_bf16("dk", &found.dk, &portable.dk, &dk);
        assert_accurate_bf16("dv", &found.dv, &portable.dv, &exact.dv);

        let short = rope::Table::new(&gpu, &angles, 170).unwrap();
        let turned = Some(Turned { table: &short, positions: &positions });
        let found = case.run_turned_on_hopper(&gpu, turned).unwrap();
        for (x, width) in [(&found.dq, heads.query_width()), (&found.dk, heads.key_width())] {
            for (row, x) in x.chunks(width).enumerate() {
                let known = case.layout.positions[row] < 170;
                assert!(x.iter().all(|x| x.is_nan() != known), "row {row}");
            }
        }
    }
}

#[test]
fn every_order_of_threads_gives_the_same_bits() {
    for heads in [HEADS[1], HEADS[5]] {
        let layout = Layout::new(&[(70, vec![30, 190]), (0, vec![20])]);
        let case = Case::new(layout, heads, Some(200));
        let first = case.run_on_hopper(&gpu(0)).unwrap();
        let twice = case.run_twice_on_hopper(&gpu(0)).unwrap();
        for seed in 1..6 {
            assert!(case.run_on_hopper(&gpu(seed)).unwrap() == first, "seed {seed}");
            assert!(case.run_twice_on_hopper(&gpu(seed)).unwrap() == twice, "seed {seed}");
        }
    }
}

#[test]
fn a_group_has_the_same_bits_alone_and_in_company() {
    for (heads, window) in [(HEADS[1], None), (HEADS[5], Some(20))] {
        let run = |case: &Case, seed| case.run_on_hopper(&gpu(seed)).unwrap();
        assert_same_alone_and_in_company(heads, window, run);
        let run = |case: &Case, seed| case.run_twice_on_hopper(&gpu(seed)).unwrap();
        assert_same_alone_and_in_company(heads, window, run);
    }
}

#[test]
fn no_rows_is_fine() {
    for layout in [Layout::new(&[]), Layout::new(&[(0, vec![0, 0])])] {
        let found = Case::new(layout, HEADS[0], None).run_on_hopper(&gpu(0)).unwrap();
        assert!(found.out.is_empty() && found.dk.is_empty());
    }
}

#[test]
fn device_and_heads_choose_the_kernels() {
    let hopper = Gpu::emulated_hopper(0).unwrap();
    for heads in HEADS {
        let tiling = Tiling::of(&hopper, &heads).unwrap();
        let bytes = [
            tiling.forward_bytes(),
            tiling.backward_bytes(),
            tiling.backward_keys_bytes(),
            tiling.backward_queries_bytes(),
        ];
        assert!(bytes.iter().all(|bytes| *bytes <= hopper.properties().shared_bytes));
        assert_eq!(Tiling::of(&Gpu::emulated(0).unwrap(), &heads), None);
    }
    for head_dim in [32, 80, 96] {
        assert_eq!(Tiling::of(&hopper, &Heads { heads: 2, kv_heads: 1, head_dim }), None);
    }
    // And a schedule asks.
    let schedule = |gpu| Schedule::new(gpu, &ragged(), &HEADS[0], None).unwrap();
    assert!(schedule(&hopper).hopper.is_some());
    assert!(schedule(&Gpu::emulated(0).unwrap()).hopper.is_none());
}

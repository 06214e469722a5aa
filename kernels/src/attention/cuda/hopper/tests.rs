//! Attention on Hopper against f64 and against the portable kernels, and faults put into it.

use super::super::super::tests::ragged;
use super::super::tests::{Case, Found, assert_same_alone_and_in_company};
use super::*;
use crate::layout::Layout;
use crate::testing::{
    assert_accurate, assert_accurate_bf16, assert_faults_are_caught_on_hopper, hopper_gpu as gpu,
    round, widen,
};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::LazyLock;

/// Blocks that are emulated at once, so that they wait for each other.
static TOGETHER: LazyLock<ThreadPool> =
    LazyLock::new(|| ThreadPoolBuilder::new().num_threads(4).build().unwrap());

impl Case {
    fn run_on_hopper(&self, gpu: &Gpu) -> Result<Found> {
        self.run_turned_on_hopper(gpu, None)
    }

    /// Back in one pass.
    fn run_turned_on_hopper(&self, gpu: &Gpu, turned: Option<Turned>) -> Result<Found> {
        let tiling = Tiling::of(gpu, &self.heads).expect("heads of Hopper's kernels");
        let schedule = self.schedule(Some(tiling))?;
        TOGETHER.install(|| self.run_with(gpu, &schedule, turned, schedule.backward_room()))
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

#[test]
fn every_order_of_threads_gives_the_same_bits() {
    for heads in [HEADS[1], HEADS[5]] {
        let layout = Layout::new(&[(70, vec![30, 190]), (0, vec![20])]);
        let case = Case::new(layout, heads, Some(200));
        let first = case.run_on_hopper(&gpu(0)).unwrap();
        for seed in 1..6 {
            assert!(case.run_on_hopper(&gpu(seed)).unwrap() == first, "seed {seed}");
        }
    }
}

#[test]
fn a_group_has_the_same_bits_alone_and_in_company() {
    for (heads, window) in [(HEADS[1], None), (HEADS[5], Some(20))] {
        let run = |case: &Case, seed| case.run_on_hopper(&gpu(seed)).unwrap();
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
        let bytes =
            [tiling.forward_bytes(), tiling.backward_keys_bytes(), tiling.backward_queries_bytes()];
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

// ---- faults ----

/// Fails unless a fault, (right, wrong) in `file`, makes one of two batches wrong. They have several tiles of keys, of which the
/// last ones are not full; rows of a tile that no box fills, and that see nothing of a tile; all stages twice; a mask that cuts on
/// both sides.
#[track_caller]
fn assert_caught(file: &'static str, faults: &[(&'static str, &'static str)]) {
    let five = Heads { heads: 5, kv_heads: 1, head_dim: 128 };
    let four = Heads { heads: 4, kv_heads: 2, head_dim: 64 };
    let cases = [
        Case::new(Layout::new(&[(300, vec![40, 30])]), five, Some(290)),
        Case::new(Layout::new(&[(0, vec![330]), (3, vec![190])]), four, Some(100)),
    ];
    let cases = cases.map(|case| {
        let plain = case.reference::<f32>(|x| bf16::from_f32(x).to_f32());
        let exact = case.reference::<f64>(|x| x);
        (case, plain, exact)
    });
    let check = |gpu: &Gpu| {
        for (case, plain, exact) in &cases {
            let found = case.run_on_hopper(gpu).unwrap_or_else(|error| panic!("{error}"));
            assert_accurate_bf16("out", &found.out, &round(&plain.out), &exact.out);
            assert_accurate("lse", &found.lse, &plain.lse, &exact.lse);
            assert_accurate_bf16("dq", &found.dq, &round(&plain.dq), &exact.dq);
            assert_accurate_bf16("dk", &found.dk, &round(&plain.dk), &exact.dk);
            assert_accurate_bf16("dv", &found.dv, &round(&plain.dv), &exact.dv);
        }
    };
    let faults: Vec<_> = faults.iter().map(|&(from, to)| (file, from, to)).collect();
    assert_faults_are_caught_on_hopper(check, &faults);
}

#[test]
fn faults_in_the_rings_are_caught() {
    assert_caught(
        "hopper_forward.cu",
        &[
            // Phases and waits.
            ("k_empty + stage, k_turn.parity ^ 1", "k_empty + stage, k_turn.parity"),
            ("uint32_t q_parity = 1;", "uint32_t q_parity = 0;"),
            ("barrier_wait(shared.k_empty + stage, k_turn.parity ^ 1);", ""),
            ("barrier_wait(shared.v_empty + stage, v_turn.parity ^ 1);", ""),
            ("barrier_wait(shared.q_empty, q_parity);", ""),
            ("barrier_wait(shared.k_full + k_turn.stage, k_turn.parity);", ""),
            ("barrier_wait(shared.v_full + v_turn.stage, v_turn.parity);", ""),
            ("barrier_wait(shared.q_full, q_parity);", ""),
            // Counts.
            ("k_full + stage, tile_bytes(KEYS))", "k_full + stage, tile_bytes(KEYS) / 2)"),
            ("v_full + stage, tile_bytes(KEYS))", "v_full + stage, 2 * tile_bytes(KEYS))"),
            ("tile_bytes(TOKENS * SHARING)", "tile_bytes(ROWS)"),
            ("k_empty + stage, READERS)", "k_empty + stage, READERS / 2)"),
            ("v_empty + stage, READERS)", "v_empty + stage, 1)"),
            ("q_empty, READERS)", "q_empty, READERS / 2)"),
            // What makes barriers ready.
            ("        fence_barrier_init();\n", ""),
            // Places that are given back too early or never.
            ("release(shared.k_empty + k_turn.stage);", ""),
            ("            release(shared.v_empty + v_turn.stage);", ""),
            ("if (!met.more) release(shared.q_empty);", ""),
            ("if (!met.more) release(shared.q_empty);", "release(shared.q_empty);"),
            ("            wgmma_wait<0>();\n            hold(sums);\n", ""),
            // Tiles and tasks.
            ("walk.run != walk.end", "1"),
            ("task.head, number >= 0", "task.head, 1"),
            ("            v_turn.next();\n#pragma", "#pragma"),
            (
                "task.head, keys.row);\n            v_turn",
                "task.head, keys.position);\n            v_turn",
            ),
            ("task.head * SHARING, own.row", "task.head, own.row"),
            // Turns that nobody gives, and registers that nobody gave back.
            ("if (part == 1) named_barrier_arrive(1, BOTH);", ""),
            ("fewer_registers<FEW>();", ""),
        ],
    );
    assert_caught(
        "hopper_tiles.cuh",
        &[
            ("if (++stage == STAGES) stage = 0, parity ^= 1;", "if (++stage == STAGES) stage = 0;"),
            (
                "tile(number % count), head(number / count)",
                "tile(number / count), head(number % count)",
            ),
        ],
    );
}

#[test]
fn faults_in_products_are_caught() {
    assert_caught(
        "hopper_forward.cu",
        &[
            ("wgmma_wait<1>();", "wgmma_wait<2>();"),
            ("        start_scores();\n        wgmma_wait<0>();", "        start_scores();"),
            (
                "            wgmma_fence();\n            start_scores();",
                "            start_scores();",
            ),
            ("            wgmma_fence();\n            start_adding", "            start_adding"),
        ],
    );
    assert_caught(
        "hopper_tiles.cuh",
        &[
            ("within = k % 4 * 32", "within = k % 4 * 64"),
            ("panel * A_ROWS * ROW_BYTES", "panel * ROW_BYTES"),
            ("panel * B_ROWS * ROW_BYTES", "panel * PART * ROW_BYTES"),
            ("within), k > 0)", "within), true)"),
            ("descriptor_across(b, HEIGHT * ROW_BYTES)", "descriptor_across(b, ROW_BYTES)"),
            ("16 * ROW_BYTES * k", "8 * ROW_BYTES * k"),
            ("pack_bf16(scores[8 * k + 2 * i], ", "pack_bf16(scores[8 * k + 2 * (i ^ 1)], "),
            ("64 * panel, head, row", "0, head, row"),
        ],
    );
}

#[test]
fn faults_in_mask_and_softmax_are_caught() {
    assert_caught(
        "hopper_forward.cu",
        &[
            ("met.tokens < KEYS || ", ""),
            ("(row + 8) / SHARING", "row / SHARING"),
            ("sums[i] *= shrink[half_of(i)];", "sums[i] *= shrink[0];"),
            ("sum[half] *= shrink[half];", ""),
            ("top[half] = largest;", ""),
            ("largest == NEG_INFINITY ? 0.0f : largest", "largest"),
            ("stacked < own.tokens * SHARING", "true"),
            ("float sum = row_sum(state.sum[half]);", "float sum = state.sum[half];"),
            ("set_zero(sums);", ""),
        ],
    );
    assert_caught(
        "hopper_tiles.cuh",
        &[
            ("column < seen.first || ", ""),
            ("column >= seen.end", "column > seen.end"),
            ("i / 4 * 8 + int(threadIdx.x) % 4 * 2", "i / 4 * 8 + int(threadIdx.x) % 4"),
            ("if (first + row >= span.tokens * sharing) continue;", ""),
            ("place(lane % 16, chunk + lane / 16)", "place(lane % 16, chunk)"),
        ],
    );
}

#[test]
fn faults_on_the_way_back_to_keys_are_caught() {
    assert_caught(
        "hopper_backward_keys.cu",
        &[
            // Barriers.
            ("shared.empty + stage, turn.parity ^ 1", "shared.empty + stage, turn.parity"),
            ("barrier_wait(shared.empty + stage, turn.parity ^ 1);", ""),
            ("barrier_wait(shared.full + turn.stage, turn.parity);", ""),
            ("barrier_wait(shared.own_full, 0);", ""),
            ("expecting(full, 2 * tile_bytes", "expecting(full, tile_bytes"),
            ("shared.empty + stage, READERS)", "shared.empty + stage, READERS / 2)"),
            ("        fence_barrier_init();\n", ""),
            (
                "if (tile > 0) release(shared.empty + before);",
                "release(shared.empty + turn.stage);",
            ),
            // Rows that no box fills.
            ("store16(behind + at, make_uint4(0, 0, 0, 0));", ""),
            ("fence_async(behind + at, 16);", ""),
            ("there ? lse[at] * LOG2_E : INFINITY", "lse[there ? at : 0] * LOG2_E"),
            // Products.
            ("needed.\n        wgmma_wait<1>();", "needed.\n        wgmma_wait<2>();"),
            (
                "        wgmma_wait<1>();\n        hold(p);",
                "        wgmma_wait<2>();\n        hold(p);",
            ),
            (
                "        wgmma_wait<1>();\n        hold(ds);",
                "        wgmma_wait<2>();\n        hold(ds);",
            ),
            (
                "        wgmma_fence();\n        start_adding<QUERIES>(sums_v",
                "        start_adding<QUERIES>(sums_v",
            ),
            ("    wgmma_wait<0>();\n    hold(sums_k);", "    hold(sums_k);"),
            // Numbers.
            ("i % 2 ? -of.y : -of.x", "i % 2 ? -of.x : -of.y"),
            ("ds[i] - (i % 2 ? of.y : of.x)", "ds[i]"),
            ("queries_of(position + 8, queries", "queries_of(position, queries"),
            ("walk.run != walk.end", "1"),
            ("sums_k, scales", "sums_k, ones"),
        ],
    );
}

#[test]
fn faults_on_the_way_back_to_queries_are_caught() {
    assert_caught(
        "hopper_backward_queries.cu",
        &[
            // Barriers.
            ("shared.empty + stage, turn.parity ^ 1", "shared.empty + stage, turn.parity"),
            ("uint32_t own_parity = 1;", "uint32_t own_parity = 0;"),
            ("barrier_wait(shared.empty + stage, turn.parity ^ 1);", ""),
            ("barrier_wait(shared.own_empty, own_parity);", ""),
            ("barrier_wait(shared.full + turn.stage, turn.parity);", ""),
            ("barrier_wait(shared.own_full, own_parity);", ""),
            ("expecting(full, 2 * tile_bytes(KEYS))", "expecting(full, tile_bytes(KEYS))"),
            ("shared.empty + stage, READERS)", "shared.empty + stage, READERS / 2)"),
            ("own_empty, READERS)", "own_empty, READERS / 2)"),
            ("        fence_barrier_init();\n", ""),
            (
                "if (before >= 0) release(shared.empty + before);",
                "release(shared.empty + turn.stage);",
            ),
            ("if (!more) release(shared.own_empty);", ""),
            ("        release(shared.empty + before);\n        const", "        const"),
            // Products.
            (
                "            wgmma_wait<1>();\n            hold(p);",
                "            wgmma_wait<2>();\n            hold(p);",
            ),
            ("needed.\n            wgmma_wait<1>();", "needed.\n            wgmma_wait<2>();"),
            ("            wgmma_wait<0>();\n            hold(ds);", "            hold(ds);"),
            ("            wgmma_fence();\n            start_adding", "            start_adding"),
            ("        wgmma_wait<0>();\n        hold(sums);", "        hold(sums);"),
            // Numbers.
            ("-own_lse[half_of(i)]", "-own_lse[0]"),
            ("ds[i] - own_delta[half_of(i)]", "ds[i]"),
            ("met.tokens < KEYS || ", ""),
            ("walk.run != walk.end", "1"),
            ("task.head, number >= 0", "task.head, 1"),
            ("set_zero(sums);", ""),
        ],
    );
}

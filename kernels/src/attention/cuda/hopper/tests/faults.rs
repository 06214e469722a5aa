//! Faults put into the kernels.

use super::*;
use crate::testing::{HeldBack, assert_faults_are_caught_holding_back};

type Run = fn(&Case, &Gpu) -> Result<Found>;

/// A check of two batches. They have several tiles of keys, of which the last ones are not full; rows of a tile that no box fills, and
/// that see nothing of a tile; all stages twice; a mask that cuts on both sides.
fn check_two_batches(run: Run) -> impl Fn(&Gpu) {
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
    move |gpu| {
        for (case, plain, exact) in &cases {
            let found = run(case, gpu).unwrap_or_else(|error| panic!("{error}"));
            assert_accurate_bf16("out", &found.out, &round(&plain.out), &exact.out);
            assert_accurate("lse", &found.lse, &plain.lse, &exact.lse);
            assert_accurate_bf16("dq", &found.dq, &round(&plain.dq), &exact.dq);
            assert_accurate_bf16("dk", &found.dk, &round(&plain.dk), &exact.dk);
            assert_accurate_bf16("dv", &found.dv, &round(&plain.dv), &exact.dv);
        }
    }
}

/// Fails unless a fault, (right, wrong) in `file`, makes one of the batches wrong.
#[track_caller]
fn assert_caught_in(run: Run, file: &'static str, faults: &[(&'static str, &'static str)]) {
    let faults: Vec<_> = faults.iter().map(|&(from, to)| (file, from, to)).collect();
    assert_faults_are_caught_on_hopper(check_two_batches(run), &faults);
}

#[track_caller]
fn assert_caught(file: &'static str, faults: &[(&'static str, &'static str)]) {
    assert_caught_in(Case::run_on_hopper, file, faults);
}

/// Of the way back in two kernels.
#[track_caller]
fn assert_caught_twice(file: &'static str, faults: &[(&'static str, &'static str)]) {
    assert_caught_in(Case::run_twice_on_hopper, file, faults);
}

/// Barriers that are there for a warp, or for lanes, that are late. The `__syncwarp` of `release` is not among them: at the wait for
/// products before it a warpgroup meets anyway, and that what was read before it is ordered before the arrival no emulation
/// shows whose threads read in the order of the program; racecheck may.
#[test]
fn faults_that_late_threads_show_are_caught() {
    let twice = check_two_batches(Case::run_twice_on_hopper);
    let barriers_are_ready = [
        (
            "hopper_forward.cu",
            "        fence_barrier_init();\n    }\n    __syncthreads();",
            "        fence_barrier_init();\n    }",
        ),
        ("hopper_backward_keys.cu", "2 * STAGES);\n    __syncthreads();", "2 * STAGES);"),
        (
            "hopper_backward_queries.cu",
            "        fence_barrier_init();\n    }\n    __syncthreads();",
            "        fence_barrier_init();\n    }",
        ),
    ];
    assert_faults_are_caught_holding_back(HeldBack::Warp(0), &twice, &barriers_are_ready);
    let once = check_two_batches(Case::run_on_hopper);
    let barriers_are_ready =
        [("hopper_backward.cu", "2 * STAGES);\n    __syncthreads();", "2 * STAGES);")];
    assert_faults_are_caught_holding_back(HeldBack::Warp(0), &once, &barriers_are_ready);
    let statistics_are_there = [(
        "hopper_backward_keys.cu",
        "        __syncwarp();\n        if (lane == 0) {\n            Barrier* full",
        "        if (lane == 0) {\n            Barrier* full",
    )];
    let lanes = HeldBack::AllButTheFirstLaneOf(0);
    assert_faults_are_caught_holding_back(lanes, &twice, &statistics_are_there);
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
            (
                "tile(number % count), head(number / count)",
                "tile(number / count), head(number % count)",
            ),
            ("empty + stage, READERS)", "empty + stage, READERS / 2)"),
            ("empty + stage, READERS)", "empty + stage, 1)"),
        ],
    );
    assert_caught(
        "hopper.cuh",
        &[("if (++stage == COUNT) stage = 0, parity ^= 1;", "if (++stage == COUNT) stage = 0;")],
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
            ("float sum = quad_sum(state.sum[half]);", "float sum = state.sum[half];"),
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
fn faults_on_the_way_back_are_caught() {
    assert_caught(
        "hopper_backward.cu",
        &[
            // Barriers.
            ("turn.parity ^ 1);\n        shared.tiles", "turn.parity);\n        shared.tiles"),
            (
                "        barrier_wait(shared.empty + stage, turn.parity ^ 1);\n        shared",
                "        shared",
            ),
            ("        barrier_wait(shared.empty + stage, turn.parity ^ 1);\n#pragma", "#pragma"),
            ("        barrier_wait(shared.staged_full + place, parity);\n", ""),
            ("tile / STAGED % 2 ^ 1", "tile / STAGED % 2"),
            ("    barrier_wait(shared.staged_empty + place, tile / STAGED % 2 ^ 1);\n", ""),
            (
                "        barrier_wait(shared.full + turn.stage, turn.parity);\n        start_dq",
                "        start_dq",
            ),
            ("barrier_wait(shared.own_full, 0);", ""),
            ("shared.empty, 2)", "shared.empty, 1)"),
            ("shared.staged_full + stage, READERS)", "shared.staged_full + stage, READERS / 2)"),
            ("        fence_barrier_init();\n", ""),
            ("release(shared.empty + stage);", ""),
            ("        named_barrier_sync(1, BOTH);\n        if", "        if"),
            ("constexpr int SLOPES = 2;", "constexpr int SLOPES = 1;"),
            // Words, and what they are about.
            ("atomicAdd(begun, 1)", "int(blockIdx.x)"),
            ("            acquire_when(word, own.position);\n", ""),
            ("            fence_async_global();\n", ""),
            ("        tma_store_wait<0>();\n", ""),
            ("        bulk_wait<0>();\n", ""),
            ("store_release(word, end_of(own));", "store_release(word, end_of(own) - 1);"),
            ("own.position <= max(", "own.position < max("),
            ("queries.position - window + 1, 0)", "queries.position + 1, 0)"),
            ("bulk_add(to, staged, bytes);", "bulk_store(to, staged, bytes);"),
            ("queries.row * kv_heads + task.head);", "queries.row * kv_heads);"),
            ("(left - 1) / TOKENS * TOKENS", "max(left - TOKENS, 0)"),
            ("walk.run != walk.end}", "1}"),
            // What engines see.
            ("    fence_async(tile + first * ROW_BYTES, 16 * ROW_BYTES);\n", ""),
            ("    fence_async(staged + row / 16 * 16 * SUM_BYTES, 16 * SUM_BYTES);\n", ""),
            // Products.
            ("part % SAME_PANEL * COLUMNS", "0 * COLUMNS"),
            ("part / SAME_PANEL * ROWS", "0 * ROWS"),
            ("        // All of this tile.\n        wgmma_wait<1>();", "        wgmma_wait<2>();"),
            ("    start_dq(tile);\n    wgmma_wait<0>();", "    start_dq(tile);"),
            // Numbers.
            ("mine.tokens < PART || ", ""),
            ("if (row >= own.tokens) visible[0].end = 0;", ""),
            ("if (row + 8 >= own.tokens) visible[1].end = 0;", ""),
            ("COLUMNS / 8 * part + group", "group"),
            ("(to + 8 * SUM_BYTES) =", "(to + 4 * SUM_BYTES) ="),
            ("sums[i] *= scale;", "sums[i] *= 1.0f;"),
        ],
    );
    assert_caught(
        "hopper_sums.cuh",
        &[("head * queries.tokens)", "head)"), ("group ^ row % 8", "group | row % 8")],
    );
    assert_caught(
        "hopper_backward_finish.cu",
        &[("x[4 * i] = scale * four.x", "x[4 * i] = four.x"), ("group + GROUPS / 2);", "group);")],
    );
}

#[test]
fn faults_where_gradients_are_turned_are_caught() {
    let heads = Heads { heads: 4, kv_heads: 2, head_dim: 64 };
    let case = Case::new(Layout::new(&[(0, vec![130])]), heads, None);
    let frequencies = || (0..32).map(|i| 0.9f64.powi(i)).collect();
    let run = |gpu: &Gpu, schedule: &Schedule, room: usize| {
        let table = rope::Table::new(gpu, &Rope::new(frequencies(), 1.0), 130)?;
        let positions = gpu.uploaded(&case.layout.positions)?;
        let turned = Some(Turned { table: &table, positions: &positions });
        case.run_with(gpu, schedule, turned, room)
    };
    let right = {
        let gpu = Gpu::emulated_hopper(0).unwrap();
        run(&gpu, &case.schedule(None).unwrap(), 0).unwrap()
    };
    let check = |gpu: &Gpu| {
        let schedule = case.schedule(Tiling::of(gpu, &heads)).unwrap();
        let found = run(gpu, &schedule, schedule.backward_room());
        let found = found.unwrap_or_else(|error| panic!("{error}"));
        for (found, right) in [(&found.dq, &right.dq), (&found.dk, &right.dk)] {
            let right: Vec<f64> = right.iter().map(|x| x.to_f64()).collect();
            let largest = right.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            // Roundings of bf16 apart.
            assert!(error(&widen(found), &right) < largest / 64.0);
        }
    };
    let (sums, keys, queries) =
        ("hopper_sums.cuh", "hopper_backward.cu", "hopper_backward_finish.cu");
    let faults = [
        (sums, "known ? -1.0f", "known ? 1.0f"),
        (sums, "(known ? position : 0) * HEAD_DIM", "(known ? position : 0) * 64 / 2"),
        (keys, "angles.of(position + 8 * half, sign)", "angles.of(position, sign)"),
        (keys, "of_row + 16 * group", "of_row + 8 * group"),
        (keys, "int(threadIdx.x) % 4 * 4", "int(threadIdx.x) % 4 * 2"),
        (queries, "queries.position + row / SHARING, sign", "queries.position + row, sign"),
        (queries, "sign) + 16 * group", "sign) + 8 * group"),
    ];
    assert_faults_are_caught_on_hopper(check, &faults);
}

#[test]
fn faults_on_the_way_back_to_keys_are_caught() {
    assert_caught_twice(
        "hopper_backward_keys.cu",
        &[
            // Barriers.
            ("shared.empty + stage, turn.parity ^ 1", "shared.empty + stage, turn.parity"),
            ("barrier_wait(shared.empty + stage, turn.parity ^ 1);", ""),
            ("barrier_wait(shared.full + turn.stage, turn.parity);", ""),
            ("barrier_wait(shared.own_full, 0);", ""),
            ("expecting(full, 2 * tile_bytes", "expecting(full, tile_bytes"),
            ("        fence_barrier_init();\n", ""),
            (
                "if (tile > 0) release(shared.empty + before);",
                "release(shared.empty + turn.stage);",
            ),
            // Rows that no box fills.
            ("TOKENS * SHARING>(shared.q", "QUERIES>(shared.q"),
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
    assert_caught_twice(
        "hopper_tiles.cuh",
        &[
            ("store16(behind + at, make_uint4(0, 0, 0, 0));", ""),
            ("fence_async(behind + at, 16);", ""),
        ],
    );
}

#[test]
fn faults_on_the_way_back_to_queries_are_caught() {
    assert_caught_twice(
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

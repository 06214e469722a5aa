//! The products on Hopper against f64 and against the portable ones, and faults put into them.

use super::super::tests::{Case, Together, bits};
use super::super::{Tile as Portable, Way};
use super::*;
use crate::cuda::Fault;
use crate::testing::hopper_gpu as gpu;
use std::panic::{AssertUnwindSafe, catch_unwind};

const TILES: [Tile; 2] = [WIDE, NARROW];

fn check(case: &Case, seed: u64, tile: Tile) {
    case.assert_accurate(&case.run_by(&gpu(seed), Way::Hopper(tile)).unwrap(), tile);
}

/// Rows, depth and columns: less than a box, past the edges of every tile, a ring gone round, more tiles than clusters.
const SHAPES: [(usize, usize, usize); 6] =
    [(1, 8, 8), (65, 72, 72), (129, 136, 328), (300, 264, 200), (600, 40, 520), (257, 584, 136)];

fn check_products(op: &'static str) {
    let shapes_and_tiles = SHAPES.iter().flat_map(|shape| TILES.map(|tile| (*shape, tile)));
    for ((shape, tile), seed) in shapes_and_tiles.zip(0..) {
        check(&Case::new(op, shape), seed, tile);
        check(&Case::new(op, shape).adapted(16).adding(), seed + 1, tile);
    }
    for (rank, seed) in [1, 8, 64, 100, 256].into_iter().zip(0..) {
        let case = Case::new(op, (67, 104, 72)).adapted(rank);
        check(&if op == "nt" { case.biased() } else { case }, seed, NARROW);
    }
}

#[test]
fn nt_agrees_with_f64() {
    check_products("nt");
    check(&Case::new("nt", (70, 80, 296)).biased().adding(), 0, WIDE);
    check(&Case::new("nt", (300, 80, 328)).adapted(16).adding_apart(), 1, WIDE);
}

#[test]
fn nn_agrees_with_f64() {
    check_products("nn");
}

/// The oracle: another kernel, other tiles, the same formula. No element is off by more than one rounding.
#[test]
fn the_portable_products_agree() {
    let tile = Portable::of(16384, 4096);
    for op in ["nt", "nn"] {
        let case = Case::new(op, (150, 264, 136)).adapted(16).adding();
        let expected = case.run_by(&gpu(0), Way::Portable(tile)).unwrap();
        let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.to_f32().abs()));
        for hopper in TILES {
            let found = case.run_by(&gpu(1), Way::Hopper(hopper)).unwrap();
            for (found, expected) in found.iter().zip(&expected) {
                let (found, expected) = (found.to_f32(), expected.to_f32());
                let step = expected.abs().max(largest * f32::from(bf16::EPSILON));
                let off = (found - expected).abs();
                assert!(off <= step * f32::from(bf16::EPSILON), "{op}: {found} and {expected}");
            }
        }
    }
}

/// What packing rests on.
#[test]
fn a_row_has_the_same_bits_in_any_company_and_order() {
    for op in ["nt", "nn"] {
        for (tile, columns) in [(WIDE, 296), (NARROW, 136)] {
            let case = Case::new(op, (300, 264, columns)).adapted(16).adding();
            let all = bits(&case.run_by(&gpu(0), Way::Hopper(tile)).unwrap());
            for (m, seed) in [(1, 1), (64, 2), (129, 3), (257, 4), (300, 5)] {
                let alone = case.clone().rows(m).run_by(&gpu(seed), Way::Hopper(tile)).unwrap();
                assert!(bits(&alone) == all[..m * columns], "{op}: {m} of 300 rows, {tile:?}");
            }
        }
    }
}

/// At step 0 the policy is its own reference, bit for bit.
#[test]
fn a_fresh_adapter_and_none_give_the_same_bits() {
    for (op, rank) in [("nt", 16), ("nn", 16), ("nt", 100), ("nn", 1)] {
        let plain = Case::new(op, (70, 136, 72)).adding();
        let fresh = plain.clone().adapted(rank).without_effect();
        let [plain, fresh] =
            [plain, fresh].map(|case| bits(&case.run_by(&gpu(1), Way::Hopper(NARROW)).unwrap()));
        assert_eq!(plain, fresh, "{op} rank {rank}");
    }
}

#[test]
fn the_weight_alone_chooses_the_kernel() {
    let hopper = Gpu::emulated_hopper(0).unwrap();
    let tile = |depth, columns| Tile::of(&hopper, depth, columns);
    assert_eq!(tile(4096, 14336), Some(WIDE));
    assert_eq!(tile(4096, 1024), Some(WIDE));
    assert_eq!(tile(4096, 512), Some(NARROW));
    assert_eq!(tile(14336, 16), None);
    assert_eq!(tile(0, 4096), None);
    assert_eq!(Tile::of(&Gpu::emulated(0).unwrap(), 4096, 4096), None);
    for tile in TILES {
        assert!(tile.shared_bytes() <= hopper.properties().shared_bytes);
    }
    // And the products ask it.
    for op in ["nt", "nn"] {
        let case = Case::new(op, (70, 72, 72)).adapted(8);
        let chosen = bits(&case.run(&hopper, None).unwrap());
        assert_eq!(chosen, bits(&case.run_by(&hopper, Way::Hopper(NARROW)).unwrap()));
        let (empty, nothing) = (Case::new(op, (3, 0, 72)), Case::new(op, (0, 8, 72)));
        assert_eq!(empty.run(&hopper, None).unwrap(), [bf16::ZERO; 3 * 72]);
        assert_eq!(nothing.run(&hopper, None).unwrap(), []);
    }
}

/// Orders in which threads run, copies land and products are made.
const SEEDS: u64 = 12;

/// Whether all is right with a fault in the sources.
fn products_are_right(seed: u64, fault: Fault) -> bool {
    let gpu = Gpu::emulated_hopper_with_fault(seed, fault).unwrap();
    // More slices than stages, no tile full, several to a cluster, of which some have one piece.
    let cases = [
        (Case::new("nt", (600, 456, 296)).adapted(16).biased().adding_apart(), WIDE),
        (Case::new("nt", (600, 456, 400)), WIDE),
        (Case::new("nn", (600, 456, 328)).adapted(80).adding(), NARROW),
    ];
    cases.iter().all(|(case, tile)| match case.run_by(&gpu, Way::Hopper(*tile)) {
        Ok(out) => catch_unwind(AssertUnwindSafe(|| case.assert_accurate(&out, tile))).is_ok(),
        Err(error) => {
            // A fault that does not compile would prove nothing.
            assert!(error.to_string().starts_with("kernel "), "{error}");
            false
        }
    })
}

fn assert_caught(file: &'static str, faults: &[(&'static str, &'static str)]) {
    for &(from, to) in faults {
        let caught = (0..SEEDS).any(|seed| !products_are_right(seed, Fault { file, from, to }));
        assert!(caught, "{file}: nothing is wrong with {to:?} for {from:?}");
    }
}

#[test]
fn faults_in_layers_together_are_caught() {
    let faults = [
        ("if (slice < length(second))", "if (slice <= length(second))"),
        ("        slice -= length(first);\n", ""),
        ("first.rank : at.x == 1 ? second.rank", "first.rank : at.x > 0 ? first.rank"),
        ("second.load_of(of_w, stage", "second.load_of(true, stage"),
        ("slice -= of_weight;", "slice -= first.of_weight;"),
        ("else if (at.x == 1) second", "else if (at.x == 2) second"),
    ];
    let case = Together::new(300, 136, &[(136, 16), (72, 100), (8, 40)]);
    let right = |seed, fault| {
        let gpu = Gpu::emulated_hopper_with_fault(seed, fault).unwrap();
        case.run(&gpu).is_ok_and(|out| {
            catch_unwind(AssertUnwindSafe(|| case.assert_accurate(&out, true))).is_ok()
        })
    };
    for (from, to) in faults {
        let caught = (0..4).any(|seed| !right(seed, Fault { file: "hopper.cu", from, to }));
        assert!(caught, "nothing is wrong with {to:?} for {from:?}");
    }
}

#[test]
fn faults_in_the_ring_are_caught() {
    assert_caught(
        "hopper.cuh",
        &[("if (++stage == COUNT) stage = 0, parity ^= 1;", "if (++stage == COUNT) stage = 0;")],
    );
    assert_caught(
        "hopper_product.cuh",
        &[
            // Phases.
            (
                "barrier_wait(shared.empty + turn.stage, turn.parity ^ 1);",
                "barrier_wait(shared.empty + turn.stage, turn.parity);",
            ),
            // Waits.
            ("barrier_wait(shared.empty + turn.stage, turn.parity ^ 1);", ""),
            (
                "(bool add) {\n        barrier_wait(shared.full + turn.stage, turn.parity);",
                "(bool add) {",
            ),
            ("if (k == 0) barrier_wait(shared.full + turn.stage, turn.parity);", ""),
            // Counts of bytes and of arrivals.
            (
                "barrier_arrive_expecting(full, STAGE_BYTES);",
                "barrier_arrive_expecting(full, STAGE_BYTES - LEFT_BYTES);",
            ),
            (
                "barrier_init(shared.empty + stage, MULTIPLIERS * CLUSTER);",
                "barrier_init(shared.empty + stage, MULTIPLIERS);",
            ),
            // A fence, and a barrier before the first copy.
            ("        fence_barrier_init();\n", ""),
            (
                "        fence_barrier_init();\n    }\n    cluster_sync();",
                "        fence_barrier_init();\n    }\n    __syncthreads();",
            ),
            // Stages that are given back too early, too late and to one block alone.
            (
                "wgmma_wait<1>();\n        release(shared, before, part.thread);",
                "wgmma_wait<1>();\n        release(shared, turn.stage, part.thread);",
            ),
            ("    hold(sums);\n    release(shared, before, part.thread);", "    hold(sums);"),
            (
                "barrier_arrive_at(shared.empty + stage, uint32_t(thread));",
                "barrier_arrive(shared.empty + stage);",
            ),
            // Registers that nobody gave back, and a block that ends before others are done with it.
            ("fewer_registers<FEW>();", ""),
            ("    // Others may still arrive at this block's barriers.\n    cluster_sync();", ""),
        ],
    );
}

#[test]
fn faults_in_the_sums_are_caught() {
    assert_caught(
        "hopper_product.cuh",
        &[
            ("been read.\n        wgmma_wait<1>();", "been read.\n        wgmma_wait<2>();"),
            ("    wgmma_wait<0>();\n    hold(sums);", "    hold(sums);"),
            ("turn.parity);\n        wgmma_fence();", "turn.parity);"),
            // Descriptors.
            ("part.index * PIECE_BYTES), 32 * k)", "part.index * PIECE_BYTES), 64 * k)"),
            ("PIECE_BYTES), 2048 * k)", "PIECE_BYTES), 32 * k)"),
            ("descriptor_across(right, PIECE_BYTES)", "descriptor_across(right, 1024)"),
            // Boxes.
            ("corner.y + rank * (TILE_N / CLUSTER)", "corner.y"),
            ("right + int(cluster_rank()) * (TILE_N / CLUSTER) * ROW_BYTES", "right"),
            ("int at = rank * HALF + panel;", "int at = panel;"),
            ("slice < of_weight ? slice : slice - of_weight", "slice"),
            ("++k < terms.steps(slice)", "++k < 1"),
            ("min(depth - slice * TILE_K, TILE_K)", "min(depth, TILE_K) - STEP"),
            // Sums that go on from the last tile, and tiles that are left out.
            ("step(k, add || k > 0)", "step(k, true)"),
            ("inside % height", "inside % GROUP"),
        ],
    );
}

#[test]
fn faults_in_pieces_are_caught() {
    assert_caught(
        "hopper_product.cuh",
        &[
            (
                "swizzled<8>(thread / 32 * 16 + thread % 16, group + thread % 32 / 16)",
                "swizzled<8>(thread / 32 * 16 + thread % 16, group)",
            ),
            ("parities ^= 1u << at;", ""),
            ("barrier_wait(shared.arrived + part.index * STAGED + at, parities >> at & 1);", ""),
            ("    fence_async(piece, PIECE_BYTES);\n", ""),
            (
                "    part.sync();\n    if (part.thread != 0) return;",
                "    if (part.thread != 0) return;",
            ),
            ("else tma_store_wait<1>();", ""),
            ("if (first) tma_store_wait<0>();\n        else ", ""),
            (
                "        else tma_store_wait<1>();\n    }\n    part.sync();",
                "        else tma_store_wait<1>();\n    }",
            ),
            ("if (part.thread == 0) tma_store_wait<0>(); // shared memory ends with the block", ""),
        ],
    );
}

#[test]
fn faults_in_what_is_written_are_caught() {
    assert_caught(
        "hopper.cu",
        &[
            ("tma_store_wait<0>(); // or the old would land on the new", ""),
            ("tma_store_wait<0>(); // of the tile before", ""),
            ("if (bias && bias_at < columns)", "if (bias && bias_at < 0)"),
            ("8 * (group + i / 2)", "8 * (group + i % 2)"),
            ("value.x += before.x, value.y += before.y;", "value.x += before.x;"),
            ("32 * piece + 4 * group + 2 * i", "32 * piece + 4 * group + 2 * (i ^ 1)"),
        ],
    );
}

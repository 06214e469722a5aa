//! Faults planted in the sources, each of which some order of threads must show: as wrong numbers, or as
//! something that the emulated device does not allow.

use super::adapter::tests::{Case as Gradient, Shared};
use super::tests::Case;
use super::*;
use crate::testing::faulty_gpu;
use std::panic::{AssertUnwindSafe, catch_unwind};

const SEEDS: u64 = 8;

/// Whether a run was right: the device let it pass, and the numbers are.
fn is_right<T>(run: Result<T>, assert_accurate: impl FnOnce(&T)) -> bool {
    match run {
        Ok(found) => catch_unwind(AssertUnwindSafe(|| assert_accurate(&found))).is_ok(),
        Err(error) => {
            // A fault that does not compile would prove nothing.
            assert!(error.to_string().starts_with("kernel "), "{error}");
            false
        }
    }
}

/// Fails unless the fault, `from` → `to` in `file`, makes `run` wrong.
fn assert_caught(
    file: &'static str,
    (from, to): (&'static str, &'static str),
    run: impl Fn(&Gpu) -> bool,
) {
    let caught = (0..SEEDS).any(|seed| !run(&faulty_gpu(seed, file, from, to)));
    assert!(caught, "{file}: nothing is wrong with {to:?} for {from:?}");
}

fn products_are_right(gpu: &Gpu) -> bool {
    // Nine slices in a ring of four: the last lies where the sums go. No tile or slice is full.
    let cases = [
        Case::new("nt", (67, 472, 72)).adapted(16).biased().adding(),
        Case::new("nn", (67, 472, 72)).adapted(16),
    ];
    cases.iter().all(|case| {
        let tile = Some(SMALL);
        is_right(case.run(gpu, tile), |out| case.assert_accurate(out, tile))
    })
}

#[test]
fn faults_in_the_sums_are_caught() {
    let step = "copy_async_wait<STAGES - 2>();\n        __syncthreads();\n";
    for fault in [
        // The barrier before a slice is read.
        (step, "copy_async_wait<STAGES - 2>();\n"),
        // A wait.
        (step, "copy_async_wait<STAGES - 1>();\n        __syncthreads();\n"),
        ("        copy_async_commit();\n", ""),
        // A place in the ring that is taken too early.
        ("load(slice + STAGES - 1);", "load(slice + STAGES);"),
        // Swizzles.
        (
            "stage + swizzled<TILE_K / 8>(row + 16 * i + lane % 16, k / 8 + lane / 16)",
            "stage + (row + 16 * i + lane % 16) * TILE_K * 2 + (k / 8 + lane / 16) * 16",
        ),
        (
            "right_tile + swizzled<TILE_N / 8>(k + lane % 16, at / 8 + lane / 16)",
            "right_tile + swizzled<TILE_N / 8>(k + lane / 16 * 8 + lane % 8, at / 8 + lane / 8 % 2)",
        ),
        // Sums.
        ("(slice - of_weight) * TILE_K", "slice * TILE_K"),
        ("divide_up(adapter.depth, TILE_K)", "0"),
        ("inside % height", "inside % GROUP"),
    ] {
        assert_caught("product.cuh", fault, products_are_right);
    }
}

#[test]
fn faults_in_the_products_are_caught() {
    for fault in [
        // A barrier each: before sums take the place of slices, before sums are read.
        ("still read.\n    __syncthreads();", "still read.\n"),
        ("    __syncthreads();\n    constexpr int CHUNKS", "    constexpr int CHUNKS"),
        // Bounds.
        ("out_row >= rows || ", ""),
        (" || out_column >= columns", ""),
        // Sums.
        ("if (before) add_to(values, load16(before + at));", ""),
        ("if (bias) add_to(values, load16(bias + out_column));", ""),
        ("sums[DOWN][ACROSS][4] = {}", "sums[DOWN][ACROSS][4] = {{{1.0f}}}"),
    ] {
        assert_caught("matmul.cu", fault, products_are_right);
    }
}

#[test]
fn faults_in_tiles_are_caught() {
    for fault in [
        ("inside && row + first + r < rows", "inside"),
        ("bool inside = column + 8 * chunk < columns;", "bool inside = true;"),
        ("(row / TOGETHER % EXCHANGED)", "(row / TOGETHER % EXCHANGED + 1)"),
        ("values[i] += more[i]", "values[i] = more[i]"),
        ("pack_bf16(values[2], values[3])", "pack_bf16(values[3], values[2])"),
    ] {
        assert_caught("tile.cuh", fault, products_are_right);
    }
}

#[test]
fn faults_in_few_rows_are_caught() {
    let few_is_right = |gpu: &Gpu| {
        let case = Case::new("few", (7, 264, 37)).adapted(8).biased().adding();
        is_right(case.run(gpu, None), |out| case.assert_accurate(out, "any"))
    };
    for fault in [
        ("if (add) sum += ", "if (add) sum = "),
        ("if (bias) sum += ", "if (bias) sum = "),
        ("i >= rows || ", ""),
        (" || column + j >= columns", ""),
        ("min(i, rows - 1)", "i"),
        ("min(column + j, columns - 1)", "(column + j)"),
        ("k < depth; k += 8 * WARP", "k <= depth; k += 8 * WARP"),
        ("float sum = warp_sum(sums[i][j]);", "float sum = sums[i][j];"),
        ("fmaf(values[e], weights[j][e], sums[i][j])", "values[e] * weights[j][e]"),
    ] {
        assert_caught("few.cu", fault, few_is_right);
    }
}

fn gradients_are_right(gpu: &Gpu) -> bool {
    let case = Gradient::new((301, 1064), 5);
    is_right(case.run(gpu), |found| case.assert_accurate(found))
}

#[test]
fn faults_in_gradients_are_caught() {
    let step = "copy_async_wait<STAGES - 2>();\n        __syncthreads();\n";
    for fault in [
        (step, "copy_async_wait<STAGES - 2>();\n"),
        (step, "copy_async_wait<STAGES - 1>();\n        __syncthreads();\n"),
        ("load(slice + STAGES - 1);", "load(slice + STAGES);"),
        // What du is added from.
        ("reading the slice.\n    __syncthreads();", "reading the slice.\n"),
        (
            "    __syncthreads();\n    for (int i = int(threadIdx.x)",
            "    for (int i = int(threadIdx.x)",
        ),
        ("sum += shares[", "sum = shares["),
        ("if (token < last) partial", "partial"),
        // b in the ring.
        ("copy_async_wait<0>();\n    __syncthreads();", "copy_async_wait<0>();"),
        ("copy_async_wait<0>();\n", ""),
        ("filled with slices.\n    __syncthreads();", "filled with slices.\n"),
        // A swizzle.
        (
            "stage + swizzled<COLUMNS / 8>(16 * t + lane % 16, chunk)",
            "stage + (16 * t + lane % 16) * COLUMNS * 2 + chunk * 16",
        ),
        // Bounds.
        ("min(first + span, factors.tokens)", "first + span"),
        ("at < factors.columns && ", ""),
        (" && at_rank < rank", ""),
        ("e / 2 * 8", "e % 2 * 8"),
    ] {
        assert_caught("lowrank.cu", fault, gradients_are_right);
    }
    for fault in [
        ("gradient[at] += ", "gradient[at] = "),
        (" : scale;", " : 1.0f;"),
        ("sum += partial[part * length + at]", "sum = partial[part * length + at]"),
        ("if (at >= (i == 0 ? length0 : i == 1 ? length1 : length2)) return;", ""),
        ("if (at < length) du", "du"),
    ] {
        assert_caught("partials.cu", fault, gradients_are_right);
    }
}

/// Three adapters with one input: more groups than a block takes, ranks that are filled up.
fn shared_are_right(gpu: &Gpu) -> bool {
    let cases =
        [Shared::new((70, 472), &[16, 40, 5], true), Shared::new((140, 72), &[16, 16], false)];
    cases.iter().all(|case| is_right(case.run(gpu), |found| case.assert_accurate(found)))
}

#[test]
fn faults_in_what_adapters_share_are_caught() {
    let step = "copy_async_wait<STAGES - 2>();\n        __syncthreads();\n";
    for fault in [
        (step, "copy_async_wait<STAGES - 2>();\n"),
        (step, "copy_async_wait<STAGES - 1>();\n        __syncthreads();\n"),
        ("load(slice + STAGES - 1);", "load(slice + STAGES);"),
        ("first + group < groups ? 16 * inside + 16 : 0", "16 * inside + 16"),
        ("if (first + group >= groups) break;", ""),
        ("if (at >= rows) continue;", ""),
        ("lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2", "lane % 16, k / 8 + lane / 16"),
        ("sums[group][j][2 * half], ", "sums[group][j][half], "),
    ] {
        assert_caught("project.cu", fault, shared_are_right);
    }
    for fault in [
        ("which == 2 ? third_at : which == 1", "which == 1"),
        ("third_at - second_at : second_at", "second_at : second_at"),
    ] {
        assert_caught("three.cuh", fault, shared_are_right);
    }
    for fault in [
        ("column < factors.ranks", "true"),
        ("(column - begin)", "column"),
        ("third ? factors.u[2] : second", "second"),
        ("inside && token + first + i < last", "inside"),
    ] {
        assert_caught("lowrank.cu", fault, shared_are_right);
    }
    for fault in [
        ("scale * to_float(columns[at % width])", "scale"),
        ("i == 0 ? 0 : i == 1 ? begin1 : begin2", "i == 0 ? 0 : begin1"),
        ("i == 0 ? gradient0 : i == 1", "i <= 1"),
    ] {
        assert_caught("partials.cu", fault, shared_are_right);
    }
}

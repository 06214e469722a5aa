//! What only Hopper has: right use gives right numbers in every order, wrong use does not.

use super::*;
use crate::cuda::TILE;
use crate::testing::together;

static SOURCE: Source =
    Source { name: "hopper.cu", text: include_str!("hopper.cu"), headers: &[HOPPER, TILE] };

const fn kernel(name: &'static str, threads: u32) -> Kernel {
    Kernel::new(&SOURCE, name, threads)
}

fn emulated(seed: u64) -> Gpu {
    Gpu::emulated_hopper(seed).unwrap()
}

fn faulty(seed: u64, from: &'static str, to: &'static str) -> Gpu {
    Gpu::emulated_hopper_with_fault(seed, Fault { file: "hopper.cu", from, to }).unwrap()
}

/// What came of a run, or what was said of its mistake.
type Ran = Result<Vec<f32>>;

/// `a [m, k] b [n, k]ᵀ` in f32.
fn product(a: &[f32], b: &[f32], k: usize) -> Vec<f32> {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).fold(0.0, |sum, (x, y)| sum + x * y);
    a.chunks(k).flat_map(|x| b.chunks(k).map(move |y| dot(x, y))).collect()
}

fn close(found: &[f32], expected: &[f32], tolerance: f32) -> bool {
    found.len() == expected.len()
        && found.iter().zip(expected).all(|(f, e)| (f - e).abs() <= tolerance * e.abs().max(1.0))
}

const DEPTH: usize = 456;
const ROWS: usize = 300;

fn pipeline(gpu: &Gpu, x: &[bf16], w: &[bf16]) -> Ran {
    let (x, w) = (gpu.uploaded(x)?, gpu.uploaded(w)?);
    let mut y = gpu.alloc::<bf16>(ROWS * 64)?;
    let maps = args![
        gpu.tensor_map(&x, [ROWS, DEPTH], 128)?,
        gpu.tensor_map(&w, [64, DEPTH], 32)?,
        gpu.tensor_map_mut(&mut y, [ROWS, 64], 64)?,
        DEPTH as i32,
    ];
    gpu.launch(&kernel("pipeline", 384), [4, 1, 1], 3 * 24_576 + 16_384 + 48, maps)?;
    Ok(widen(&gpu.downloaded(&y)?))
}

fn pipeline_is_right(gpu: &Gpu) -> bool {
    let (x, w) = (random_bf16(ROWS * DEPTH, 1), random_bf16(64 * DEPTH, 2));
    // One rounding to bf16, and some of f32.
    let expected = product(&widen(&x), &widen(&w), DEPTH);
    match pipeline(gpu, &x, &w) {
        Ok(y) => close(&y, &expected, 0.005),
        Err(error) => {
            assert!(error.to_string().starts_with("kernel "), "{error}");
            false
        }
    }
}

#[test]
fn a_pipeline_of_copies_and_products_is_right_in_every_order() {
    for seed in 0..2 * SEEDS {
        assert!(pipeline_is_right(&emulated(seed)), "seed {seed}");
    }
}

#[test]
fn every_fault_in_a_pipeline_is_caught() {
    for (from, to) in [
        // Phases.
        ("(slice / STAGES & 1) ^ 1", "slice / STAGES & 1"),
        ("barrier_wait(full + stage, slice / STAGES & 1);", "barrier_wait(full + stage, 0);"),
        // Counts.
        ("barrier_init(empty + stage, 4);", "barrier_init(empty + stage, 3);"),
        (
            "barrier_arrive_expecting(full + stage, STAGE_BYTES);",
            "barrier_arrive_expecting(full + stage, STAGE_BYTES - 4096);",
        ),
        ("barrier_arrive_expecting(full + stage, STAGE_BYTES);", "barrier_arrive(full + stage);"),
        // Waits.
        ("barrier_wait(full + stage, slice / STAGES & 1);", ""),
        ("barrier_wait(empty + stage, (slice / STAGES & 1) ^ 1);", ""),
        ("wgmma_wait<0>(); // the stage is read", ""),
        ("tma_store_wait<0>(); // before the block ends", ""),
        ("named_barrier_sync(1 + part, 128);", ""),
        // A stage that is given back before it has been read, and one that only its own block gives back.
        (
            "wgmma_wait<0>(); // the stage is read\n            if (thread < 2) barrier_arrive_at(empty + stage, thread);",
            "if (thread < 2) barrier_arrive_at(empty + stage, thread);\n wgmma_wait<0>();",
        ),
        ("barrier_arrive_at(empty + stage, thread);", "barrier_arrive(empty + stage);"),
        // Fences.
        ("fence_async(staged, matrix_bytes(64));", ""),
        ("fence_barrier_init(); // for the cluster", ""),
        ("wgmma_fence(); // also the sums", ""),
        // Blocks that begin before others are ready, and end before others are done with them.
        ("cluster_sync(); // before the first copy", "__syncthreads();"),
        ("cluster_sync(); // with all arrivals from elsewhere", ""),
        // Descriptors.
        ("advanced(left, 32 * k)", "advanced(left, 16 * k)"),
        ("STAGE_BYTES + matrix_bytes(128));", "STAGE_BYTES + matrix_bytes(136));"),
        // Registers that nobody gave back.
        ("fewer_registers<40>();", ""),
        // The staged tile's swizzle.
        ("swizzled<8>(at, g + thread % 32 / 16)", "at * 128 + (g + thread % 32 / 16) * 16"),
        ("slice > 0 || k > 0", "k > 0"),
    ] {
        assert!(!always(|seed| pipeline_is_right(&faulty(seed, from, to))), "{from:?} → {to:?}");
    }
}

#[test]
fn every_fault_in_how_matrices_are_described_is_caught() {
    for (from, to) in [
        ("matrix_descriptor(matrix, 16, 1024)", "matrix_descriptor(matrix, 16, 512)"),
        ("uint64_t(1) << 62", "uint64_t(2) << 62"),
        ("descriptor + (bytes >> 4)", "descriptor + (bytes >> 5)"),
    ] {
        let fault = || Fault { file: "hopper.cuh", from, to };
        let gpu = |seed| Gpu::emulated_hopper_with_fault(seed, fault()).unwrap();
        assert!(!always(|seed| pipeline_is_right(&gpu(seed))), "{from:?} → {to:?}");
    }
    let (from, to) =
        ("matrix_descriptor(matrix, panel, 1024)", "matrix_descriptor(matrix, 1024, panel)");
    let gpu = Gpu::emulated_hopper_with_fault(0, Fault { file: "hopper.cuh", from, to }).unwrap();
    assert!(!operands_are_right(&gpu, 128));
}

/// `[columns, rows]`, each row filled up to a multiple of `to` columns with numbers that must not count.
fn transposed(x: &[bf16], columns: usize, to: usize) -> Vec<bf16> {
    let rows = x.len() / columns;
    let wide = rows.next_multiple_of(to);
    let at = |i: usize, j: usize| if j < rows { x[j * columns + i] } else { bf16::from_f32(9.0) };
    (0..columns * wide).map(|e| at(e / wide, e % wide)).collect()
}

fn operands_are_right(gpu: &Gpu, n: usize) -> bool {
    let (a, bt) = (random_bf16(64 * 16, 1), random_bf16(n * 16, 2));
    let expected = product(&widen(&a), &widen(&bt), 16);
    let padded = |x: &[bf16]| transposed(&transposed(x, 16, 1), x.len() / 16, 64);
    let operands = [padded(&a), transposed(&a, 16, 64), padded(&bt), transposed(&bt, 16, 64)];
    let [a, at, bt, b] = operands.map(|x| gpu.uploaded(&x).unwrap());
    let mut d = gpu.alloc::<f32>(6 * 64 * n).unwrap();
    let maps = args![
        gpu.tensor_map(&a, [64, 64], 64).unwrap(),
        gpu.tensor_map(&at, [16, 64], 16).unwrap(),
        gpu.tensor_map(&bt, [n, 64], n as u32).unwrap(),
        gpu.tensor_map(&b, [16, n], 16).unwrap(),
        &mut d,
    ];
    let name = match n {
        64 => "multiply_64",
        128 => "multiply_128",
        _ => "multiply_256",
    };
    let shared = 128 * (64 + 16 + n + n / 64 * 16) + 8;
    match gpu.launch(&kernel(name, 128), [1, 1, 1], shared as u32, maps) {
        Ok(()) => gpu
            .downloaded(&d)
            .unwrap()
            .chunks(64 * n)
            .all(|form| form.iter().zip(&expected).all(|(f, e)| (f - e - 1.0).abs() < 1e-4)),
        Err(error) => {
            assert!(error.to_string().starts_with("kernel "), "{error}");
            false
        }
    }
}

#[test]
fn operands_of_every_form_are_read_as_they_are_described() {
    for (n, seed) in [(64, 0), (128, 1), (256, 2), (64, 3)] {
        assert!(operands_are_right(&emulated(seed), n), "{n} columns, seed {seed}");
    }
}

fn copies_are_right(gpu: &Gpu) -> bool {
    let (rows, columns) = (50, 264);
    let x = random_bf16(rows * columns, 1);
    let from = gpu.uploaded(&x).unwrap();
    let mut y = gpu.alloc::<bf16>(rows * columns).unwrap();
    let maps = args![
        gpu.tensor_map(&from, [rows, columns], 32).unwrap(),
        gpu.tensor_map_mut(&mut y, [rows, columns], 32).unwrap(),
        5,
    ];
    if gpu.launch(&kernel("copies", 32), [2, 1, 1], 3 * 4096 + 8, maps).is_err() {
        return false;
    }
    let y = widen(&gpu.downloaded(&y).unwrap());
    let x = widen(&x);
    (0..rows * columns).all(|at| {
        let (row, column) = (at / columns, at % columns);
        let source = row / 32 * 32 + 31 - row % 32;
        y[at] == if source < rows { x[source * columns + column] } else { 0.0 }
    })
}

#[test]
fn boxes_are_copied_with_zeros_outside() {
    assert!(always(|seed| copies_are_right(&emulated(seed))));
    for (from, to) in [
        ("tma_store_wait<1>();", "tma_store_wait<2>();"),
        ("barrier_wait(barrier, i & 1);", ""),
        (
            "fence_async(to, matrix_bytes(32));\n        __syncwarp();",
            "fence_async(to, matrix_bytes(32));",
        ),
        ("fence_async(to, matrix_bytes(32));", ""),
        ("if (lane == 0) tma_store_wait<0>();", ""),
        ("swizzled<8>(31 - lane, c)", "swizzled<8>(31 - lane, c ^ 1)"),
    ] {
        assert!(!always(|seed| copies_are_right(&faulty(seed, from, to))), "{from:?} → {to:?}");
    }
}

/// Boxes of heads at every edge.
fn heads_are_right(gpu: &Gpu) -> bool {
    let sides @ [rows, heads, columns] = [20, 5, 72];
    let x = random_bf16(rows * heads * columns, 1);
    let from = gpu.uploaded(&x).unwrap();
    [(0, 0, 0), (64, 3, 5), (8, 4, 17)].into_iter().all(|(column, head, row)| {
        let mut y = gpu.alloc::<bf16>(18 * 64).unwrap();
        let map = gpu.tensor_map_of_heads(&from, sides, [6, 3]).unwrap();
        let args = args![map, &mut y, column as i32, head as i32, row as i32];
        gpu.launch(&kernel("heads", 32), [1, 1, 1], 18 * 128 + 8, args).unwrap();
        let y = gpu.downloaded(&y).unwrap();
        (0..18 * 64).all(|at| {
            let (i, c) = (at / 64, column + at % 64);
            let (r, h) = (row + i / 3, head + i % 3);
            let inside = r < rows && h < heads && c < columns;
            y[at] == if inside { x[(r * heads + h) * columns + c] } else { bf16::ZERO }
        })
    })
}

#[test]
fn boxes_of_heads_come_as_rows() {
    assert!(always(|seed| heads_are_right(&emulated(seed))));
}

fn turns_are_right(gpu: &Gpu) -> bool {
    let mut out = gpu.alloc::<f32>(128).unwrap();
    let launched = gpu.launch(&kernel("turns", 256), [1, 1, 1], 512, args![&mut out, 6]);
    let mut expected: Vec<f32> = vec![0.0; 128];
    for _ in 0..12 {
        expected = (0..128).map(|t| expected[127 - t] + t as f32).collect();
    }
    launched.is_ok() && gpu.downloaded(&out).unwrap() == expected
}

#[test]
fn named_barriers_give_turns() {
    assert!(always(|seed| turns_are_right(&emulated(seed))));
    for (from, to) in [
        ("named_barrier_sync(1 + mine, 256);", ""),
        ("named_barrier_sync(3 + mine, 128);", ""),
        ("named_barrier_arrive(2 - mine, 256);", "named_barrier_arrive(1 + mine, 256);"),
        ("if (mine == 1) named_barrier_arrive(1, 256);", ""),
    ] {
        assert!(!always(|seed| turns_are_right(&faulty(seed, from, to))), "{from:?} → {to:?}");
    }
}

/// Two halves of a matrix's columns, the second from the middle of its rows on.
fn halves_are_right(gpu: &Gpu) -> bool {
    let (a, bt) = (random_bf16(64 * 16, 1), random_bf16(64 * 16, 2));
    let expected = product(&widen(&a), &widen(&bt), 16);
    let [at, b] = [&a, &bt].map(|x| gpu.uploaded(&transposed(x, 16, 64)).unwrap());
    let mut d = gpu.alloc::<f32>(2 * 64 * 32).unwrap();
    let [at, b] = [&at, &b].map(|x| gpu.tensor_map(x, [16, 64], 16).unwrap());
    gpu.launch(&kernel("halves", 128), [1, 1, 1], 128 * 32 + 8, args![at, b, &mut d]).unwrap();
    let d = gpu.downloaded(&d).unwrap();
    (0..64 * 64).all(|at| {
        let (row, column) = (at / 64, at % 64);
        (d[(column / 32 * 64 + row) * 32 + column % 32] - expected[at]).abs() < 1e-4
    })
}

#[test]
fn operands_begin_within_a_row() {
    assert!(always(|seed| halves_are_right(&emulated(seed))));
}

fn order_is_right(gpu: &Gpu) -> bool {
    const COUNT: usize = 36;
    const BLOCKS: usize = 12;
    let parts: Vec<f32> = random(COUNT * BLOCKS, 1).iter().map(|x| x * x * x).collect();
    let mut expected = parts[..COUNT].to_vec();
    for part in parts[COUNT..].chunks(COUNT) {
        expected.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
    }
    let parts = gpu.uploaded(&parts).unwrap();
    let mut sums = gpu.alloc::<f32>(COUNT).unwrap();
    let mut words = gpu.uploaded(&[0i32, 0]).unwrap();
    let args = args![&parts, &mut sums, &mut words, COUNT as i32];
    let kernel = kernel("in_order", 32);
    let launched = together(|| gpu.launch(&kernel, [BLOCKS as u32, 1, 1], 4 * COUNT as u32, args));
    launched.is_ok() && gpu.downloaded(&sums).unwrap() == expected
}

#[test]
fn blocks_add_in_order() {
    assert!(always(|seed| order_is_right(&emulated(seed))));
    for (from, to) in [
        ("            acquire_when(words + 1, number);\n", ""),
        ("            fence_async_global();\n", ""),
        ("bulk_add(sums, staged", "bulk_store(sums, staged"),
        ("        tma_store_commit();\n        tma_store_wait<0>();\n        for", "        for"),
        ("        tma_store_wait<0>();\n        for (int i = 0; i", "        for (int i = 0; i"),
        ("        bulk_wait<0>();\n", ""),
        ("    fence_async(staged, 4 * count);\n    __syncwarp();\n    if", "    if"),
        ("store_release(words + 1, number + 1);", "store_release(words + 1, number + 2);"),
        ("        store_release(words + 1, number + 1);\n", ""),
        ("lane == 0 ? atomicAdd(words, 1) : 0", "int(blockIdx.x)"),
    ] {
        assert!(!always(|seed| order_is_right(&faulty(seed, from, to))), "{from:?} → {to:?}");
    }
}

/// What the emulation assumes of Hopper, an assumption a test: the right uses above, also on a GPU.
mod hardware {
    use super::*;
    use crate::testing::hopper_gpu as gpu;

    #[test]
    fn boxes_come_swizzled_and_go_with_what_is_outside_left_out() {
        assert!(always(|seed| copies_are_right(&gpu(seed))));
    }

    #[test]
    fn boxes_of_three_sides_come_as_rows() {
        assert!(always(|seed| heads_are_right(&gpu(seed))));
    }

    #[test]
    fn wgmma_reads_matrices_as_its_descriptors_say() {
        for (seed, n) in [64, 128, 256].into_iter().enumerate() {
            assert!(operands_are_right(&gpu(seed as u64), n), "{n} columns");
        }
    }

    #[test]
    fn wgmma_reads_columns_from_the_middle_of_rows() {
        assert!(always(|seed| halves_are_right(&gpu(seed))));
    }

    #[test]
    fn bulk_copies_add_in_the_order_that_words_give() {
        assert!(always(|seed| order_is_right(&gpu(seed))));
    }

    #[test]
    fn barriers_count_bytes_and_phases_across_a_cluster() {
        assert!(always(|seed| pipeline_is_right(&gpu(seed))));
    }

    #[test]
    fn named_barriers_meet_by_number() {
        assert!(always(|seed| turns_are_right(&gpu(seed))));
    }
}

#[test]
fn mistakes_are_said() {
    let expected = [
        "barrier_arrive: the barrier is not initialised",
        "barrier_arrive_at: the barrier's initialisation is not fenced",
        "deadlock: of 256 threads",
        "tma_load: the box at byte 64 of shared memory is not aligned to 128 bytes",
        "tma_store: the tensor map is of a matrix that is only read",
        "tma_load: the box at byte 0 lands on what threads wrote without fence_async",
        "tma_load: byte 16384 is outside the 16392 bytes of shared memory",
        "a box of tma_load is still under way",
        "tma_load: the cluster has 2 blocks, the mask is 4",
        "deadlock: of 256 threads",
        "setmaxnreg: from 255 registers to 248",
        "named_barrier_sync: barrier 1 is waited for by",
        "wgmma: registers are not fenced (wgmma_fence) since the last wait",
        "does not begin where the swizzle's pattern does",
        "wgmma: swizzle mode 0 is not emulated",
        "wgmma: threads",
        "ended before wgmma_wait",
        "wgmma: byte 16384 is outside the 16392 bytes of shared memory",
        "deadlock: of 256 threads",
    ];
    for (what, expected) in expected.into_iter().enumerate() {
        for seed in [0, 1, 2] {
            // Under this one the box lands while its block waits for the other to begin.
            if (what, seed) == (7, 1) {
                continue;
            }
            let gpu = emulated(seed);
            let x = gpu.uploaded(&random_bf16(64 * 64, 1)).unwrap();
            let mut out = gpu.alloc::<f32>(128).unwrap();
            let args = args![gpu.tensor_map(&x, [64, 64], 32).unwrap(), &mut out, what as i32];
            let done = gpu.launch(&kernel("wrong", 128), [2, 1, 1], 16_392, args);
            let said = done.err().map_or("nothing".into(), |error| error.to_string());
            assert!(said.contains(expected), "{what}, seed {seed}: {said}");
        }
    }
}

#[test]
fn launches_and_tensor_maps_that_do_not_fit_are_refused() {
    let gpu = emulated(0);
    let x = gpu.uploaded(&random_bf16(64 * 12, 1)).unwrap();
    let said = |result: Result<TensorMap>| result.err().unwrap().to_string();
    assert!(said(gpu.tensor_map(&x, [64, 12], 64)).contains("every 24 bytes"));
    assert!(said(gpu.tensor_map(&x[1..9], [1, 8], 64)).contains("must be multiples of 16"));
    assert!(said(gpu.tensor_map(&x, [12, 64], 257)).contains("a box of 257 rows"));
    assert!(said(gpu.tensor_map(&x[..0], [0, 64], 64)).contains("sides are between"));
    let of_heads = |sides, boxes| said(gpu.tensor_map_of_heads(&x, sides, boxes));
    assert!(of_heads([32, 2, 12], [8, 2]).contains("every 24 bytes"));
    assert!(of_heads([12, 4, 16], [8, 257]).contains("a box of 257 rows"));
    let mut out = gpu.alloc::<f32>(128).unwrap();
    let map = gpu.tensor_map(&x, [12, 64], 32).unwrap();
    let said = gpu.launch(&kernel("wrong", 128), [3, 1, 1], 0, args![map, &mut out, 0]);
    let said = said.unwrap_err().to_string();
    assert_eq!(said, "kernel wrong: 3 blocks of 128 threads, in clusters of 2");
    let said = gpu.launch(&kernel("wrong", 128), [2, 1, 1], 0, args![&x, &mut out, 0]);
    let said = said.unwrap_err().to_string();
    assert_eq!(said, "kernel wrong: argument 0 has 8 bytes, its parameter 128");
}

/// What g++ takes the compiler for GPUs must take, too.
#[test]
fn every_wrapper_compiles_for_hopper() {
    let usage = super::super::registers::usage;
    let found = usage(Nvrtc::find().unwrap(), &kernel("pipeline", 384), "sm_90a").unwrap();
    assert_eq!(found.len(), 10);
    assert!(found.values().all(|usage| usage.stack == 0 && usage.spilled == 0), "{found:?}");
    assert_eq!(found["pipeline"].registers, 168, "a third of a block's, which setmaxnreg changes");
}

//! What only Hopper has: right use gives right numbers in every order, wrong use does not.

mod hardware;

use super::*;
use crate::cuda::TILE;

mod order;

static SOURCE: Source = Source {
    name: "hopper.cu",
    text: include_str!("hopper.cu"),
    headers: &[HOPPER, HOPPER_PRODUCTS, TILE],
};

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
        let fault = || Fault { file: "hopper_products.cuh", from, to };
        let gpu = |seed| Gpu::emulated_hopper_with_fault(seed, fault()).unwrap();
        assert!(!always(|seed| pipeline_is_right(&gpu(seed))), "{from:?} → {to:?}");
    }
    let (from, to) =
        ("matrix_descriptor(matrix, panel, 1024)", "matrix_descriptor(matrix, 1024, panel)");
    let gpu = Gpu::emulated_hopper_with_fault(0, Fault { file: "hopper_products.cuh", from, to })
        .unwrap();
    assert!(wrong_operands(&gpu, 128).is_some());
}

/// `[columns, rows]`.
fn transposed(x: &[bf16], columns: usize) -> Vec<bf16> {
    let rows = x.len() / columns;
    (0..x.len()).map(|e| x[e % rows * columns + e / rows]).collect()
}

/// The operands of a product's six forms in tests/hopper.cu.
const FORMS: [&str; 6] = [
    "a along, b along",
    "a along, b across",
    "a across, b along",
    "a across, b across",
    "a in registers, b along",
    "a in registers, b across",
];

/// What is wrong with products of n columns, if anything.
fn wrong_operands(gpu: &Gpu, n: usize) -> Option<String> {
    let (a, bt) = (random_bf16(64 * 64, 1), random_bf16(n * 64, 2));
    let expected = product(&widen(&a), &widen(&bt), 64);
    let operands = [a.clone(), transposed(&a, 64), bt.clone(), transposed(&bt, 64)];
    let [a, at, bt, b] = operands.map(|x| gpu.uploaded(&x).unwrap());
    let forms = if n < 64 { 4 } else { 6 };
    let mut d = gpu.alloc::<f32>(forms * 64 * n).unwrap();
    let maps = args![
        gpu.tensor_map(&a, [64, 64], 64).unwrap(),
        gpu.tensor_map(&at, [64, 64], 64).unwrap(),
        gpu.tensor_map(&bt, [n, 64], n as u32).unwrap(),
        gpu.tensor_map(&b, [64, n], 64).unwrap(),
        &mut d,
    ];
    let name = match n {
        16 => "multiply_16",
        32 => "multiply_32",
        48 => "multiply_48",
        64 => "multiply_64",
        128 => "multiply_128",
        _ => "multiply_256",
    };
    let shared = 128 * (64 + 64 + n + n.next_multiple_of(64)) + 8;
    if let Err(error) = gpu.launch(&kernel(name, 128), [1, 1, 1], shared as u32, maps) {
        assert!(error.to_string().starts_with("kernel "), "{error}");
        return Some(error.to_string());
    }
    let found = gpu.downloaded(&d).unwrap();
    FORMS.iter().zip(found.chunks(64 * n)).find_map(|(form, found)| {
        let off = |i: usize| (found[i] - expected[i] - 1.0).abs();
        let wrong = (0..64 * n).find(|&i| off(i).is_nan() || off(i) > 1e-3)?;
        let (row, column) = (wrong / n, wrong % n);
        let (found, expected) = (found[wrong], expected[wrong] + 1.0);
        Some(format!("{n} columns, {form}: row {row}, column {column} is {found}, not {expected}"))
    })
}

#[test]
fn operands_of_every_form_are_read_as_they_are_described() {
    for (n, seed) in [(64, 0), (128, 1), (256, 2), (64, 3), (16, 4), (48, 5)] {
        assert_eq!(wrong_operands(&emulated(seed), n), None, "seed {seed}");
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
    assert_eq!(found.len(), SOURCE.text.matches("\nHOPPER_KERNEL(").count());
    assert!(found.values().all(|usage| usage.stack == 0 && usage.spilled == 0), "{found:?}");
    assert_eq!(found["pipeline"].registers, 168, "a third of a block's, which setmaxnreg changes");
}

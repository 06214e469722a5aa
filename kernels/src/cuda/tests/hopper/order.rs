//! What attention's way back takes of Hopper besides: halves of rows as operands, sums that blocks add to in turns.

use super::*;
use crate::testing::together;

/// Two halves of a matrix's columns, the second from the middle of its rows on.
fn halves_are_right(gpu: &Gpu) -> bool {
    let (a, bt) = (random_bf16(64 * 16, 1), random_bf16(64 * 16, 2));
    let expected = product(&widen(&a), &widen(&bt), 16);
    let [at, b] = [&a, &bt].map(|x| gpu.uploaded(&transposed(x, 16)).unwrap());
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
        // Which block overtakes which is not the seed's alone.
        let caught = (0..8 * SEEDS).any(|seed| !order_is_right(&faulty(seed, from, to)));
        assert!(caught, "{from:?} → {to:?}");
    }
}

/// What the emulation assumes of these, also on a GPU.
mod hardware {
    use super::*;
    use crate::testing::hopper_gpu as gpu;

    #[test]
    fn wgmma_reads_columns_from_the_middle_of_rows() {
        assert!(always(|seed| halves_are_right(&gpu(seed))));
    }

    #[test]
    fn bulk_copies_add_in_the_order_that_words_give() {
        assert!(always(|seed| order_is_right(&gpu(seed))));
    }
}

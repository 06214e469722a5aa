//! What the emulation assumes of Hopper, an assumption a test: right uses, also on a GPU, before anything else is believed.

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
    for (seed, n) in [16, 32, 48, 64, 128, 256].into_iter().enumerate() {
        assert_eq!(wrong_operands(&gpu(seed as u64), n), None);
    }
}

/// Boxes that are larger than their matrix, that begin before it, and that lie wholly outside of it: a rank is less than 64 columns,
/// other adapters' columns may stand before it, the second block of a cluster may have no row.
#[test]
fn a_box_outside_its_matrix_is_zeros_and_counts_all_its_bytes() {
    let sides @ [rows, columns] = [5, 16];
    let x = random_bf16(rows * columns, 1);
    let places: [[i32; 2]; 9] = [
        [0, 0],
        [0, 2],
        [8, 0],
        [64, 0],
        [0, 128],
        [128, 256],
        [-16, 0],
        [-56, -3],
        [-48, 1 << 30],
    ];
    for (at, seed) in places.iter().zip(0..) {
        let (&[column, row], gpu) = (at, gpu(seed));
        let from = gpu.uploaded(&x).unwrap();
        let before = vec![bf16::from_f32(7.0); rows * columns];
        let mut y = gpu.uploaded(&before).unwrap();
        let (mut out, mut came) =
            (gpu.alloc::<bf16>(32 * 64).unwrap(), gpu.alloc::<u32>(1).unwrap());
        let maps = [gpu.tensor_map(&from, sides, 32), gpu.tensor_map_mut(&mut y, sides, 32)];
        let [x_map, y_map] = maps.map(|map| map.expect("a box larger than its matrix"));
        let args = args![x_map, y_map, &mut out, &mut came, column, row];
        gpu.launch(&kernel("box", 32), [1, 1, 1], 32 * 128 + 8, args).unwrap();
        assert_eq!(gpu.downloaded(&came).unwrap(), [1], "bytes of the box at {at:?}");
        let of = |r: i32, c: i32| match (0..rows as i32).contains(&r) && (0..16).contains(&c) {
            true => x[r as usize * columns + c as usize],
            false => bf16::ZERO,
        };
        let found = gpu.downloaded(&out).unwrap();
        for (i, found) in found.into_iter().enumerate() {
            let (r, c) = (row + i as i32 / 64, column + i as i32 % 64);
            assert_eq!(found, of(r, c), "the box at {at:?}, row {r}, column {c}");
        }
        // What is stored of it is what lies inside, and nothing else.
        for (i, found) in gpu.downloaded(&y).unwrap().into_iter().enumerate() {
            let (r, c) = ((i / columns) as i32, (i % columns) as i32);
            let inside = (row..row + 32).contains(&r) && (column..column + 64).contains(&c);
            let expected = if inside { x[i] } else { before[i] };
            assert_eq!(found, expected, "stored at {at:?}, row {r}, column {c}");
        }
    }
}

#[test]
fn a_cluster_shares_boxes_and_barriers() {
    for seed in 0..SEEDS {
        let gpu = gpu(seed);
        let x = random_bf16(32 * 64, 2);
        let from = gpu.uploaded(&x).unwrap();
        let (mut out, mut seen) =
            (gpu.alloc::<bf16>(2 * 32 * 64).unwrap(), gpu.alloc::<u32>(6).unwrap());
        let map = gpu.tensor_map(&from, [32, 64], 32).unwrap();
        let args = args![map, &mut out, &mut seen];
        gpu.launch(&kernel("neighbours", 32), [2, 1, 1], 32 * 128 + 16, args).unwrap();
        let seen = gpu.downloaded(&seen).unwrap();
        let expected = [0, 1, 1, 1, 1, 1];
        assert_eq!(seen, expected, "of each block: rank, whether its box and arrival came");
        let found = gpu.downloaded(&out).unwrap();
        assert!(found[..32 * 64] == x && found[32 * 64..] == x, "the box in both blocks");
    }
}

#[test]
fn registers_are_handed_over() {
    for seed in 0..SEEDS {
        let gpu = gpu(seed);
        let mut out = gpu.alloc::<u32>(384).unwrap();
        gpu.launch(&kernel("handed_over", 384), [1, 1, 1], 0, args![&mut out]).unwrap();
        assert!(gpu.downloaded(&out).unwrap().into_iter().eq(0..384), "what 384 threads wrote");
    }
}

#[test]
fn a_block_may_have_all_of_shared_memory_and_thirteen_maps() {
    let gpu = gpu(2);
    let bytes = gpu.properties().shared_bytes;
    assert_eq!(bytes, 227 << 10, "shared memory of a block");
    let (x, other) = (random_bf16(32 * 64, 3), gpu.alloc::<bf16>(32 * 64).unwrap());
    let from = gpu.uploaded(&x).unwrap();
    let (mut out, mut seen) =
        (gpu.alloc::<bf16>(2 * 32 * 64).unwrap(), gpu.alloc::<u32>(4).unwrap());
    let map = |of| gpu.tensor_map(of, [32, 64], 32).unwrap();
    let o = map(&other);
    let args =
        args![o, o, o, o, o, o, o, o, o, o, o, o, map(&from), &mut out, &mut seen, bytes as i32];
    gpu.launch(&kernel("large", 32), [2, 1, 1], bytes, args).unwrap();
    let expected = [0, 1, 0, 1];
    let seen = gpu.downloaded(&seen).unwrap();
    assert_eq!(seen, expected, "of each block: where its memory begins, whether its box came");
    let found = gpu.downloaded(&out).unwrap();
    assert!(found[..32 * 64] == x && found[32 * 64..] == x, "the last map's box");
}

#[test]
fn stmatrix_is_the_way_back_of_ldmatrix() {
    let gpu = gpu(1);
    // Lane l has row l / 4, columns 2 (l % 4) and the next, of each matrix.
    let at = |m: usize, row: usize, column: usize| (m * 64 + row * 8 + column) as u32;
    let pair = |m, l: usize| at(m, l / 4, l % 4 * 2) | at(m, l / 4, l % 4 * 2 + 1) << 16;
    let registers: Vec<u32> = (0..128).map(|i| pair(i / 32, i % 32)).collect();
    let given = gpu.uploaded(&registers).unwrap();
    let [mut plain, mut turned] = [0; 2].map(|_| gpu.alloc::<u32>(128).unwrap());
    let args = args![&given, &mut plain, &mut turned];
    gpu.launch(&kernel("stored", 32), [1, 1, 1], 512, args).unwrap();
    let words = |of: &dyn Fn(usize, usize, usize) -> u32| -> Vec<u32> {
        let word = |i: usize| (i / 32, i % 32 / 4, i % 4 * 2);
        (0..128).map(word).map(|(m, r, c)| of(m, r, c) | of(m, r, c + 1) << 16).collect()
    };
    assert_eq!(gpu.downloaded(&plain).unwrap(), words(&at), "stmatrix");
    let across = |m, row, column| at(m, column, row);
    assert_eq!(gpu.downloaded(&turned).unwrap(), words(&across), "stmatrix, transposed");
}

#[test]
fn barriers_count_bytes_and_phases_across_a_cluster() {
    assert!(always(|seed| pipeline_is_right(&gpu(seed))));
}

#[test]
fn named_barriers_meet_by_number() {
    assert!(always(|seed| turns_are_right(&gpu(seed))));
}

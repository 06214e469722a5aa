//! What the emulation assumes of a GPU, an assumption a test: to be run on the hardware before anything else is
//! believed (UFT_TEST_DEVICE=cuda), and in the emulation with everything else. Expected are the numbers that
//! device.cuh's comments and PTX's documentation promise, worked out here and not by the emulation.

use super::*;
use crate::args;
use crate::testing::{gpu, random, random_bf16};
use half::bf16;

static SOURCE: Source =
    Source { name: "hardware.cu", text: include_str!("hardware.cu"), headers: &[TILE] };

const fn kernel(name: &'static str, threads: u32) -> Kernel {
    Kernel::new(&SOURCE, name, threads)
}

/// Orders of threads in the emulation; on a GPU, as many runs.
const RUNS: u64 = 8;

fn on_every_device(check: impl Fn(&Gpu)) {
    (0..RUNS).for_each(|seed| check(&gpu(seed)));
}

/// Element `(row, column)` of matrix `m`, each of its own kind.
fn element(m: usize, row: usize, column: usize) -> u32 {
    (m * 64 + row * 8 + column) as u32
}

/// The register of each lane for the 8 × 8 matrix `m`: row lane / 4, columns 2 (lane % 4) and the next.
fn fragment(m: usize, transposed: bool) -> Vec<u32> {
    let at = |row, column| match transposed {
        true => element(m, column, row),
        false => element(m, row, column),
    };
    let of_lane = |l: usize| at(l / 4, l % 4 * 2) | at(l / 4, l % 4 * 2 + 1) << 16;
    (0..32).map(of_lane).collect()
}

fn check_ldmatrix(name: &'static str, count: usize) {
    // Bits that count up, not numbers: ldmatrix moves bits.
    let words: Vec<u32> = (0..count as u32 * 32).map(|i| (2 * i) | ((2 * i + 1) << 16)).collect();
    let expected =
        |transposed| -> Vec<u32> { (0..count).flat_map(|m| fragment(m, transposed)).collect() };
    on_every_device(|gpu| {
        let matrices = gpu.uploaded(&words).unwrap();
        let [mut plain, mut transposed] = [0; 2].map(|_| gpu.alloc::<u32>(count * 32).unwrap());
        let args = args![&matrices, &mut plain, &mut transposed];
        gpu.launch(&kernel(name, 32), [1, 1, 1], 512, args).unwrap();
        assert_eq!(gpu.downloaded(&plain).unwrap(), expected(false), "{name}");
        assert_eq!(gpu.downloaded(&transposed).unwrap(), expected(true), "{name}, transposed");
    });
}

#[test]
fn ldmatrix_x4_gives_each_lane_two_neighbours_of_a_row() {
    check_ldmatrix("load_x4", 4);
}

#[test]
fn ldmatrix_x2_reads_the_addresses_of_sixteen_lanes() {
    check_ldmatrix("load_x2", 2);
}

/// a `[16, 16]` and b `[16, 8]` as registers, by the layout that device.cuh says.
fn fragments(a: &[f32], b: &[f32]) -> [Vec<u32>; 2] {
    let pair = |low: f32, high: f32| {
        let bits = |x| u32::from(bf16::from_f32(x).to_bits());
        bits(low) | bits(high) << 16
    };
    let lanes = |count: usize| (0..count * 32).map(|i| (i / 32, i % 32 / 4, i % 4 * 2));
    let of_a = lanes(4).map(|(i, g, t)| {
        let at = (g + i % 2 * 8) * 16 + t + i / 2 * 8;
        pair(a[at], a[at + 1])
    });
    let of_b = lanes(2).map(|(i, g, t)| {
        let at = (t + i * 8) * 8 + g;
        pair(b[at], b[at + 8])
    });
    [of_a.collect(), of_b.collect()]
}

/// d `[16, 8]` as registers, and back.
fn accumulators(d: &[f32]) -> Vec<f32> {
    (0..128).map(|i| d[place(i)]).collect()
}

fn matrix(registers: &[f32]) -> Vec<f32> {
    let mut d = vec![f32::NAN; 128];
    (0..128).for_each(|i| d[place(i)] = registers[i]);
    d
}

/// Where register `i / 32` of lane `i % 32` lies in d.
fn place(i: usize) -> usize {
    let (i, g, t) = (i / 32, i % 32 / 4, i % 4 * 2);
    (g + i / 2 * 8) * 8 + t + i % 2
}

fn multiplied(gpu: &Gpu, a: &[f32], b: &[f32], d: &[f32]) -> Vec<f32> {
    let [of_a, of_b] = fragments(a, b).map(|registers| gpu.uploaded(&registers).unwrap());
    let mut of_d = gpu.uploaded(&accumulators(d)).unwrap();
    let args = args![&of_a, &of_b, &mut of_d];
    gpu.launch(&kernel("multiply", 32), [1, 1, 1], 0, args).unwrap();
    matrix(&gpu.downloaded(&of_d).unwrap())
}

/// Whole numbers, so that every order of adding gives the same.
#[test]
fn mma_has_its_fragments_where_the_documentation_says() {
    let whole = |n: usize, seed| -> Vec<f32> {
        random(n, seed).iter().map(|x| (x * 20.0).round()).collect()
    };
    let (a, b, d) = (whole(256, 1), whole(128, 2), whole(128, 3));
    let expected = |at: usize| -> f32 {
        d[at] + (0..16).map(|k| a[at / 8 * 16 + k] * b[k * 8 + at % 8]).sum::<f32>()
    };
    let expected: Vec<f32> = (0..128).map(expected).collect();
    on_every_device(|gpu| assert_eq!(multiplied(gpu, &a, &b, &d), expected));
}

/// What small terms add to a large one is not lost before the sum is rounded: 1 + 16 · 2⁻²².
#[test]
fn mma_adds_in_f32() {
    let small = (-11.0f32).exp2();
    let expected = 1.0 + (-18.0f32).exp2();
    on_every_device(|gpu| {
        let found = multiplied(gpu, &[small; 256], &[small; 128], &[1.0; 128]);
        assert_eq!(found, [expected; 128]);
    });
}

#[test]
fn mma_is_as_exact_as_a_sum_in_f32() {
    let (a, b) = (random_bf16(256, 4), random_bf16(128, 5));
    let (a, b) = (crate::testing::widen(&a), crate::testing::widen(&b));
    on_every_device(|gpu| {
        let found = multiplied(gpu, &a, &b, &[0.5; 128]);
        for (at, found) in found.into_iter().enumerate() {
            let terms =
                (0..16).map(|k| f64::from(a[at / 8 * 16 + k]) * f64::from(b[k * 8 + at % 8]));
            let (sum, size) = terms.fold((0.5, 0.5), |(sum, size), x| (sum + x, size + x.abs()));
            // One unit in the last place for each addition, of the largest that a partial sum can be.
            let allowed = 17.0 * size * f64::from(f32::EPSILON);
            assert!((f64::from(found) - sum).abs() <= allowed, "{at}: {found}, exact {sum}");
        }
    });
}

/// Every tile that kernels have, filled by asynchronous copies, partly from outside the matrix.
#[test]
fn swizzled_tiles_come_back_as_they_were() {
    let widths = [("tile_of_16", 16), ("tile_of_32", 32), ("tile_of_64", 64), ("tile_of_128", 128)];
    for (name, width) in widths {
        let numbers = random_bf16(64 * width, width as u64);
        for (rows, columns) in [(64, width), (37, width - 8)] {
            let inside = |row: usize, column: usize| match row < rows && column < columns {
                true => u32::from(numbers[row * width + column].to_bits()),
                false => 0,
            };
            let pair = |row, column| inside(row, column) | inside(row, column + 1) << 16;
            let plain: Vec<u32> =
                (0..32 * width).map(|i| pair(2 * i / width, 2 * i % width)).collect();
            let fragments = (0..width).flat_map(|m| {
                let (row, column) = (m / (width / 8) * 8, m % (width / 8) * 8);
                (0..32).map(move |l| (row + l / 4, column + l % 4 * 2))
            });
            let fragments: Vec<u32> = fragments.map(|(row, column)| pair(row, column)).collect();
            on_every_device(|gpu| {
                let matrix = gpu.uploaded(&numbers).unwrap();
                let [mut out, mut registers] =
                    [0; 2].map(|_| gpu.alloc::<u32>(32 * width).unwrap());
                let (rows, columns) = (rows as i32, columns as i32);
                let args = args![&matrix, rows, columns, &mut out, &mut registers];
                let shared = 64 * width as u32 * 2;
                gpu.launch(&kernel(name, 128), [1, 1, 1], shared, args).unwrap();
                assert!(gpu.downloaded(&out).unwrap() == plain, "{name}, {rows} rows: loads");
                let found = gpu.downloaded(&registers).unwrap();
                assert!(found == fragments, "{name}, {rows} rows: ldmatrix");
            });
        }
    }
}

#[test]
fn a_copy_of_nothing_writes_zeros_and_reads_no_address() {
    let words: Vec<u32> = (1..=128).collect();
    let expected: Vec<u32> =
        words.iter().map(|w| if (w - 1) / 4 % 2 == 0 { *w } else { 0 }).collect();
    on_every_device(|gpu| {
        let from = gpu.uploaded(&words).unwrap();
        let mut out = gpu.alloc::<u32>(128).unwrap();
        gpu.launch(&kernel("zero_fill", 32), [1, 1, 1], 512, args![&from, &mut out]).unwrap();
        assert_eq!(gpu.downloaded(&out).unwrap(), expected);
    });
}

#[test]
fn copies_are_there_when_their_group_is_waited_for() {
    let words: Vec<u32> = (0..512).collect();
    on_every_device(|gpu| {
        let from = gpu.uploaded(&words).unwrap();
        let mut out = gpu.alloc::<u32>(512).unwrap();
        let kernel = kernel("copies_in_order", 32);
        gpu.launch(&kernel, [1, 1, 1], 2048, args![&from, &mut out]).unwrap();
        assert_eq!(gpu.downloaded(&out).unwrap(), words);
    });
}

#[test]
fn arguments_arrive_and_shared_memory_is_aligned() {
    on_every_device(|gpu| {
        let some = gpu.uploaded(&[bf16::from_f32(1.5)]).unwrap();
        let mut out = gpu.alloc::<u64>(8).unwrap();
        let null: Option<&DeviceSlice<f32>> = None;
        let args =
            args![null, -7i32, 0.3f32, u64::MAX - 1, 4_000_000_000u32, -8i64, &some, &mut out];
        gpu.launch(&kernel("arguments", 32), [1, 1, 1], 64, args).unwrap();
        let expected = [
            1,
            -7i64 as u64,
            u64::from(0.3f32.to_bits()),
            u64::MAX - 1,
            4_000_000_000,
            -8i64 as u64,
            u64::from(bf16::from_f32(1.5).to_bits()),
            0,
        ];
        assert_eq!(gpu.downloaded(&out).unwrap(), expected);
    });
}

/// More blocks than the two other dimensions of a grid may have.
#[test]
fn a_grid_is_longer_than_65535_blocks() {
    const BLOCKS: usize = 70_001;
    let gpu = gpu(1);
    let mut out = gpu.alloc::<u32>(BLOCKS).unwrap();
    gpu.launch(&kernel("many_blocks", 32), [BLOCKS as u32, 1, 1], 0, args![&mut out]).unwrap();
    assert!(gpu.downloaded(&out).unwrap().into_iter().eq(0..BLOCKS as u32));
}

#[test]
fn lanes_talk_to_each_other() {
    on_every_device(|gpu| {
        let mut out = gpu.alloc::<i32>(288).unwrap();
        gpu.launch(&kernel("warp_functions", 32), [1, 1, 1], 0, args![&mut out]).unwrap();
        let out = gpu.downloaded(&out).unwrap();
        for t in 0..32 {
            let found: Vec<i32> = out.iter().skip(t).step_by(32).copied().collect();
            let t = t as i32;
            let down = if t + 3 < 32 { t + 3 } else { t };
            let up = if t >= 3 { t - 3 } else { t };
            let ballot = (0..32).filter(|i| i % 3 == 0).fold(0u32, |bits, i| bits | 1 << i) as i32;
            let expected = [(t + 5) % 32, t ^ 9, down, up, ballot, 2, 31 * 16, 16, t ^ 1];
            assert_eq!(found, expected, "lane {t}");
        }
    });
}

/// Sums in the order that the source says, so to the bit.
#[test]
fn blocks_add_up_in_a_fixed_order() {
    let numbers = random(512, 6);
    let halves = |mut x: Vec<f32>| -> f32 {
        // As warp_sum: each lane adds the one at half the distance.
        let mut distance = 16;
        while distance > 0 {
            x = (0..32).map(|lane| x[lane] + x[lane ^ distance]).collect();
            distance /= 2;
        }
        x[0]
    };
    let sum = |x: &[f32]| {
        let mut warps: Vec<f32> = x.chunks(32).map(|warp| halves(warp.to_vec())).collect();
        warps.resize(32, 0.0);
        halves(warps)
    };
    let largest = |x: &[f32]| x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    on_every_device(|gpu| {
        let from = gpu.uploaded(&numbers).unwrap();
        let [mut sums, mut maxima] = [0; 2].map(|_| gpu.alloc::<f32>(1024).unwrap());
        let args = args![&from, &mut sums, &mut maxima];
        gpu.launch(&kernel("block_functions", 128), [4, 1, 1], 16, args).unwrap();
        let (sums, maxima) = (gpu.downloaded(&sums).unwrap(), gpu.downloaded(&maxima).unwrap());
        for (block, x) in numbers.chunks(128).enumerate() {
            let negative: Vec<f32> = x.iter().map(|x| -x).collect();
            let expected = [sum(x), -2.0 * sum(x)].repeat(128);
            assert_eq!(sums[256 * block..][..256], expected);
            let expected = [largest(x), largest(&negative)].repeat(128);
            assert_eq!(maxima[256 * block..][..256], expected);
        }
    });
}

#[test]
fn threads_that_have_ended_are_not_waited_for() {
    for (seed, leaving) in [(0, 1), (1, 31), (2, 33), (3, 95), (4, 96)] {
        let gpu = gpu(seed);
        let mut out = gpu.alloc::<f32>(leaving).unwrap();
        let args = args![&mut out, leaving as i32];
        gpu.launch(&kernel("early_exit", 96), [1, 1, 1], 384, args).unwrap();
        let expected: Vec<f32> = (0..leaving).rev().map(|t| t as f32).collect();
        assert_eq!(gpu.downloaded(&out).unwrap(), expected);
    }
}

/// Every exponent and sign, with what decides the rounding; denormals, infinities and NaN among them.
fn all_kinds() -> Vec<f32> {
    let fractions =
        [0, 1, 0x7fff, 0x8000, 0x8001, 0x1_7fff, 0x1_8000, 0x7f_7fff, 0x7f_8000, 0x7f_ffff];
    let exponents = (0..512u32).flat_map(|e| fractions.map(|f| e << 23 | f));
    exponents.map(f32::from_bits).collect()
}

#[test]
fn conversions_round_to_nearest_even() {
    let numbers = all_kinds();
    let count = numbers.len();
    let rounded = |x: f32| match x.is_nan() {
        true => 0x7fff,
        false => bf16::from_f32(x).to_bits(),
    };
    let gpu = gpu(0);
    let input = gpu.uploaded(&numbers).unwrap();
    let mut alone = gpu.alloc::<bf16>(count).unwrap();
    let mut pairs = gpu.alloc::<u32>(count).unwrap();
    let mut back = gpu.alloc::<f32>(2 * count).unwrap();
    let args = args![&input, &mut alone, &mut pairs, &mut back, count as i32];
    gpu.launch(&kernel("conversions", 64), [1, 1, 1], 0, args).unwrap();
    let (alone, pairs) = (gpu.downloaded(&alone).unwrap(), gpu.downloaded(&pairs).unwrap());
    let back = gpu.downloaded(&back).unwrap();
    for (i, x) in numbers.into_iter().enumerate() {
        let (low, high) = (u32::from(rounded(x)), u32::from(rounded(-x)));
        assert_eq!(u32::from(alone[i].to_bits()), low, "{x:e}");
        assert_eq!(pairs[i], low | high << 16, "{x:e}");
        assert_eq!([back[2 * i], back[2 * i + 1]].map(f32::to_bits), [low << 16; 2], "{x:e}");
    }
}

/// AdamW has the processor's bits, so what it is made of must.
#[test]
fn arithmetic_is_correctly_rounded_and_keeps_denormals() {
    let kinds: Vec<f32> = all_kinds().into_iter().filter(|x| !x.is_nan()).collect();
    let count = kinds.len();
    let turned =
        |by: usize| -> Vec<f32> { (0..count).map(|i| kinds[(i * by + 17) % count]).collect() };
    // Numbers of any size, and such that products, quotients and sums are ordinary numbers.
    let ordinary = |seed| random(count, seed);
    for [x, y, z] in
        [[kinds.clone(), turned(7), turned(1999)], [ordinary(7), ordinary(8), ordinary(9)]]
    {
        let exact = |i: usize| -> [f32; 6] {
            let (x, y, z) = (x[i], y[i], z[i]);
            let in_f64 = (f64::from(x) * f64::from(y) + f64::from(z)) as f32;
            [x / y, x.abs().sqrt(), z + x * y, x.mul_add(y, z), x.max(y), in_f64]
        };
        let gpu = gpu(0);
        let inputs = [&x, &y, &z].map(|x| gpu.uploaded(x).unwrap());
        let mut out = gpu.alloc::<f32>(6 * count).unwrap();
        let args = args![&inputs[0], &inputs[1], &inputs[2], &mut out, count as i32];
        gpu.launch(&kernel("exact_arithmetic", 64), [1, 1, 1], 0, args).unwrap();
        let out = gpu.downloaded(&out).unwrap();
        for i in 0..count {
            for (which, exact) in exact(i).into_iter().enumerate() {
                let found = out[which * count + i];
                // Of a maximum of 0 and -0 either may come.
                let same = found.to_bits() == exact.to_bits() || (which == 4 && found == exact);
                let same = same || (found.is_nan() && exact.is_nan());
                let (x, y, z) = (x[i], y[i], z[i]);
                assert!(same, "{which} of {x:e} {y:e} {z:e}: {found:e}, exact {exact:e}");
            }
        }
    }
}

#[test]
fn functions_are_right_to_a_few_units_in_the_last_place() {
    let mut x: Vec<f32> = random(4000, 10).iter().map(|x| x * 30.0).collect();
    x.extend(random(2000, 11));
    x.extend(random(2000, 12).iter().map(|x| x * 1e-3));
    x.extend([0.0, -1e4, 120.0, -130.0, f32::NEG_INFINITY, 1.0, -1.0]);
    let count = x.len();
    let gpu = gpu(0);
    let input = gpu.uploaded(&x).unwrap();
    let mut out = gpu.alloc::<f32>(4 * count).unwrap();
    let args = args![&input, &mut out, count as i32];
    gpu.launch(&kernel("near_arithmetic", 64), [1, 1, 1], 0, args).unwrap();
    let out = gpu.downloaded(&out).unwrap();
    for (i, x) in x.into_iter().enumerate() {
        let wide = f64::from(x);
        let exact = [wide.exp2(), wide.exp_m1(), wide.abs().ln(), 1.0 / (1.0 + (-wide).exp2())];
        for (which, exact) in exact.into_iter().enumerate() {
            let found = f64::from(out[which * count + i]);
            // Below the smallest normal number exp2_fast may give 0; beyond the largest all are infinite.
            let smallest = f64::from(f32::MIN_POSITIVE);
            let allowed = 4.0 * f64::from(f32::EPSILON) * exact.abs() + smallest;
            let both_infinite = found.is_infinite() && (exact as f32).is_infinite();
            let right = both_infinite || (found - exact).abs() <= allowed;
            assert!(right, "{which} of {x:e}: {found:e}, exact {exact:e}");
        }
    }
}

/// NVRTC makes cubins of the same source.
#[test]
fn assumptions_compile_for_every_architecture() {
    let nvrtc = Nvrtc::find().unwrap_or_else(|error| panic!("{error}"));
    for architecture in ["sm_80", "sm_90a"] {
        let compiled = nvrtc.compile(&kernel("multiply", 32).module(), architecture);
        assert!(compiled.is_ok_and(|compiled| !compiled.cubin.is_empty()), "{architecture}");
    }
}

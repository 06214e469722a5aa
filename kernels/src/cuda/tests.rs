//! The emulated device, tested with kernels that do right and with faults put into them.

use super::*;
use crate::args;
use crate::testing::{random, random_bf16, widen};
use half::bf16;

mod hopper;
mod streams;

const SEEDS: u64 = 8;

static SOURCE: Source = Source { name: "tests.cu", text: include_str!("tests.cu"), headers: &[] };

const fn kernel(name: &'static str, threads: u32) -> Kernel {
    Kernel::new(&SOURCE, name, threads)
}

fn emulated(seed: u64) -> Gpu {
    Gpu::emulated(seed).unwrap()
}

fn faulty(seed: u64, from: &'static str, to: &'static str) -> Gpu {
    Gpu::emulated_with_fault(seed, Fault { file: "tests.cu", from, to }).unwrap()
}

/// Whether a run is right for every seed, the mistakes of the device counted as wrong.
fn always(run: impl Fn(u64) -> bool) -> bool {
    (0..SEEDS).all(run)
}

fn reverse_is_right(gpu: &Gpu) -> bool {
    let numbers = random(512, 1);
    let input = gpu.uploaded(&numbers).unwrap();
    let mut out = gpu.alloc::<f32>(512).unwrap();
    gpu.launch(&kernel("reverse", 128), [4, 1, 1], 512, args![&input, &mut out]).unwrap();
    let expected = numbers.chunks(128).flat_map(|block| block.iter().rev().copied());
    gpu.downloaded(&out).unwrap() == expected.collect::<Vec<_>>()
}

#[test]
fn a_missing_barrier_gives_wrong_numbers_under_some_seed() {
    assert!(always(|seed| reverse_is_right(&emulated(seed))));
    let without = |seed| {
        faulty(seed, "held[t] = in[first + t];\n    __syncthreads();", "held[t] = in[first + t];")
    };
    assert!(!always(|seed| reverse_is_right(&without(seed))));
}

#[test]
fn what_is_launched_can_be_asked_for() {
    let gpu = emulated(0);
    let traced = gpu.traced(|| {
        assert!(reverse_is_right(&gpu));
        assert!(reverse_is_right(&gpu));
        Ok(())
    });
    assert_eq!(traced.unwrap(), [("reverse", None); 2]);
    assert!(reverse_is_right(&gpu));
    assert_eq!(gpu.traced(|| Ok(())).unwrap(), []);
    assert!(gpu.traced(|| Err(Error::Failed("work".into()))).is_err());
}

/// Whether numbers on the emulated device are what they are before anything is written to them.
fn untouched(buffer: &DeviceSlice<f32>) -> bool {
    // SAFETY: the emulated device's memory is this process's.
    let numbers =
        unsafe { std::slice::from_raw_parts(here(buffer.address()).cast(), buffer.len()) };
    numbers.iter().all(|x: &f32| x.is_nan())
}

#[test]
fn what_is_put_off_happens_in_order_when_it_is_waited_for() {
    let gpu = Gpu::emulated_late(1).unwrap();
    let numbers = random(512, 1);
    let input = gpu.uploaded(&numbers).unwrap();
    let (mut there, mut back) = (gpu.alloc::<f32>(512).unwrap(), gpu.alloc::<f32>(512).unwrap());
    let reverse = kernel("reverse", 128);
    gpu.launch(&reverse, [4, 1, 1], 512, args![&input, &mut there]).unwrap();
    gpu.launch(&reverse, [4, 1, 1], 512, args![&there, &mut back]).unwrap();
    // What is given back stays until its last use.
    drop(there);
    assert!(untouched(&input) && untouched(&back));
    gpu.synchronize().unwrap();
    assert!(!untouched(&input) && !untouched(&back));
    assert_eq!(gpu.downloaded(&back).unwrap(), numbers);
}

#[test]
fn what_is_on_its_way_comes_when_it_is_waited_for() {
    let gpu = Gpu::emulated_late(1).unwrap();
    let (numbers, others) = (random(512, 1), random(512, 2));
    let reversed = |numbers: &[f32]| -> Vec<f32> {
        numbers.chunks(128).flat_map(|block| block.iter().rev().copied()).collect()
    };
    let reverse = kernel("reverse", 128);
    let [input, other] = [&numbers, &others].map(|numbers| gpu.uploaded(numbers).unwrap());
    let mut out = gpu.alloc::<f32>(512).unwrap();
    // As many as are on their way at a time, the same buffer overwritten for each and given back at last.
    let coming: Vec<_> = [&input, &other, &input]
        .into_iter()
        .map(|from| {
            gpu.launch(&reverse, [4, 1, 1], 512, args![from, &mut out]).unwrap();
            gpu.downloading(&out).unwrap()
        })
        .collect();
    drop(out);
    let mut last = gpu.alloc::<f32>(512).unwrap();
    gpu.launch(&reverse, [4, 1, 1], 512, args![&input, &mut last]).unwrap();
    for (coming, numbers) in coming.into_iter().zip([&numbers, &others, &numbers]) {
        assert_eq!(coming.wait().unwrap(), reversed(numbers));
    }
    // The third found no room and was waited for; nobody waited for the last launch.
    assert!(untouched(&last));
    drop(gpu.downloading(&last).unwrap());
    let [first, second] = [&input, &other].map(|buffer| gpu.downloading(buffer).unwrap());
    assert_eq!((second.wait().unwrap(), first.wait().unwrap()), (others, numbers));
}

#[test]
fn uploads_that_are_put_off_keep_their_numbers() {
    let gpu = Gpu::emulated_late(1).unwrap();
    // More than the ring holds, in pieces of every size, each overwritten as soon as the call is over.
    let all = random(20_000, 2);
    let (mut buffer, mut numbers) = (gpu.alloc::<f32>(all.len()).unwrap(), Vec::new());
    let (mut start, mut len) = (0, 1);
    while start < all.len() {
        let range = start..all.len().min(start + len);
        numbers.clear();
        numbers.extend_from_slice(&all[range.clone()]);
        gpu.upload(&numbers, &mut buffer[range.clone()]).unwrap();
        numbers.fill(0.0);
        (start, len) = (range.end, len * 2 + 1);
    }
    assert_eq!(gpu.downloaded(&buffer).unwrap(), all);
}

#[test]
fn a_mistake_that_is_put_off_is_every_later_wait_s() {
    let gpu = Gpu::emulated_late(1).unwrap();
    let input = gpu.uploaded(&random(512, 1)).unwrap();
    let mut out = gpu.alloc::<f32>(256).unwrap();
    gpu.launch(&kernel("reverse", 128), [4, 1, 1], 512, args![&input, &mut out]).unwrap();
    let error = gpu.synchronize().unwrap_err().to_string();
    assert!(error.contains("reverse"), "{error}");
    assert_eq!(gpu.downloaded(&out).unwrap_err().to_string(), error);
}

fn pipeline_is_right(gpu: &Gpu) -> bool {
    const TILES: usize = 5;
    let numbers = random(TILES * 128, 2);
    let words: Vec<u32> = numbers.iter().map(|x| x.to_bits()).collect();
    // Typed as bytes, as a pointer to uint4 takes any.
    let input = gpu.uploaded(&words).unwrap();
    let mut out = gpu.alloc::<f32>(128).unwrap();
    let args = args![&input, &mut out, TILES as i32];
    gpu.launch(&kernel("pipeline", 32), [1, 1, 1], 1024, args).unwrap();
    let sum = |i: usize| (0..TILES).fold(0.0, |sum, tile| sum + numbers[tile * 128 + i]);
    gpu.downloaded(&out).unwrap() == (0..128).map(sum).collect::<Vec<_>>()
}

#[test]
fn copies_land_only_when_they_are_waited_for() {
    assert!(always(|seed| pipeline_is_right(&emulated(seed))));
    let without = |seed| faulty(seed, "copy_async_wait<1>();", "");
    assert!((0..SEEDS).all(|seed| !pipeline_is_right(&without(seed))));
    let too_few = |seed| faulty(seed, "copy_async_wait<1>();", "copy_async_wait<2>();");
    assert!((0..SEEDS).all(|seed| !pipeline_is_right(&too_few(seed))));
    // Overwriting what others still read, and reading what others have not waited for.
    let early =
        |seed| faulty(seed, "__syncwarp(); // all have read what the next copy overwrites", "");
    assert!(!always(|seed| pipeline_is_right(&early(seed))));
    let alone = |seed| {
        faulty(seed, "copy_async_wait<1>();\n        __syncwarp();", "copy_async_wait<1>();")
    };
    assert!(!always(|seed| pipeline_is_right(&alone(seed))));
}

#[test]
fn tensor_cores_multiply() {
    let (a, b) = (random_bf16(256, 3), random_bf16(128, 4));
    let transposed: Vec<bf16> = (0..128).map(|i| b[i % 16 * 8 + i / 16]).collect();
    let (wide_a, wide_b) = (widen(&a), widen(&b));
    let dot = |i: usize| {
        let (row, column) = (i / 8, i % 8);
        (0..16).fold(0.0f32, |sum, k| sum + wide_a[row * 16 + k] * wide_b[k * 8 + column])
    };
    let expected: Vec<f32> = (0..128).map(dot).collect();
    for seed in 0..SEEDS {
        let gpu = emulated(seed);
        let inputs = [&a, &b, &transposed].map(|x| gpu.uploaded(x).unwrap());
        let (mut d, mut by_way) = (gpu.alloc::<f32>(128).unwrap(), gpu.alloc::<f32>(128).unwrap());
        let args = args![&inputs[0], &inputs[1], &inputs[2], &mut d, &mut by_way];
        gpu.launch(&kernel("product", 32), [1, 1, 1], 1024, args).unwrap();
        for found in [d, by_way] {
            let found = gpu.downloaded(&found).unwrap();
            assert!(found.iter().zip(&expected).all(|(f, e)| (f - e).abs() < 1e-5), "seed {seed}");
        }
    }
}

#[test]
fn what_is_not_written_is_not_a_number() {
    let gpu = emulated(0);
    let mut out = gpu.alloc::<f32>(32).unwrap();
    gpu.launch(&kernel("half_written", 32), [1, 1, 1], 0, args![&mut out]).unwrap();
    let out = gpu.downloaded(&out).unwrap();
    assert!(out[..16].iter().all(|x| *x == 1.0) && out[16..].iter().all(|x| x.is_nan()));
    assert!(gpu.downloaded(&gpu.alloc::<bf16>(3).unwrap()).unwrap().iter().all(|x| x.is_nan()));
}

#[test]
fn mistakes_are_said_with_their_place() {
    const COUNT: usize = 1020;
    let expected = [
        "thread 33: read outside global memory",
        "thread 33: write outside global memory",
        "thread 33: write outside global memory",
        "thread 33: write outside shared memory, at byte 1024 of 1024",
        "thread 33: read outside shared memory, at byte -8000 of 1024",
        "thread 33: integer division by zero",
        "thread 33: stack overflow",
        "thread 33: store16: the address",
        "deadlock: of 64 threads",
        "deadlock: of 64 threads",
        "divergent collectives: thread",
        "ldmatrix: byte 1024 is outside the 1024 bytes of shared memory",
        "thread 33: copy_async16, shared: the address",
        "thread 33: read outside global memory",
        "__syncwarp: the mask 80000000 leaves out the calling lane",
        "wrote outside argument 0's buffer, 0 bytes past its end",
    ];
    for (what, expected) in expected.into_iter().enumerate() {
        for seed in [0, 1] {
            let gpu = emulated(seed);
            // The last one has a few bytes between its end and the page that cannot be accessed.
            let count = if what == 15 { COUNT + 1 } else { COUNT };
            let mut memory = gpu.alloc::<f32>(count).unwrap();
            gpu.zero(&mut memory).unwrap();
            let args = args![&mut memory, count as i32, what as i32, 0];
            let done = gpu.launch(&kernel("wrong", 64), [1, 1, 1], 1024, args);
            let said = done.err().map_or("nothing".into(), |error| error.to_string());
            assert!(said.contains(expected) && said.contains("kernel wrong"), "{what}: {said}");
            assert!(what == 15 || said.contains("block (0, 0, 0)"), "{what}: {said}");
            // The device goes on.
            assert!(reverse_is_right(&gpu));
        }
    }
}

#[test]
fn an_access_outside_says_how_far_from_which_buffer() {
    let gpu = emulated(0);
    let mut memory = gpu.alloc::<f32>(1024).unwrap();
    let launch = |memory: &mut DeviceBuffer<f32>, what: i32| {
        let args = args![memory, 1024, what, 0];
        gpu.launch(&kernel("wrong", 64), [1, 1, 1], 1024, args).unwrap_err().to_string()
    };
    let said = launch(&mut memory, 0);
    assert!(said.contains("16 bytes past the end of a buffer of 4096 bytes"), "{said}");
    let said = launch(&mut memory, 2);
    assert!(said.contains("8000 bytes before a buffer of 4096 bytes"), "{said}");
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    let gpu = emulated(0);
    let input = gpu.alloc::<f32>(128).unwrap();
    let mut out = gpu.alloc::<f32>(128).unwrap();
    let mut narrow = gpu.alloc::<bf16>(128).unwrap();
    let reverse = kernel("reverse", 128);
    let refused = |args: Args| gpu.launch(&reverse, [1, 1, 1], 512, args).unwrap_err().to_string();
    assert_eq!(refused(args![&input]), "kernel reverse: 1 arguments for 2 parameters");
    let said = refused(args![&input, &out]);
    assert_eq!(said, "kernel reverse: argument 1 is written, so it must be borrowed as &mut");
    let said = refused(args![&input, &mut narrow]);
    assert_eq!(
        said,
        "kernel reverse: argument 1 is a pointer to Bf16, its parameter a pointer to F32"
    );
    let said = refused(args![1.0f32, &mut out]);
    assert_eq!(said, "kernel reverse: argument 0 has 4 bytes, its parameter 8");
    let said = refused(args![1u64, &mut out]);
    assert_eq!(said, "kernel reverse: argument 0 is U64, its parameter a pointer to F32");
}

#[test]
fn launches_that_no_device_does_are_refused() {
    let gpu = emulated(0);
    let launch = |kernel: Kernel, grid, shared| {
        let mut out = gpu.alloc::<f32>(32).unwrap();
        gpu.launch(&kernel, grid, shared, args![&mut out]).unwrap_err().to_string()
    };
    let said = launch(kernel("half_written", 33), [1, 1, 1], 0);
    assert_eq!(said, "kernel half_written: 33 threads, it is compiled for 32");
    let said = launch(kernel("half_written", 32), [1, 65_536, 1], 0);
    assert_eq!(said, "kernel half_written: a grid of 1 × 65536 × 1 blocks is not possible");
    let said = launch(kernel("half_written", 32), [1, 1, 1], 170_000);
    assert_eq!(said, "kernel half_written: 170000 bytes of shared memory, emulated has 166912");
    let said = launch(kernel("elsewhere", 32), [1, 1, 1], 0);
    assert_eq!(said, "tests.cu has no kernel elsewhere");
}

#[test]
fn a_source_that_does_not_compile_says_where() {
    let gpu = faulty(
        0,
        "float* held = (float*)dynamic_shared();\n    const int t = threadIdx.x, first",
        "const int first",
    );
    let input = gpu.alloc::<f32>(128).unwrap();
    let mut out = gpu.alloc::<f32>(128).unwrap();
    let said =
        gpu.launch(&kernel("reverse", 128), [1, 1, 1], 512, args![&input, &mut out]).unwrap_err();
    assert!(said.to_string().contains("tests.cu:7"), "{said}");
}

#[test]
#[should_panic(expected = "is in tests.cu 0 times, not once")]
fn a_fault_that_no_longer_applies_fails() {
    reverse_is_right(&faulty(0, "no such line", ""));
}

#[test]
fn slices_are_parts_of_a_buffer() {
    let gpu = emulated(0);
    let mut buffer = gpu.uploaded(&[1u32, 2, 3, 4, 5, 6]).unwrap();
    gpu.upload(&[7], &mut buffer[2..3]).unwrap();
    let (left, right) = buffer.split_at_mut(4);
    gpu.copy(&left[2..], &mut right[..]).unwrap();
    gpu.zero(&mut left[..1]).unwrap();
    assert_eq!(gpu.downloaded(&buffer).unwrap(), [0, 2, 7, 4, 7, 4]);
    assert_eq!(buffer[1..].len(), 5);
}

#[test]
#[should_panic(expected = "range 2..9 of 6 elements on a device")]
fn a_slice_past_the_end_panics() {
    let gpu = emulated(0);
    let buffer = gpu.alloc::<f32>(6).unwrap();
    let _ = &buffer[2..9];
}

//! Faults planted in the sources must show: as an error, or as other bits than the right ones, under one of
//! a few orders of threads.

use super::*;
use crate::testing::faulty_gpu;

/// The emulator's seeds that are tried.
const SEEDS: u64 = 8;

/// In `file`, the first `from` after `place` becomes `to`.
struct Fault {
    file: &'static str,
    place: &'static str,
    from: &'static str,
    to: &'static str,
}

const fn fault(
    file: &'static str,
    place: &'static str,
    from: &'static str,
    to: &'static str,
) -> Fault {
    Fault { file, place, from, to }
}

impl Fault {
    /// A device with the fault in its sources.
    fn planted(&self, seed: u64) -> Gpu {
        let sources = [("attention.cu", SOURCE.text), ("decode.cu", DECODE.text)];
        let (_, text) = sources
            .into_iter()
            .chain(HEADERS.iter().copied())
            .find(|(name, _)| *name == self.file)
            .expect("a file of attention");
        let place = text.find(self.place).expect("the place is in the file");
        let at = text[place..].find(self.from).expect("what is replaced comes after it") + place;
        let from = &text[place..at + self.from.len()];
        let to = format!("{}{}", &text[place..at], self.to).leak();
        faulty_gpu(seed, self.file, from, to)
    }

    #[track_caller]
    fn assert_shows<T: PartialEq>(&self, run: impl Fn(&Gpu) -> Result<T>) {
        let right = run(&gpu(0)).unwrap_or_else(|error| panic!("{error}"));
        let shows = (0..SEEDS).any(|seed| run(&self.planted(seed)).map_or(true, |t| t != right));
        let Self { file, place, from, to } = self;
        assert!(shows, "{file}, {place}: {to:?} for {from:?} goes unnoticed");
    }
}

const KERNELS: [&str; 3] =
    ["attention_forward(", "attention_backward_keys(", "attention_backward_queries("];

/// Where a warp of the second block of queries has its first one right before the end of a tile of keys that is
/// otherwise seen as a whole.
const LATE: usize = 111;
/// Where the first query of a tile sees of a warp's keys the last one only.
const FAR: usize = 98;

fn case(window: usize) -> Case {
    let layout = Layout::new(&[(150, vec![20, 70])]);
    Case::new(layout, Heads { heads: 4, kv_heads: 2, head_dim: 16 }, Some(window))
}

fn assert_all_show(faults: &[Fault]) {
    assert_all_show_in(LATE, faults);
}

fn assert_all_show_in(window: usize, faults: &[Fault]) {
    let case = case(window);
    for fault in faults {
        fault.assert_shows(|gpu| case.run_on(gpu));
    }
}

#[test]
fn a_missing_barrier_or_wait_shows() {
    for kernel in KERNELS {
        assert_all_show(&[
            fault("attention.cu", kernel, "__syncthreads();", ""),
            fault("attention.cu", kernel, "copy_async_wait<0>();", "copy_async_wait<1>();"),
        ]);
    }
    assert_all_show(&[fault("tiles.cuh", "DEVICE void store_rows", "__syncwarp();", "")]);
}

#[test]
fn a_wrong_bound_of_the_mask_shows() {
    assert_all_show(&[
        fault("tiles.cuh", "DEVICE void hide", "column < seen.first", "column <= seen.first"),
        fault("tiles.cuh", "DEVICE void hide", "column >= seen.end", "column > seen.end"),
        fault("rows.cuh", "DEVICE Columns keys_of", "last - window + 1", "last - window"),
        fault("rows.cuh", "DEVICE Columns queries_of", "first + window", "first + window + 1"),
        fault("rows.cuh", "DEVICE bool sees_all", "<= queries.position", "<= queries.position + 1"),
    ]);
    let far = fault("rows.cuh", "DEVICE bool sees_none", ">= window", ">= window - 1");
    assert_all_show_in(FAR, &[far]);
}

#[test]
fn a_wrong_permutation_of_chunks_shows() {
    assert_all_show(&[
        fault("tiles.cuh", "DEVICE int pair_offset", " % CLASHING ^ odd", " % CLASHING ^ 1"),
        fault("tiles.cuh", "DEVICE int chunk_offset", "8 / CLASHING", "4 / CLASHING"),
    ]);
}

#[test]
fn a_lost_sum_shows() {
    assert_all_show(&[
        fault("tiles.cuh", "DEVICE void soften", "state.sum[f][half] *= shrink;", ""),
        fault("tiles.cuh", "DEVICE void soften", "shrink != 1.0f", "false"),
        fault("attention.cu", "attention_backward_keys(", "stage ^= 1", "stage ^= 0"),
        fault("attention.cu", "attention_backward_keys(", "ds[f][n][i] - delta", "ds[f][n][i]"),
    ]);
}

#[test]
fn a_fault_in_decoding_shows() {
    // So many that every warp puts results of all warps together.
    let heads = Heads { heads: 32, kv_heads: 2, head_dim: 16 };
    let case = Case::new(Layout::new(&[(0, vec![300])]), heads, None);
    let loop_of = "for (int from = begin";
    let end = "// Everyone is done";
    for fault in [
        fault("decode.cu", loop_of, "__syncthreads();", ""),
        fault("decode.cu", loop_of, "copy_async_wait<0>();", "copy_async_wait<1>();"),
        fault("decode.cu", loop_of, "end - from < MET", "end - from < MET - 63"),
        fault("decode.cu", end, "__syncthreads();", ""),
        fault("decode.cu", "own_sums[row] = sum", "__syncthreads();", ""),
        fault("decode.cu", "attention_decode_combine(", "sum += weight", "sum += 1.0f"),
    ] {
        fault.assert_shows(|gpu| run_decode(gpu, &case));
    }
}

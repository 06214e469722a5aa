//! Faults planted in the sources must show: as an error, or as other bits than the right ones, under one of
//! a few orders of threads.

use super::*;

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
    fn plant(&self, source: &'static Source) -> &'static Source {
        let edit = |name: &str, text: &'static str| -> &'static str {
            if name != self.file {
                return text;
            }
            let place = text.find(self.place).expect("the place is in the file");
            let at =
                text[place..].find(self.from).expect("what is replaced comes after it") + place;
            let (before, after) = (&text[..at], &text[at + self.from.len()..]);
            String::leak(format!("{before}{}{after}", self.to))
        };
        let headers: Vec<_> =
            source.headers.iter().map(|(name, text)| (*name, edit(name, text))).collect();
        Box::leak(Box::new(Source {
            name: source.name,
            text: edit(source.name, source.text),
            headers: Vec::leak(headers),
        }))
    }

    #[track_caller]
    fn assert_shows<T: PartialEq>(
        &self,
        source: &'static Source,
        run: impl Fn(&'static Source, &Gpu) -> Result<T>,
    ) {
        let right = run(source, &gpu(0)).unwrap_or_else(|error| panic!("{error}"));
        let planted = self.plant(source);
        let shows = (0..SEEDS).any(|seed| run(planted, &gpu(seed)).map_or(true, |t| t != right));
        assert!(shows, "{}: {:?} for {:?} goes unnoticed", self.file, self.to, self.from);
    }
}

const KERNELS: [&str; 3] =
    ["attention_forward(", "attention_backward_keys(", "attention_backward_queries("];

fn case() -> Case {
    let layout = Layout::new(&[(150, vec![20, 70])]);
    Case::new(layout, Heads { heads: 4, kv_heads: 2, head_dim: 16 }, Some(111))
}

fn assert_all_show(faults: &[Fault]) {
    let case = case();
    for fault in faults {
        fault.assert_shows(&SOURCE, |source, gpu| case.run_of(source, gpu));
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
        fault("tiles.cuh", "DEVICE Columns keys_of", "last - window + 1", "last - window"),
        fault("tiles.cuh", "DEVICE Columns queries_of", "first + window", "first + window + 1"),
        fault(
            "tiles.cuh",
            "DEVICE bool sees_all",
            "<= queries.position",
            "<= queries.position + 1",
        ),
        fault("tiles.cuh", "DEVICE bool sees_none", ">= window", ">= window - 1"),
    ]);
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
    let heads = Heads { heads: 4, kv_heads: 2, head_dim: 16 };
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
        fault.assert_shows(&DECODE, |source, gpu| run_decode(source, gpu, &case));
    }
}

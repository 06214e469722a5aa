use super::*;
use crate::testing::{
    SEEDS, assert_accurate_bf16, assert_faults_are_caught, gpu, random, random_bf16, random_ids,
};

const SHAPES: [(usize, usize, usize); 5] =
    [(1, 1, 1), (11, 7, 30), (100, 192, 50), (9, 1032, 20), (50, 8, 3)];

fn check_gather(gpu: &Gpu, vocab: usize, width: usize, rows: usize) {
    let (table, ids) = (random_bf16(vocab * width, 1), random_ids(rows, vocab, 2));
    let mut out = gpu.alloc(rows * width).unwrap();
    let (on_table, on_ids) = (gpu.uploaded(&table).unwrap(), gpu.uploaded(&ids).unwrap());
    gather(gpu, &on_table, &on_ids, &mut out).unwrap_or_else(|error| panic!("{error}"));
    let expected = ids.iter().flat_map(|id| &table[*id as usize * width..][..width]);
    assert!(gpu.downloaded(&out).unwrap().iter().eq(expected), "{vocab} {width} {rows}");
}

fn check_scatter(gpu: &Gpu, vocab: usize, width: usize, rows: usize) {
    let (x, ids, some) =
        (random_bf16(rows * width, 1), random_ids(rows, vocab, 2), random(rows, 3));
    let on_x = gpu.uploaded(&x).unwrap();
    let on_factors = gpu.uploaded(&some).unwrap();
    let readers = Readers::new(gpu, &Arena::new(gpu, 0).unwrap(), &ids, vocab).unwrap();
    for factors in [None, Some(&some)] {
        let mut out = gpu.alloc(vocab * width).unwrap();
        let on_device = factors.map(|_| &on_factors[..]);
        scatter(gpu, &on_x, &readers, on_device, &mut out)
            .unwrap_or_else(|error| panic!("{error}"));
        let (mut exact, mut plain) = (vec![0.0f64; vocab * width], vec![0.0f32; vocab * width]);
        for (t, id) in ids.iter().enumerate() {
            let factor = factors.map_or(1.0, |factors| factors[t]);
            for i in 0..width {
                let (at, x) = (*id as usize * width + i, x[t * width + i].to_f32());
                exact[at] += f64::from(factor) * f64::from(x);
                plain[at] += factor * x;
            }
        }
        let found = gpu.downloaded(&out).unwrap();
        assert_accurate_bf16("scatter", &found, &crate::testing::round(&plain), &exact);
        let unread = (0..vocab).filter(|row| !ids.contains(&(*row as u32)));
        for row in unread {
            assert_eq!(found[row * width..][..width], vec![bf16::ZERO; width], "row {row}");
        }
    }
}

fn check_all(gpu: &Gpu) {
    for (vocab, width, rows) in SHAPES {
        check_gather(gpu, vocab, width, rows);
        check_scatter(gpu, vocab, width, rows);
    }
}

#[test]
fn rows_are_copied_and_added_whatever_the_order() {
    SEEDS.into_iter().for_each(|seed| check_all(&gpu(seed)));
}

/// As where only some rows of the last layer are needed.
#[test]
fn scattering_fills_up_with_zeros() {
    let gpu = gpu(1);
    let x: Vec<bf16> = (1..=6).map(|x| bf16::from_f32(x as f32)).collect();
    let readers = Readers::new(&gpu, &Arena::new(&gpu, 0).unwrap(), &[1, 4], 5).unwrap();
    let mut out = gpu.alloc(15).unwrap();
    scatter(&gpu, &gpu.uploaded(&x).unwrap(), &readers, None, &mut out).unwrap();
    let expected = [0, 0, 0, 1, 2, 3, 0, 0, 0, 0, 0, 0, 4, 5, 6];
    assert!(gpu.downloaded(&out).unwrap().iter().map(|x| x.to_f32() as i32).eq(expected));
}

#[test]
fn nothing_to_do_is_done() {
    let gpu = gpu(0);
    let table = gpu.alloc(16).unwrap();
    gather(&gpu, &table, &gpu.alloc(0).unwrap(), &mut gpu.alloc(0).unwrap()).unwrap();
    let readers = Readers::new(&gpu, &Arena::new(&gpu, 0).unwrap(), &[], 2).unwrap();
    let mut out = gpu.alloc(16).unwrap();
    scatter(&gpu, &gpu.alloc(0).unwrap(), &readers, None, &mut out).unwrap();
    assert_eq!(gpu.downloaded(&out).unwrap(), [bf16::ZERO; 16]);
}

#[test]
fn an_unknown_id_gives_a_row_of_nan() {
    check_unknown_id(&gpu(0));
}

fn check_unknown_id(gpu: &Gpu) {
    for width in [3, 8] {
        let table = gpu.uploaded(&random_bf16(2 * width, 1)).unwrap();
        let mut out = gpu.uploaded(&vec![bf16::ZERO; 2 * width]).unwrap();
        gather(gpu, &table, &gpu.uploaded(&[1, 2]).unwrap(), &mut out).unwrap();
        let out = gpu.downloaded(&out).unwrap();
        assert!(out[..width].iter().all(|x| x.is_finite()));
        assert!(out[width..].iter().all(|x| x.is_nan()));
    }
}

#[test]
#[should_panic(expected = "embedding: reader of row 2 of 2")]
fn a_reader_of_no_row_is_named() {
    let gpu = gpu(0);
    let _ = Readers::new(&gpu, &Arena::new(&gpu, 0).unwrap(), &[0, 2], 2);
}

#[test]
fn planted_faults_are_caught() {
    let faults = [
        ("embedding.cu", "bool known = id < table_rows;", "bool known = id <= table_rows;"),
        ("embedding.cu", "sums[j] += factor * row[j];", "sums[j] = factor * row[j];"),
        ("embedding.cu", "first = starts[blockIdx.x], end", "first = starts[blockIdx.x] + 1, end"),
        (
            "embedding.cu",
            "i < width; i += 128) out[i] = known",
            "i + 1 < width; i += 128) out[i] = known",
        ),
        (
            "embedding.cu",
            "store16(out + i, pack8(sums));",
            "if (end > first) store16(out + i, pack8(sums));",
        ),
    ];
    assert_faults_are_caught(
        |gpu| {
            check_all(gpu);
            check_unknown_id(gpu);
        },
        &faults,
    );
}

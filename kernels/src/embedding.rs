//! The token embedding: `out[t] = table[ids[t]]`. The table is frozen, so there is no way back.

pub mod cuda;

use crate::matmul::Weight;
use crate::parallel::rows_per_task;
use rayon::prelude::*;

/// `out`: `[T, H]` = the rows `ids`: `[T]` of `table`: `[V, H]`. Overwrites `out`.
///
/// H follows from the lengths; an id that is not in the table panics.
pub fn gather<'w>(table: impl Into<Weight<'w>>, ids: &[u32], out: &mut [f32]) {
    let table = table.into();
    if ids.is_empty() {
        return assert!(out.is_empty(), "embedding: out has rows but ids has none");
    }
    let width = out.len() / ids.len();
    assert!(
        width > 0 && out.len() == ids.len() * width && table.len().is_multiple_of(width),
        "embedding: out [{} elements] is not [{}, H] for a table of {} elements",
        out.len(),
        ids.len(),
        table.len()
    );
    let block = |(out, ids): (&mut [f32], &[u32])| {
        for (out, id) in out.chunks_exact_mut(width).zip(ids) {
            let from = *id as usize * width;
            let vocab = table.len() / width;
            assert!((*id as usize) < vocab, "embedding: id {id} in a vocabulary of {vocab}");
            table.range(from..from + width).widen(out);
        }
    };
    let task = rows_per_task(width);
    if ids.len() <= task {
        return block((out, ids));
    }
    out.par_chunks_mut(task * width).zip(ids.par_chunks(task)).for_each(block);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{poison, random, random_ids};

    #[test]
    fn rows_are_copied() {
        for (vocab, width, rows) in [(1, 1, 1), (11, 7, 30), (100, 768, 200)] {
            let (table, ids) = (random(vocab * width, 1), random_ids(rows, vocab, 2));
            let mut out = poison(rows * width);
            gather(&table, &ids, &mut out);
            for (row, id) in ids.iter().enumerate() {
                let from = *id as usize * width;
                assert_eq!(out[row * width..][..width], table[from..from + width]);
            }
        }
        gather(&[1.0][..], &[], &mut []);
    }

    #[test]
    #[should_panic(expected = "embedding: id 3 in a vocabulary of 3")]
    fn an_unknown_id_is_named() {
        gather(&[0.0; 6][..], &[3], &mut [0.0; 2]);
    }
}

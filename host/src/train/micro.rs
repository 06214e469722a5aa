//! How an optimizer step is split into micro-batches.

use crate::config::Gain;
use crate::data::{Item, Source};

/// Rows from which on a pass on the CPU gets no faster with more.
const ENOUGH: usize = 2048;
/// Where rows are narrow, it takes as many as make so many elements of hidden state.
const ENOUGH_ELEMENTS: usize = 3 << 19;

/// Rows from which on a pass gets no faster with more, for a model of width `hidden`: a GPU is given all that the
/// configuration allows.
pub fn enough(hidden: usize, on_gpu: bool) -> usize {
    match on_gpu {
        true => usize::MAX,
        false => ENOUGH.max(ENOUGH_ELEMENTS / hidden),
    }
}

/// Most rows of a micro-batch: no more than are worth their memory, unless the step's statistics are needed
/// before its first loss. Then a larger micro-batch has a larger part of them from its own forward pass.
pub fn limit(sources: &[Source], items: &[Item], micro_tokens: usize, enough: usize) -> usize {
    match items.iter().any(|item| sources[item.source].needs_statistics()) {
        true => micro_tokens,
        false => micro_tokens.min(enough),
    }
}

/// Places groups, given by their rows, in micro-batches of at most `limit` rows; a longer group gets
/// one to itself, and so does every group `without` packing.
/// First fit, longest first, under the lowest limit that needs no more micro-batches: so they are about as
/// large as each other, and the largest takes no more memory than it has to. Within a micro-batch the given
/// order is kept. Nothing depends on anything but the arguments.
pub fn split(loads: &[usize], limit: usize, without: &[Gain]) -> Vec<Vec<usize>> {
    if without.contains(&Gain::Packing) {
        return (0..loads.len()).map(|index| vec![index]).collect();
    }
    let mut longest_first: Vec<usize> = (0..loads.len()).collect();
    longest_first.sort_by_key(|&i| std::cmp::Reverse(loads[i]));
    let mut bins = first_fit(loads, &longest_first, limit);
    let total: usize = loads.iter().sum();
    let (mut low, mut high) = (total.div_ceil(bins.len().max(1)), limit);
    while low < high {
        let middle = low + (high - low) / 2;
        let tighter = first_fit(loads, &longest_first, middle);
        match tighter.len() <= bins.len() {
            true => (bins, high) = (tighter, middle),
            false => low = middle + 1,
        }
    }
    for batch in &mut bins {
        batch.sort_unstable();
    }
    bins.sort_unstable_by_key(|batch| batch[0]);
    bins
}

/// Every group, in the order given, in the first micro-batch that has room.
fn first_fit(loads: &[usize], order: &[usize], limit: usize) -> Vec<Vec<usize>> {
    let mut bins: Vec<(usize, Vec<usize>)> = Vec::new();
    for &index in order {
        let load = loads[index];
        match bins.iter_mut().find(|(rows, _)| rows + load <= limit) {
            Some((rows, members)) => {
                *rows += load;
                members.push(index);
            }
            None => bins.push((load, vec![index])),
        }
    }
    bins.into_iter().map(|(_, members)| members).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_group_is_placed_once_within_the_limit() {
        let sizes = [5, 90, 40, 60, 10, 10, 200, 35];
        let batches = split(&sizes, 100, &[]);
        let mut placed: Vec<usize> = batches.iter().flatten().copied().collect();
        placed.sort_unstable();
        assert_eq!(placed, (0..sizes.len()).collect::<Vec<_>>());
        for batch in &batches {
            let rows: usize = batch.iter().map(|&i| sizes[i]).sum();
            assert!(rows <= 100 || batch.len() == 1, "{batch:?}");
        }
        assert_eq!(batches.len(), 4, "200 alone, and the other 250 rows in three");
        assert_eq!(split(&sizes, 100, &[Gain::Packing]).len(), sizes.len());
    }

    #[test]
    fn micro_batches_are_about_as_large_as_each_other() {
        let sizes = [90, 60, 50, 40, 30, 20, 10];
        let batches = split(&sizes, 290, &[]);
        let rows = batches.iter().map(|batch| batch.iter().map(|&i| sizes[i]).sum());
        assert_eq!(rows.collect::<Vec<usize>>(), [150, 150]);
        assert!(split(&[], 10, &[]).is_empty());
    }
}

//! How an optimizer step is split into micro-batches.

use crate::config::Gain;

/// Places groups, given by their rows, in micro-batches of at most `limit` rows; a longer group gets
/// one to itself, and so does every group `without` packing.
/// First fit, longest first; within a micro-batch the given order is kept. Nothing depends on
/// anything but the arguments.
pub fn split(loads: &[usize], limit: usize, without: &[Gain]) -> Vec<Vec<usize>> {
    if without.contains(&Gain::Packing) {
        return (0..loads.len()).map(|index| vec![index]).collect();
    }
    let mut longest_first: Vec<usize> = (0..loads.len()).collect();
    longest_first.sort_by_key(|&i| std::cmp::Reverse(loads[i]));
    let mut bins: Vec<(usize, Vec<usize>)> = Vec::new();
    for index in longest_first {
        let load = loads[index];
        match bins.iter_mut().find(|(rows, _)| rows + load <= limit) {
            Some((rows, members)) => {
                *rows += load;
                members.push(index);
            }
            None => bins.push((load, vec![index])),
        }
    }
    let mut batches: Vec<Vec<usize>> = bins.into_iter().map(|(_, members)| members).collect();
    for batch in &mut batches {
        batch.sort_unstable();
    }
    batches.sort_unstable_by_key(|batch| batch[0]);
    batches
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
}

//! How an optimizer step is split into micro-batches.

use crate::config::Gain;

/// One group to place: its rows, and a class; groups of different classes never share a
/// micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub rows: usize,
    pub class: u8,
}

/// Places groups in micro-batches of at most `limit` rows; a longer group gets one to itself, and so does
/// every group `without` packing.
/// First fit, longest first; within a micro-batch the given order is kept. Nothing depends on
/// anything but the arguments.
pub fn split(loads: &[Load], limit: usize, without: &[Gain]) -> Vec<Vec<usize>> {
    if without.contains(&Gain::Packing) {
        return (0..loads.len()).map(|index| vec![index]).collect();
    }
    let mut longest_first: Vec<usize> = (0..loads.len()).collect();
    longest_first.sort_by_key(|&i| std::cmp::Reverse(loads[i].rows));
    let mut bins: Vec<(Load, Vec<usize>)> = Vec::new();
    for index in longest_first {
        let load = loads[index];
        let fits = |bin: &Load| bin.class == load.class && bin.rows + load.rows <= limit;
        match bins.iter_mut().find(|(bin, _)| fits(bin)) {
            Some((bin, members)) => {
                bin.rows += load.rows;
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

    fn loads(rows: &[usize]) -> Vec<Load> {
        rows.iter().map(|&rows| Load { rows, class: 0 }).collect()
    }

    #[test]
    fn every_group_is_placed_once_within_the_limit() {
        let sizes = [5, 90, 40, 60, 10, 10, 200, 35];
        let batches = split(&loads(&sizes), 100, &[]);
        let mut placed: Vec<usize> = batches.iter().flatten().copied().collect();
        placed.sort_unstable();
        assert_eq!(placed, (0..sizes.len()).collect::<Vec<_>>());
        for batch in &batches {
            let rows: usize = batch.iter().map(|&i| sizes[i]).sum();
            assert!(rows <= 100 || batch.len() == 1, "{batch:?}");
        }
        assert_eq!(batches.len(), 4, "200 alone, and the other 250 rows in three");
        assert_eq!(split(&loads(&sizes), 100, &[Gain::Packing]).len(), sizes.len());
    }

    #[test]
    fn classes_are_kept_apart() {
        let mixed =
            [Load { rows: 1, class: 0 }, Load { rows: 1, class: 1 }, Load { rows: 1, class: 0 }];
        assert_eq!(split(&mixed, 100, &[]), [vec![0, 2], vec![1]]);
    }
}

//! Which row comes next: all sources interleaved in fixed shares, each in its own order.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// A row of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    pub source: usize,
    pub row: usize,
}

/// An endless stream of rows.
///
/// Sources are drawn by smooth weighted round robin, so that every batch holds them in their
/// shares; within a source every row comes once per epoch, in file order or shuffled.
#[derive(Clone, Debug)]
pub struct Order {
    sources: Vec<SourceOrder>,
    shuffle: bool,
    seed: u64,
}

#[derive(Clone, Debug)]
struct SourceOrder {
    /// The source's number in the run; also the random stream.
    source: usize,
    share: f64,
    credit: f64,
    epoch: u64,
    next: usize,
    rows: Vec<usize>,
}

impl Order {
    /// `sources`: number, rows and weight in the draw. Weights need not sum to 1.
    pub fn new(sources: &[(usize, usize, f64)], shuffle: bool, seed: u64) -> Self {
        let total: f64 = sources.iter().map(|(.., weight)| weight).sum();
        let start = |&(source, rows, weight): &(usize, usize, f64)| SourceOrder {
            source,
            share: weight / total,
            credit: 0.0,
            epoch: 0,
            next: 0,
            rows: (0..rows).collect(),
        };
        let mut order = Self { sources: sources.iter().map(start).collect(), shuffle, seed };
        for index in 0..order.sources.len() {
            order.begin_epoch(index);
        }
        order
    }

    fn begin_epoch(&mut self, index: usize) {
        let source = &mut self.sources[index];
        source.next = 0;
        if self.shuffle {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            // One stream per source and epoch: no order depends on how often another was drawn.
            rng.set_stream((source.source as u64) << 32 | source.epoch);
            source.rows.sort_unstable();
            source.rows.shuffle(&mut rng);
        }
    }

    /// The next `n` rows.
    pub fn batch(&mut self, n: usize) -> Vec<Item> {
        (0..n).map(|_| self.draw()).collect()
    }

    fn draw(&mut self) -> Item {
        for source in &mut self.sources {
            source.credit += source.share;
        }
        // The first of the largest: max_by would take the last.
        let mut index = 0;
        for (i, source) in self.sources.iter().enumerate() {
            if source.credit > self.sources[index].credit + 1e-12 {
                index = i;
            }
        }
        let source = &mut self.sources[index];
        source.credit -= 1.0;
        if source.next == source.rows.len() {
            source.epoch += 1;
            self.begin_epoch(index);
        }
        let source = &mut self.sources[index];
        source.next += 1;
        Item { source: source.source, row: source.rows[source.next - 1] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_without_shuffling_is_the_file_again_and_again() {
        let mut order = Order::new(&[(0, 3, 3.0)], false, 1);
        let rows: Vec<usize> = order.batch(7).iter().map(|i| i.row).collect();
        assert_eq!(rows, [0, 1, 2, 0, 1, 2, 0]);
    }

    #[test]
    fn every_batch_holds_the_sources_in_their_shares() {
        let mut order = Order::new(&[(0, 30, 3.0), (1, 10, 1.0)], true, 1);
        for _ in 0..50 {
            let batch = order.batch(8);
            assert_eq!(batch.iter().filter(|i| i.source == 1).count(), 2);
        }
    }

    #[test]
    fn an_epoch_holds_every_row_once_in_an_order_of_its_own() {
        let mut order = Order::new(&[(4, 50, 1.0)], true, 9);
        let epochs: Vec<Vec<usize>> =
            (0..2).map(|_| order.batch(50).iter().map(|i| i.row).collect()).collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..50).collect::<Vec<_>>());
        }
        assert_ne!(epochs[0], epochs[1]);
        assert_eq!(
            Order::new(&[(4, 50, 1.0)], true, 9)
                .batch(50)
                .iter()
                .map(|i| i.row)
                .collect::<Vec<_>>(),
            epochs[0]
        );
    }
}

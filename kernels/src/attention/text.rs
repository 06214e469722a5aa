//! Where a text's tokens lie in a packed batch, cut into blocks of queries and tiles of keys.

use crate::layout::{Continuation, Group};
use std::ops::Range;

/// A text as attention sees it: a prompt that others may share, then rows of its own. The rows of
/// its own are the queries; for the prompt itself they are the prompt, and nothing comes before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Text {
    prompt_start: usize,
    pub(super) prompt_len: usize,
    own_start: usize,
    own_len: usize,
}

/// `len` consecutive queries of a text's own rows, the first at `position`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    pub(super) position: usize,
    pub(super) len: usize,
}

/// `len` consecutive keys: rows from `row` on, positions from `position` on.
#[derive(Clone, Debug)]
pub(super) struct Tile {
    pub(super) row: usize,
    pub(super) position: usize,
    pub(super) len: usize,
    /// The queries that see at least one of the keys, counted from the block's first.
    pub(super) queries: Range<usize>,
}

impl Text {
    /// The prompt and the branches of a group.
    pub(super) fn of_group(group: &Group) -> impl Iterator<Item = Self> {
        let prompt = Self {
            prompt_start: group.start,
            prompt_len: 0,
            own_start: group.start,
            own_len: group.prompt_len,
        };
        let branches = group.branches.iter().map(|branch| Self {
            prompt_start: group.start,
            prompt_len: group.prompt_len,
            own_start: branch.start,
            own_len: branch.len,
        });
        std::iter::once(prompt).chain(branches)
    }

    /// A response that continues a prompt of another batch.
    pub(super) fn continuing(continuation: &Continuation) -> Self {
        let Continuation { prompt_start, prompt_len, branch } = *continuation;
        Self { prompt_start, prompt_len, own_start: branch.start, own_len: branch.len }
    }

    /// A text whose `n` tokens are rows 0..n.
    pub(super) fn of_cache(n: usize) -> Self {
        Self { prompt_start: 0, prompt_len: 0, own_start: 0, own_len: n }
    }

    /// The row of the token at `position`.
    pub(super) fn row(&self, position: usize) -> usize {
        if position < self.prompt_len {
            self.prompt_start + position
        } else {
            self.own_start + position - self.prompt_len
        }
    }

    /// The position behind its last token.
    pub(super) fn end(&self) -> usize {
        self.prompt_len + self.own_len
    }

    /// The text's own rows, at most `tokens` at a time.
    pub(super) fn blocks(&self, tokens: usize) -> impl Iterator<Item = Block> + use<> {
        let end = self.end();
        (self.prompt_len..end)
            .step_by(tokens)
            .map(move |position| Block { position, len: tokens.min(end - position) })
    }

    /// The keys that some queries of the block may see, in order of position, each tile with those
    /// queries. Where every query sees every key a tile has up to `keys` keys; along the edges, where
    /// part of a tile is computed in vain, up to `edge_keys`.
    pub(super) fn tiles(
        &self,
        block: &Block,
        window: Option<usize>,
        keys: usize,
        edge_keys: usize,
    ) -> impl Iterator<Item = Tile> + use<> {
        let (text, block) = (*self, *block);
        let end = block.position + block.len;
        let unbounded = usize::MAX;
        let first = (block.position + 1).saturating_sub(window.unwrap_or(unbounded));
        // From here on to the first query's own key, nothing is hidden from anyone.
        let inner_start = end.saturating_sub(window.unwrap_or(unbounded));
        let mut position = first;
        std::iter::from_fn(move || {
            let (most, limit) = match position {
                p if p >= end => return None,
                p if p < inner_start => (edge_keys, inner_start),
                p if p < block.position => (keys, block.position),
                _ => (edge_keys, end),
            };
            // The prompt's rows do not continue into the text's own.
            let limit = if position < text.prompt_len { limit.min(text.prompt_len) } else { limit };
            let len = most.min(limit - position);
            let last_query = window.map_or(end, |window| end.min(position + len - 1 + window));
            let tile = Tile {
                row: text.row(position),
                position,
                len,
                queries: position.saturating_sub(block.position)..last_query - block.position,
            };
            position += len;
            Some(tile)
        })
    }
}

impl Tile {
    /// The keys of the tile, counted from its first, that the query at `position` may see.
    pub(super) fn visible(&self, position: usize, window: Option<usize>) -> Range<usize> {
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        let start = first.saturating_sub(self.position).min(self.len);
        let end = (position + 1).saturating_sub(self.position).min(self.len);
        start..end.max(start)
    }
}

/// Cuts blocks into at most `parts` runs of about the same number of query-key pairs.
pub(super) fn split_evenly(blocks: &[(Text, Block)], parts: usize) -> Vec<&[(Text, Block)]> {
    let cost = |(_, block): &(Text, Block)| block.len * (block.position + block.len);
    let total: usize = blocks.iter().map(cost).sum();
    let mut runs = Vec::with_capacity(parts);
    let (mut start, mut done) = (0, 0);
    for (index, block) in blocks.iter().enumerate() {
        done += cost(block);
        let whole_parts = done * parts / total.max(1);
        if whole_parts > runs.len() || index + 1 == blocks.len() {
            runs.push(&blocks[start..=index]);
            start = index + 1;
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;

    /// Every pair that attention counts lies in exactly one tile, and few others do.
    #[test]
    fn tiles_hold_each_visible_pair_once() {
        let layout = Layout::new(&[(50, vec![37, 0, 1])]);
        for window in [None, Some(1), Some(7), Some(64)] {
            for text in Text::of_group(&layout.groups[0]) {
                let (mut pairs, mut computed) = (0, 0);
                for block in text.blocks(16) {
                    let mut seen = std::collections::HashSet::new();
                    for tile in text.tiles(&block, window, 8, 4) {
                        computed += tile.len * tile.queries.len();
                        for query in 0..block.len {
                            let position = block.position + query;
                            let visible = tile.visible(position, window);
                            assert!(visible.is_empty() || tile.queries.contains(&query));
                            for key in visible {
                                let key_position = tile.position + key;
                                assert_eq!(tile.row + key, text.row(key_position));
                                assert!(key_position <= position);
                                assert!(window.is_none_or(|w| position - key_position < w));
                                assert!(seen.insert((position, key_position)));
                            }
                        }
                    }
                    let reach = |p: usize| (p + 1).min(window.unwrap_or(usize::MAX));
                    let expected: usize = (0..block.len).map(|i| reach(block.position + i)).sum();
                    assert_eq!(seen.len(), expected);
                    pairs += expected;
                }
                let edges = 2 * 4 * (text.own_len + 16);
                assert!(computed <= pairs + edges, "{computed} computed for {pairs}");
            }
        }
    }

    #[test]
    fn parts_hold_all_blocks_in_order() {
        let layout = Layout::new(&[(90, vec![37, 5])]);
        let blocks: Vec<(Text, Block)> = Text::of_group(&layout.groups[0])
            .flat_map(|text| text.blocks(8).map(move |block| (text, block)))
            .collect();
        for parts in [1, 2, 3, 100] {
            let runs = split_evenly(&blocks, parts);
            assert!(runs.len() <= parts && runs.iter().all(|run| !run.is_empty()));
            let positions = |run: &[(Text, Block)]| -> Vec<(usize, usize)> {
                run.iter().map(|(text, block)| (text.own_start, block.position)).collect()
            };
            let joined: Vec<_> = runs.iter().flat_map(|run| positions(run)).collect();
            assert_eq!(joined, positions(&blocks));
        }
        assert!(split_evenly(&[], 3).is_empty());
    }
}

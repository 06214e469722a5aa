//! Where a text's tokens lie in a packed batch, cut into blocks of queries and tiles of keys.

use crate::layout::Group;
use std::ops::Range;

/// A text as attention sees it: a prompt that others may share, then rows of its own. The rows of
/// its own are the queries; for the prompt itself they are the prompt, and nothing comes before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Text {
    prompt_start: usize,
    prompt_len: usize,
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
#[derive(Clone, Copy, Debug)]
pub(super) struct Tile {
    pub(super) row: usize,
    pub(super) position: usize,
    pub(super) len: usize,
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

    /// The row of the token at `position`.
    pub(super) fn row(&self, position: usize) -> usize {
        if position < self.prompt_len {
            self.prompt_start + position
        } else {
            self.own_start + position - self.prompt_len
        }
    }

    /// The text's own rows, at most `tokens` at a time.
    pub(super) fn blocks(&self, tokens: usize) -> impl Iterator<Item = Block> + use<> {
        let end = self.prompt_len + self.own_len;
        (self.prompt_len..end)
            .step_by(tokens)
            .map(move |position| Block { position, len: tokens.min(end - position) })
    }

    /// The keys that at least one query of the block may see, at most `keys` at a time.
    pub(super) fn tiles(
        &self,
        block: &Block,
        window: Option<usize>,
        keys: usize,
    ) -> impl Iterator<Item = Tile> + use<> {
        let first = window.map_or(0, |window| (block.position + 1).saturating_sub(window));
        let end = block.position + block.len;
        let prompt = first.min(self.prompt_len)..self.prompt_len;
        let own = first.max(self.prompt_len)..end;
        let text = *self;
        [prompt, own].into_iter().flat_map(move |range| {
            let end = range.end;
            range.step_by(keys).map(move |position| Tile {
                row: text.row(position),
                position,
                len: keys.min(end - position),
            })
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

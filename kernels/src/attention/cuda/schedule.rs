//! Who meets whom, in the form that the kernels of attention.cu read: built once per micro-batch, for all
//! layers with the same window.

use super::super::Heads;
use super::super::text::{Block, Text};
use super::hopper;
use super::tiling::Tiling;
use crate::cuda::{DeviceSlice, Gpu, Result};
use crate::layout::{Group, Layout};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

/// A window that hides nothing. Far from overflowing when positions are added to it.
const UNBOUNDED: usize = 1 << 30;

/// The tiles of a layout's queries and keys. A tile begins where a text begins or another tile of it ends,
/// whatever else is packed, so a group's sums are the same alone and in company.
#[derive(Clone, Debug)]
pub struct Schedule {
    pub(super) heads: Heads,
    pub(super) tiling: Tiling,
    /// On a device and for heads that its kernels are for.
    pub(super) hopper: Option<hopper::Tiling>,
    pub(super) rows: usize,
    /// At most [`UNBOUNDED`].
    pub(super) window: usize,
    pub(super) forward: Table,
    pub(super) backward_keys: Table,
    pub(super) backward_queries: Table,
    /// What follows each task of queries in its block, where [`Self::hopper`]'s kernels ask for it.
    next: Range<usize>,
    /// The tiles of queries that blocks of keys meet there.
    met_queries: Range<usize>,
    numbers: Vec<i32>,
}

/// Numbers of a task and of a run in a table.
const TASK: usize = 5;
const RUN: usize = 3;

/// Where a kernel's `tiles` and `runs` lie in [`Schedule::numbers`].
#[derive(Clone, Debug)]
pub(super) struct Table {
    /// How many tiles.
    pub(super) blocks: u32,
    tiles: Range<usize>,
    runs: Range<usize>,
}

/// Consecutive tokens of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    row: usize,
    position: usize,
    tokens: usize,
}

fn number(n: usize) -> i32 {
    i32::try_from(n).expect("attention: a batch of 2^31 rows")
}

impl Run {
    /// As tables have it.
    fn numbers(self) -> [i32; RUN] {
        [self.row, self.position, self.tokens].map(number)
    }
}

/// What a block owns and what it meets.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Task {
    own: Run,
    met: Vec<Run>,
}

/// Numbers that a schedule of this layout has at most, whatever the window; those of groups packed together add
/// up. None for heads that the kernels do not take.
pub fn most_numbers(layout: &Layout, heads: &Heads) -> usize {
    let Ok(tiling) = Tiling::of(heads) else { return 0 };
    // Queries meet a prompt and their own text, keys their own text, a prompt's also every branch.
    let of_text = |len: usize| {
        let (ahead, back) = (tiling.forward_tokens(), tiling.backward_tokens());
        let met = hopper::tokens_met(heads.sharing());
        let forward = len.div_ceil(ahead);
        let backward = if back == ahead { 0 } else { len.div_ceil(back) };
        (forward + backward) * (TASK + 2 * RUN)
            + forward * heads.kv_heads
            + len.div_ceil(tiling.backward_rows()) * (TASK + RUN)
            + len.div_ceil(met) * RUN
    };
    let of_group = |group: &Group| {
        let lengths = group.branches.iter().map(|branch| branch.len).chain([group.prompt_len]);
        let met = group.prompt_len.div_ceil(tiling.backward_rows()) * group.branches.len();
        lengths.map(of_text).sum::<usize>() + met * RUN
    };
    layout.groups.iter().map(of_group).sum()
}

impl Task {
    fn work(&self) -> usize {
        self.met.iter().map(|run| run.tokens).sum()
    }
}

impl Schedule {
    /// For a batch of this layout on this device, and layers with these heads and this window.
    ///
    /// # Errors
    /// The kernels have no such heads.
    ///
    /// # Panics
    /// The layout or the heads contradict themselves, or the window is 0.
    pub fn new(gpu: &Gpu, layout: &Layout, heads: &Heads, window: Option<usize>) -> Result<Self> {
        Self::of(hopper::Tiling::of(gpu, heads), layout, heads, window)
    }

    /// The same for these kernels.
    pub(super) fn of(
        hopper: Option<hopper::Tiling>,
        layout: &Layout,
        heads: &Heads,
        window: Option<usize>,
    ) -> Result<Self> {
        heads.assert_valid();
        super::super::assert_window(window);
        layout.assert_covers_rows_once();
        let tiling = Tiling::of(heads)?;
        let window = window.unwrap_or(UNBOUNDED).min(UNBOUNDED);
        let mut numbers = Vec::new();
        let (ahead, keys, met, back) = match hopper {
            Some(hopper) => (hopper.tokens(), hopper::OWN, hopper.tokens_met(), hopper.tokens()),
            None => (tiling.forward_tokens(), tiling.backward_rows(), 1, tiling.backward_tokens()),
        };
        let tasks = sorted(query_tasks(layout, ahead, window));
        let forward = Table::push(&tasks, &mut numbers);
        let backward_queries = match back == ahead {
            true => forward.clone(),
            false => Table::push(&sorted(query_tasks(layout, back, window)), &mut numbers),
        };
        let keys = key_tasks(layout, keys, met, window);
        let backward_keys = Table::push(&keys, &mut numbers);
        let start = numbers.len();
        if let Some(hopper) = hopper {
            let tiles =
                tasks.iter().map(|task| hopper.tiles_of(task.met.iter().map(|run| run.tokens)));
            numbers.extend(successors(&tiles.collect::<Vec<_>>(), heads.kv_heads, hopper.blocks()));
        }
        let end = numbers.len();
        if hopper.is_some() {
            let texts = layout.groups.iter().flat_map(Text::of_group);
            let tiles =
                texts.flat_map(|text| text.blocks(met).map(move |block| own_run(&text, &block)));
            numbers.extend(tiles.flat_map(Run::numbers));
        }
        Ok(Self {
            heads: *heads,
            tiling,
            hopper,
            rows: layout.rows(),
            window,
            forward,
            backward_keys,
            backward_queries,
            next: start..end,
            met_queries: end..numbers.len(),
            numbers,
        })
    }

    /// The tiles of queries that blocks of keys meet on Hopper, and how many they are.
    pub(super) fn met_queries<'a>(
        &self,
        tables: &'a DeviceSlice<i32>,
    ) -> (&'a DeviceSlice<i32>, usize) {
        (&tables[self.met_queries.clone()], self.met_queries.len() / RUN)
    }

    /// `next` of a schedule's numbers.
    pub(super) fn next<'a>(&self, tables: &'a DeviceSlice<i32>) -> &'a DeviceSlice<i32> {
        &tables[self.next.clone()]
    }

    /// Numbers that the way back needs besides its results, where it is one pass: f32 sums of dq, and for each token and key head a word,
    /// with one for all.
    pub fn backward_room(&self) -> usize {
        let Heads { kv_heads, .. } = self.heads;
        if self.hopper.is_none() || self.rows == 0 {
            return 0;
        }
        self.rows * (self.heads.query_width() + kv_heads) + 1
    }

    /// What the device needs: to be uploaded, and passed to the launches as `tables`.
    pub fn numbers(&self) -> &[i32] {
        &self.numbers
    }
}

impl Table {
    /// `tiles` and `runs` of a schedule's numbers.
    pub(super) fn of<'a>(
        &self,
        tables: &'a DeviceSlice<i32>,
    ) -> (&'a DeviceSlice<i32>, &'a DeviceSlice<i32>) {
        (&tables[self.tiles.clone()], &tables[self.runs.clone()])
    }

    /// Writes the tasks down.
    fn push(tasks: &[Task], numbers: &mut Vec<i32>) -> Self {
        let start = numbers.len();
        let mut runs = 0;
        for Task { own, met } in tasks {
            let ends = [own.row, own.position, own.tokens, runs, runs + met.len()];
            numbers.extend(ends.map(number));
            runs += met.len();
        }
        let middle = numbers.len();
        numbers.extend(tasks.iter().flat_map(|task| &task.met).flat_map(|run| run.numbers()));
        let blocks = number(tasks.len()) as u32;
        Self { blocks, tiles: start..middle, runs: middle..numbers.len() }
    }
}

/// Those with the most work first: the last blocks that run should be short.
fn sorted(mut tasks: Vec<Task>) -> Vec<Task> {
    tasks.sort_by_key(|task| Reverse(task.work()));
    tasks
}

/// Which task follows each in the same block, or -1: task h n + t is key head h of tile t of n, which meets `tiles[t]` tiles. The
/// first tasks begin a block each, and every other goes to the one that is done first, so that key heads follow each other
/// and their keys stay in the level 2 cache.
fn successors(tiles: &[usize], kv_heads: usize, blocks: usize) -> Vec<i32> {
    let mut next = vec![-1; tiles.len() * kv_heads];
    // When a block is done, its number, the task that it has then.
    let mut running: BinaryHeap<Reverse<(usize, usize, usize)>> = BinaryHeap::new();
    for task in 0..next.len() {
        // What a block does besides takes about as long as a tile.
        let work = 1 + tiles[task % tiles.len()];
        if task < blocks {
            running.push(Reverse((work, task, task)));
            continue;
        }
        let Reverse((done, block, last)) = running.pop().expect("at least one block");
        next[last] = i32::try_from(task).expect("attention: 2^31 tasks");
        running.push(Reverse((done + work, block, task)));
    }
    next
}

/// Blocks of queries, each with the keys that some of them see.
fn query_tasks(layout: &Layout, tokens: usize, window: usize) -> Vec<Task> {
    let texts = layout.groups.iter().flat_map(Text::of_group);
    let blocks = texts.flat_map(|text| text.blocks(tokens).map(move |block| (text, block)));
    blocks
        .map(|(text, block)| {
            let end = block.position + block.len;
            let first = (block.position + 1).saturating_sub(window);
            let prompt = run(&text, first..text.prompt_len);
            let own = run(&text, first.max(text.prompt_len)..end);
            Task { own: own_run(&text, &block), met: prompt.into_iter().chain(own).collect() }
        })
        .collect()
}

/// Blocks of keys, each with the queries that see some of them, in whole tiles of `met` tokens from the beginning of their text. Those
/// with the most work come first, but none before one whose keys the same queries see earlier in their text: that is who adds to
/// these queries' gradients before it.
fn key_tasks(layout: &Layout, tokens: usize, met: usize, window: usize) -> Vec<Task> {
    let mut tasks: Vec<(usize, Task)> = Vec::new();
    for group in &layout.groups {
        let texts: Vec<Text> = Text::of_group(group).collect();
        // The most work of those that come later.
        let mut of_group = 0;
        for (at, text) in texts.iter().enumerate().rev() {
            // The prompt, which is the first text, is seen by the branches too.
            let (branches, mut most) = if at == 0 { (&texts[1..], of_group) } else { (&[][..], 0) };
            let blocks: Vec<Block> = text.blocks(tokens).collect();
            for block in blocks.iter().rev() {
                // The last key is seen the farthest.
                let end = block.position + block.len - 1 + window;
                let own = whole_tiles(text, block.position..end, met);
                let branches =
                    branches.iter().filter_map(|b| whole_tiles(b, b.prompt_len..end, met));
                let own_and_branches: Vec<Run> = own.into_iter().chain(branches).collect();
                let task = Task { own: own_run(text, block), met: own_and_branches };
                most = most.max(task.work());
                tasks.push((most, task));
            }
            of_group = of_group.max(most);
        }
    }
    tasks.reverse();
    tasks.sort_by_key(|(most, _)| Reverse(*most));
    tasks.into_iter().map(|(_, task)| task).collect()
}

/// The text's own tokens at these positions, if there are any, and those in the same tiles of `tokens`.
fn whole_tiles(text: &Text, positions: Range<usize>, tokens: usize) -> Option<Run> {
    let Range { start, end } = positions.start..positions.end.min(text.end());
    let first = text.prompt_len + (start - text.prompt_len) / tokens * tokens;
    let behind = text.prompt_len + end.saturating_sub(text.prompt_len).next_multiple_of(tokens);
    if start < end { run(text, first..behind.min(text.end())) } else { None }
}

fn own_run(text: &Text, block: &Block) -> Run {
    Run { row: text.row(block.position), position: block.position, tokens: block.len }
}

/// The tokens at these positions, if there are any.
fn run(text: &Text, positions: Range<usize>) -> Option<Run> {
    let (position, tokens) = (positions.start, positions.len());
    (tokens > 0).then(|| Run { row: text.row(position), position, tokens })
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::visible_rows;
    use super::*;
    use std::collections::HashMap;

    /// The pairs (query, key) that are visible within the blocks and their runs.
    fn pairs(tasks: &[Task], window: usize, own_is_key: bool) -> Vec<(usize, usize)> {
        let mut pairs = Vec::new();
        for Task { own, met } in tasks {
            for (a, run) in (0..own.tokens).flat_map(|a| met.iter().map(move |run| (a, run))) {
                for b in 0..run.tokens {
                    let (own, met) =
                        ((own.row + a, own.position + a), (run.row + b, run.position + b));
                    let (query, key) = if own_is_key { (met, own) } else { (own, met) };
                    if key.1 <= query.1 && query.1 - key.1 < window {
                        pairs.push((query.0, key.0));
                    }
                }
            }
        }
        pairs.sort_unstable();
        pairs
    }

    #[test]
    fn both_tables_hold_each_visible_pair_once() {
        let layout =
            Layout::new(&[(37, vec![5, 0, 61, 1]), (0, vec![70, 3]), (9, vec![]), (0, vec![])]);
        for window in [None, Some(1), Some(7), Some(40)] {
            let expected: Vec<(usize, usize)> = (0..layout.rows())
                .flat_map(|q| visible_rows(&layout, q, window).into_iter().map(move |k| (q, k)))
                .collect();
            let window = window.unwrap_or(UNBOUNDED);
            for (tokens, met) in [(1, 1), (16, 9), (64, 64)] {
                let (queries, keys) =
                    (query_tasks(&layout, tokens, window), key_tasks(&layout, tokens, met, window));
                assert_eq!(pairs(&queries, window, false), expected);
                assert_eq!(pairs(&keys, window, true), expected);
            }
        }
    }

    /// Blocks of keys take their turns in the order of the list, and meet whole tiles: what is before a tile of queries is added
    /// before, without a gap.
    #[test]
    fn keys_come_in_the_order_of_their_positions() {
        let layout =
            Layout::new(&[(37, vec![5, 0, 61, 1]), (0, vec![170, 3]), (200, vec![40, 90])]);
        for window in [UNBOUNDED, 1, 7, 40, 100] {
            for (tokens, met) in [(16, 9), (64, 64), (32, 1)] {
                // Of each tile of queries, by its first row: up to which position keys have come.
                let mut words: HashMap<usize, usize> = HashMap::new();
                for Task { own, met: runs } in key_tasks(&layout, tokens, met, window) {
                    for run in runs {
                        for first in (0..run.tokens).step_by(met) {
                            let seen = (run.position + first + 1).saturating_sub(window);
                            match words.insert(run.row + first, own.position + own.tokens) {
                                None => assert!(own.position <= seen),
                                Some(before) => {
                                    assert!(own.position == before && before > seen);
                                }
                            }
                        }
                    }
                }
                let texts = layout.groups.iter().flat_map(Text::of_group);
                let tiles: usize = texts.map(|text| text.blocks(met).count()).sum();
                assert_eq!(words.len(), tiles);
            }
        }
    }

    #[test]
    fn no_schedule_has_more_numbers_than_are_planned() {
        let groups = [
            (37, vec![5, 0, 61, 1]),
            (0, vec![70, 3]),
            (9, vec![]),
            (0, vec![]),
            (300, vec![1; 90]),
        ];
        for (heads, kv_heads, head_dim) in [(4, 4, 64), (14, 2, 64), (8, 1, 128), (64, 1, 80)] {
            let heads = Heads { heads, kv_heads, head_dim };
            let most = most_numbers(&Layout::new(&groups), &heads);
            let alone = groups.iter().map(|group| Layout::new(std::slice::from_ref(group)));
            assert_eq!(most, alone.map(|layout| most_numbers(&layout, &heads)).sum());
            for window in [None, Some(1), Some(40), Some(200)] {
                let schedule = Schedule::of(None, &Layout::new(&groups), &heads, window).unwrap();
                let numbers = schedule.numbers().len();
                assert!(numbers <= most, "{numbers} numbers, {most} planned");
                assert!(
                    window.is_some() || 2 * numbers > most,
                    "{numbers} numbers, {most} planned"
                );
            }
        }
    }

    /// Every task once, each block about as much as another.
    #[test]
    fn blocks_share_the_tasks_evenly() {
        let (kv_heads, blocks) = (3, 13);
        let tiles: Vec<usize> = (1..=40).rev().collect();
        let next = successors(&tiles, kv_heads, blocks);
        let (mut seen, mut loads) = (vec![0; next.len()], vec![]);
        for block in 0..blocks {
            let (mut task, mut load) = (block as i32, 0);
            while let Ok(at) = usize::try_from(task) {
                seen[at] += 1;
                load += 1 + tiles[at % tiles.len()];
                task = next[at];
            }
            loads.push(load);
        }
        assert!(seen.iter().all(|times| *times == 1));
        let mean = loads.iter().sum::<usize>() / blocks;
        assert!(loads.iter().all(|load| load.abs_diff(mean) <= 8), "{loads:?}");
        assert_eq!(successors(&tiles[..2], 2, 13), [-1; 4], "no more tasks than blocks");
        assert!(successors(&[], 2, 13).is_empty());
    }

    /// A batch of one long text, whose tables must stay small.
    #[test]
    fn long_texts_have_few_numbers() {
        let heads = Heads { heads: 32, kv_heads: 8, head_dim: 128 };
        let layout = Layout::new(&[(0, vec![32 * 1024])]);
        let schedule = Schedule::of(None, &layout, &heads, None).unwrap();
        assert!(schedule.numbers().len() < 32 * 1024);
        let task = schedule.forward.tiles.clone().step_by(5).next().unwrap();
        assert_eq!(schedule.numbers[task + 1], 32 * 1024 - 32, "the longest block comes first");
    }
}

//! The largest micro-batches of a run, found by going through all of its steps without computing any.

use super::super::pass::groups;
use super::super::plan::{Plan, Rows};
use super::super::setup::Stage;
use super::super::statistics::{self, WIDEST};
use crate::config::Gain;
use crate::data::{Example, Item, Source};
use crate::group::Group;
use crate::model::Packed;
use crate::model::memory::Size;
use rayon::prelude::*;
use std::collections::BTreeSet;
use uft_core::Needs;
use uft_kernels::attention::Heads;

/// Steps that are drawn beforehand; a longer run's are bounded.
const DRAWN: u64 = 100_000;
/// Different micro-batches that a plan for a GPU goes through.
const SHAPES: usize = 2000;

/// Micro-batches, without those that are smaller than another in every way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Largest {
    /// Of the way forward and back.
    pub steps: Vec<Size>,
    /// Of the way forward with others beside the batch, which is first, and back without them.
    pub with_others: Vec<[Size; 2]>,
    /// Of log-probs alone: evaluation, mismatched completions.
    pub forward: Vec<Size>,
    /// What a reference pass is over.
    pub reference: Reference,
    /// Of the steps that are drawn, each once.
    pub large: Vec<Size>,
    /// As `with_others`, all of them.
    pub large_with_others: Vec<[Size; 2]>,
}

/// The most that a reference pass computes at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reference {
    /// Rows of all groups; 0 where nothing reads a reference.
    pub rows: usize,
    /// Of the longest group.
    longest: usize,
    /// Whether groups go into micro-batches together.
    packed: bool,
}

impl Reference {
    /// Its largest micro-batch, if they have at most `tokens` rows.
    pub fn size(&self, tokens: usize) -> Size {
        let Self { rows, longest, packed } = *self;
        unpacked(if packed { longest.max(tokens.min(rows)) } else { longest }, longest)
    }

    /// Also so many rows of groups of at most `longest`.
    fn include(&mut self, rows: usize, longest: usize, without: &[Gain]) {
        self.rows = self.rows.max(rows);
        self.longest = self.longest.max(longest);
        // Neighbours with the same prompt are joined even where groups are not packed.
        let apart = [Gain::Packing, Gain::SharedPrompts].iter().all(|gain| without.contains(gain));
        self.packed |= !apart;
    }
}

/// The size of every group of the run, so that each is laid out once.
pub struct Sizes {
    /// By source: of the training rows and of the held-out rows.
    groups: Vec<[Vec<Size>; 2]>,
}

impl Sizes {
    pub fn of(sources: &[Source], without: &[Gain], heads: &Heads) -> Self {
        let size = |example: &Example| match without.contains(&Gain::SharedPrompts) {
            true => Size::of(&Packed::with_prompt_copies(&[&example.group]), heads),
            false => Size::of(&Packed::new(&[&example.group]), heads),
        };
        let all = |examples: &[Example]| examples.par_iter().map(size).collect();
        let of = |source: &Source| [all(&source.train), all(&source.held_out)];
        Self { groups: sources.iter().map(of).collect() }
    }

    fn get(&self, item: Item, rows: Rows) -> Size {
        self.groups[item.source][usize::from(rows == Rows::HeldOut)][item.row]
    }

    /// Every group with its longest sequence.
    pub fn alone<'a>(
        &'a self,
        sources: &'a [Source],
    ) -> impl Iterator<Item = (usize, Size)> + Clone + 'a {
        sources.iter().zip(&self.groups).flat_map(|(source, [train, held_out])| {
            let examples = source.train.iter().chain(&source.held_out);
            examples.zip(train.iter().chain(held_out)).map(|(e, s)| (e.group.longest(), *s))
        })
    }
}

impl Largest {
    /// Goes through all stages of a run with micro-batches of at most `micro_tokens` rows, of which
    /// `enough` are as [`super::super::micro::enough`].
    pub fn of(
        sources: &[Source],
        stages: &[Stage],
        sizes: &Sizes,
        heads: &Heads,
        micro_tokens: usize,
        enough: usize,
    ) -> Self {
        let mut largest = Self::default();
        let (mut each, mut each_with_others) = (BTreeSet::new(), BTreeSet::new());
        for stage in stages {
            let without = &stage.train.without;
            let mut order = stage.order(sources);
            let (steps, longest) = (stage.steps(sources), longest(sources, sizes));
            let mut most = 0;
            for _ in 0..steps.min(DRAWN) {
                let items = order.batch(stage.train.batch);
                let plan = Plan::new(sources, Rows::Train, &items, micro_tokens, enough, without);
                let sizes = micro_batches(&plan, sizes);
                most = most.max(sizes.iter().map(|size| size.rows).sum());
                each.extend(sizes.iter().copied());
                sizes.into_iter().for_each(|size| keep(&mut largest.steps, size));
                if let Some(pair) = with_others(sources, &plan, heads, micro_tokens, without) {
                    each_with_others.insert(pair);
                    largest.keep_with_others(pair);
                }
            }
            if steps > DRAWN {
                most = stage.train.batch * longest;
                let size = at_most(longest, most, micro_tokens, without);
                keep(&mut largest.steps, size);
                let any = |&source: &usize| has_others(&sources[source], without);
                if stage.sources.iter().any(any) {
                    let rows = most.min((WIDEST * micro_tokens).saturating_sub(size.rows));
                    let others = unpacked(rows, rows);
                    largest.keep_with_others([size, size + others]);
                }
            }
            let mut beside = Mismatched::default();
            for source in stage.sources.iter().map(|&s| &sources[s]) {
                let of_source = Mismatched::of(source, &source.train, stage.train.batch);
                keep(&mut largest.forward, of_source.size(micro_tokens, without));
                beside = beside.and(of_source);
            }
            // Of a step's rows those whose log-probs are not known.
            if stage.sources.iter().any(|&source| sources[source].needs_reference()) {
                let longest = longest.max(beside.longest);
                largest.reference.include(most + beside.rows, longest, without);
            }
        }
        largest.large = last_of(each);
        largest.large_with_others = last_of(each_with_others);
        // All held-out rows are one step.
        let Some(Stage { train, .. }) = stages.first() else { return largest };
        let all = |source: usize| {
            (0..sources[source].held_out.len()).map(move |row| Item { source, row })
        };
        let items: Vec<Item> = (0..sources.len()).flat_map(all).collect();
        let without = &train.without;
        // Or some of them: those of a stage's sources.
        let total = items.iter().map(|&item| sizes.get(item, Rows::HeldOut).rows).sum();
        if total > 0 {
            let longest = longest(sources, sizes);
            keep(&mut largest.forward, at_most(longest, total, micro_tokens, without));
        }
        let mut beside = Mismatched::default();
        for source in sources {
            let of_source = Mismatched::of(source, &source.held_out, source.held_out.len());
            keep(&mut largest.forward, of_source.size(micro_tokens, without));
            beside = beside.and(of_source);
        }
        if total > 0 && sources.iter().any(Source::needs_reference) {
            let longest = longest(sources, sizes).max(beside.longest);
            largest.reference.include(total + beside.rows, longest, without);
        }
        keep(&mut largest.forward, largest.reference.size(micro_tokens));
        largest
    }

    /// Adds a micro-batch alone and with others beside it.
    fn keep_with_others(&mut self, new: [Size; 2]) {
        let inside = |a: &[Size; 2], b: &[Size; 2]| a[0].is_within(&b[0]) && a[1].is_within(&b[1]);
        if !self.with_others.iter().any(|pair| inside(&new, pair)) {
            self.with_others.retain(|pair| !inside(pair, &new));
            self.with_others.push(new);
        }
    }

    /// Without those that are smaller than another in every way.
    pub fn reduced(&self) -> Self {
        let reduce = |sizes: &[Size]| {
            let mut kept = Vec::new();
            sizes.iter().for_each(|size| keep(&mut kept, *size));
            kept
        };
        Self { steps: reduce(&self.steps), forward: reduce(&self.forward), ..Self::default() }
    }

    /// The micro-batch with the most rows.
    pub fn most_rows(&self) -> Size {
        let all = self.steps.iter().chain(&self.forward);
        all.copied().max_by_key(|size| size.rows).unwrap_or_default()
    }

    /// Rows of the longest group.
    pub fn longest(&self) -> usize {
        self.steps.iter().chain(&self.forward).map(|size| size.longest).max().unwrap_or(0)
    }
}

/// At most [`SHAPES`], those with the most rows.
fn last_of<T>(rising: BTreeSet<T>) -> Vec<T> {
    rising.into_iter().rev().take(SHAPES).collect()
}

/// The micro-batches of a step.
fn micro_batches(plan: &Plan, sizes: &Sizes) -> Vec<Size> {
    let size = |g: &usize| sizes.get(plan.groups[*g].item, Rows::Train);
    let sum = |batch: &Vec<usize>| batch.iter().map(size).fold(Size::default(), |a, b| a + b);
    plan.micro_batches.iter().map(sum).collect()
}

/// Rows of the largest group.
fn longest(sources: &[Source], sizes: &Sizes) -> usize {
    sizes.alone(sources).map(|(_, size)| size.rows).max().unwrap_or(0)
}

/// At most what a micro-batch takes of groups with `total` rows, the largest of which has `longest`.
fn at_most(longest: usize, total: usize, micro_tokens: usize, without: &[Gain]) -> Size {
    let rows = match without.contains(&Gain::Packing) {
        true => longest,
        false => longest.max(micro_tokens.min(total)),
    };
    unpacked(rows, longest)
}

/// At most what so many rows take, however they are divided among groups of at most `longest`.
fn unpacked(rows: usize, longest: usize) -> Size {
    // Of a row that is a text of its own, and of a branch that every tile of its prompt meets.
    const OF_TEXT: usize = 30;
    const OF_BRANCH: usize = 3;
    const TILE: usize = 64;
    let tables = rows * (OF_TEXT + OF_BRANCH * longest.div_ceil(TILE));
    Size { rows, needed: rows, targets: rows, longest, tables }
}

/// At most what mismatched completions are: every prompt with the longest completion of another.
#[derive(Clone, Copy, Default)]
struct Mismatched {
    rows: usize,
    longest: usize,
}

impl Mismatched {
    /// Of `batch` of the rows.
    fn of(source: &Source, examples: &[Example], batch: usize) -> Self {
        if !source.objective.needs(Needs::MISMATCHED) || examples.is_empty() {
            return Self::default();
        }
        let most = |length: fn(&Group) -> usize| examples.iter().map(|e| length(&e.group)).max();
        // The prompt of a later segment reaches almost to the end of its branch.
        let prompt = most(Group::longest).unwrap_or(0);
        let completion = most(|group| group.segments().map(|s| s.tokens()).max().unwrap_or(0));
        let responses = most(|group| group.segments().count()).unwrap_or(0);
        let longest = prompt + completion.unwrap_or(0);
        Self { rows: batch * responses * longest, longest }
    }

    fn and(self, other: Self) -> Self {
        Self { rows: self.rows + other.rows, longest: self.longest.max(other.longest) }
    }

    fn size(self, micro_tokens: usize, without: &[Gain]) -> Size {
        at_most(self.longest, self.rows, micro_tokens, without)
    }
}

/// Whether mismatched completions may go beside a source's batches.
fn has_others(source: &Source, without: &[Gain]) -> bool {
    source.objective.needs(Needs::MISMATCHED) && !without.contains(&Gain::SharedPrompts)
}

/// A step's micro-batch that has mismatched completions beside it, alone and with them.
fn with_others(
    sources: &[Source],
    plan: &Plan,
    heads: &Heads,
    micro_tokens: usize,
    without: &[Gain],
) -> Option<[Size; 2]> {
    if !plan.sources().any(|source| has_others(&sources[source], without)) {
        return None;
    }
    let rows = Rows::Train;
    let batch = &plan.micro_batches[statistics::early(sources, plan)?];
    let mismatched = statistics::mismatched(sources, rows, plan);
    let room = WIDEST * micro_tokens;
    let beside = statistics::beside(sources, rows, plan, batch, &mismatched, room, without);
    if beside.is_empty() {
        return None;
    }
    let members = groups(sources, rows, plan, batch);
    let laid_out = statistics::with_others(&members, &mismatched, &beside);
    Some([Size::of(&laid_out.own, heads), Size::of(&laid_out.all, heads)])
}

/// Adds a size, unless another is as large in every way, and drops those that it outgrows.
fn keep(sizes: &mut Vec<Size>, new: Size) {
    if new.rows > 0 && !sizes.iter().any(|size| new.is_within(size)) {
        sizes.retain(|size| !size.is_within(&new));
        sizes.push(new);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_largest_are_kept() {
        let size = |rows, targets| Size { rows, needed: targets, targets, longest: 1, tables: 0 };
        let mut kept = Vec::new();
        for new in [size(5, 5), size(4, 4), size(3, 9), size(5, 5), size(6, 5), Size::default()] {
            keep(&mut kept, new);
        }
        assert_eq!(kept, [size(3, 9), size(6, 5)]);
    }
}

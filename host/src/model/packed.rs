//! A packed micro-batch: groups laid out without padding, and which rows predict which tokens.

use crate::group::Group;
use std::ops::Range;
use uft_kernels::attention::{self, Heads};
use uft_kernels::layout::{Beside, Layout};

/// T rows of tokens with their layout, and M targets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// `[T]`.
    pub tokens: Vec<u32>,
    pub layout: Layout,
    pub targets: Targets,
    /// Numbers of attention's tables on a device where they are not those of the layout: of a batch that stands for
    /// others in a plan.
    pub tables: Option<usize>,
}

/// What the log-probs are of: hidden row `rows[i]` predicts `tokens[i]`. A prompt's last row
/// predicts the first token of each of its branches, so rows may repeat.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Targets {
    /// `[M]`.
    pub rows: Vec<u32>,
    /// `[M]`.
    pub tokens: Vec<u32>,
}

/// A batch with others beside it, which share its prompts.
#[derive(Debug)]
pub struct WithOthers {
    /// What the way back is for.
    pub own: Packed,
    /// Everything.
    pub all: Packed,
    /// `[T of own]`: where its rows are in `all`.
    pub rows: Vec<u32>,
    /// `[M of own]`: where its targets are in `all`.
    pub targets: Vec<u32>,
    /// Where each other's targets are in `all`.
    pub of_others: Vec<Range<usize>>,
}

/// The others of [`WithOthers`], in T rows of their own behind the batch's prompts.
#[derive(Debug)]
pub(super) struct Others {
    /// `[T]`.
    pub tokens: Vec<u32>,
    pub beside: Beside,
    /// `[M]`: the tokens to predict.
    pub targets: Vec<u32>,
    /// `[M]`: what predicts them.
    pub read: Vec<Read>,
    /// Rows that targets read: rising, each once.
    pub needed: Vec<u32>,
}

/// What predicts a token of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// One of their own rows.
    Row(u32),
    /// The end of a prompt, which this target of the batch reads, too.
    Target(usize),
}

impl WithOthers {
    /// The others apart from the batch.
    pub(super) fn others(&self) -> Others {
        let mut beside = Beside::default();
        for (group, joint) in self.own.layout.groups.iter().zip(&self.all.layout.groups) {
            for branch in &joint.branches[group.branches.len()..] {
                beside.push(group, branch.len);
            }
        }
        let is_other = |row: &u32| self.rows.binary_search(row).is_err();
        let rows: Vec<u32> = (0..self.all.rows() as u32).filter(is_other).collect();
        let (mut targets, mut read) = (Vec::new(), Vec::new());
        let all = &self.all.targets;
        for (target, (row, token)) in all.rows.iter().zip(&all.tokens).enumerate() {
            if self.targets.binary_search(&(target as u32)).is_ok() {
                continue;
            }
            targets.push(*token);
            read.push(match self.rows.binary_search(row) {
                Err(_) => {
                    Read::Row(rows.binary_search(row).expect("every row is someone's") as u32)
                }
                Ok(own) => {
                    let reader = self.own.targets.rows.iter().position(|row| *row == own as u32);
                    Read::Target(reader.expect("see Packed::with_others"))
                }
            });
        }
        let mut needed: Vec<u32> = read
            .iter()
            .filter_map(|read| match read {
                Read::Row(row) => Some(*row),
                Read::Target(_) => None,
            })
            .collect();
        needed.sort_unstable();
        needed.dedup();
        let tokens = rows.iter().map(|&row| self.all.tokens[row as usize]).collect();
        Others { tokens, beside, targets, read, needed }
    }
}

impl Packed {
    /// Packs groups. Targets are ordered by group, branch, segment and trained position.
    ///
    /// A branch gets rows only up to its last trained token, which is predicted but predicts
    /// nothing, so a batch has fewer rows than its groups have tokens.
    ///
    /// # Panics
    /// If the first token of a branch without a prompt is trained: nothing predicts it.
    pub fn new(groups: &[&Group]) -> Self {
        let lengths: Vec<(usize, Vec<usize>)> = groups
            .iter()
            .map(|group| (group.prompt.len(), group.branches.iter().map(rows_needed).collect()))
            .collect();
        let layout = Layout::new(&lengths);
        let mut tokens = Vec::with_capacity(layout.rows());
        let mut targets = Targets::default();
        for (group, place) in groups.iter().zip(&layout.groups) {
            tokens.extend(&group.prompt);
            for (branch, place_of_branch) in group.branches.iter().zip(&place.branches) {
                tokens.extend(&branch.tokens[..place_of_branch.len]);
                let trained = branch.segments.iter().flat_map(|segment| &segment.trained);
                for index in trained.flat_map(Clone::clone) {
                    let row = match index.checked_sub(1) {
                        Some(before) => place_of_branch.start + before,
                        None => {
                            assert!(place.prompt_len > 0, "a first token cannot be trained");
                            place.start + place.prompt_len - 1
                        }
                    };
                    targets.rows.push(u32::try_from(row).expect("a batch of more than 2^32 rows"));
                    targets.tokens.push(branch.tokens[index]);
                }
            }
        }
        Self { tokens, layout, targets, tables: None }
    }

    /// As [`Self::new`] with a copy of the prompt for every branch: the same targets in the same order, in
    /// more rows.
    pub fn with_prompt_copies(groups: &[&Group]) -> Self {
        let alone: Vec<Group> = groups.iter().flat_map(|group| group.alone()).collect();
        Self::new(&alone.iter().collect::<Vec<_>>())
    }

    /// Packs groups together with others, which only the way forward is for: of each the number of its group,
    /// with which it shares the prompt.
    ///
    /// # Panics
    /// If an other's prompt is not that of its group, or an other's first token is trained and its group has
    /// none like it ([`Group::reads_prompt`]).
    pub fn with_others(groups: &[&Group], others: &[(usize, &Group)]) -> WithOthers {
        let mut joint: Vec<Group> = groups.iter().map(|&group| group.clone()).collect();
        for &(of, other) in others {
            assert_eq!(joint[of].prompt, other.prompt, "others share their group's prompt");
            assert!(
                groups[of].reads_prompt() || !other.reads_prompt(),
                "a prompt's end that is not read"
            );
            joint[of].branches.extend(other.branches.iter().cloned());
        }
        let all = Self::new(&joint.iter().collect::<Vec<_>>());
        let (mut rows, mut targets) = (Vec::new(), Vec::new());
        let mut of_others = vec![0..0; others.len()];
        let mut target = 0;
        for (index, (group, place)) in groups.iter().zip(&all.layout.groups).enumerate() {
            let branches = &place.branches[..group.branches.len()];
            let own = place.prompt_len + branches.iter().map(|b| b.len).sum::<usize>();
            rows.extend(place.start as u32..(place.start + own) as u32);
            let own: usize = group.segments().map(|s| s.tokens()).sum();
            targets.extend(target as u32..(target + own) as u32);
            target += own;
            for (range, (_, other)) in
                of_others.iter_mut().zip(others).filter(|(_, (of, _))| *of == index)
            {
                let tokens: usize = other.segments().map(|s| s.tokens()).sum();
                *range = target..target + tokens;
                target += tokens;
            }
        }
        WithOthers { own: Self::new(groups), all, rows, targets, of_others }
    }

    /// One text without branches, nothing trained: a prompt to be continued.
    pub fn prompt(tokens: &[u32]) -> Self {
        let layout = Layout::new(&[(tokens.len(), Vec::new())]);
        Self { tokens: tokens.to_vec(), layout, targets: Targets::default(), tables: None }
    }

    /// T.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Numbers that attention's tables have at most, for layers with one window.
    pub fn tables(&self, heads: &Heads) -> usize {
        self.tables.unwrap_or_else(|| attention::cuda::most_numbers(&self.layout, heads))
    }
}

/// Rows up to the last trained token, exclusive.
fn rows_needed(branch: &crate::group::Branch) -> usize {
    let ends = branch.segments.iter().flat_map(|segment| segment.trained.iter().map(|r| r.end));
    ends.max().map_or(0, |end| end - 1)
}

/// The rows that targets read: what the top of the model is computed for.
#[derive(Debug)]
pub(super) struct NeededRows {
    /// `[N]`: rising, each once.
    pub rows: Vec<u32>,
    /// `[M]`: for every target the index of its row in `rows`.
    pub of_target: Vec<u32>,
}

impl NeededRows {
    pub fn of(targets: &Targets) -> Self {
        let mut rows = targets.rows.clone();
        rows.sort_unstable();
        rows.dedup();
        let index = |row: &u32| rows.binary_search(row).expect("every row was collected") as u32;
        let of_target = targets.rows.iter().map(index).collect();
        Self { rows, of_target }
    }

    /// Every row, whether targets read it or not.
    pub fn all(packed: &Packed) -> Self {
        Self { rows: (0..packed.rows() as u32).collect(), of_target: packed.targets.rows.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::{Branch, Segment};
    use uft_core::Feedback;

    fn branch(tokens: &[u32], trained: &[&[(usize, usize)]]) -> Branch {
        let segment = |ranges: &&[(usize, usize)]| Segment {
            feedback: Feedback::Demonstration,
            trained: ranges.iter().map(|(start, end)| *start..*end).collect(),
        };
        Branch { tokens: tokens.to_vec(), segments: trained.iter().map(segment).collect() }
    }

    #[test]
    fn targets_follow_group_branch_segment_and_position() {
        let first = Group {
            prompt: vec![1, 2],
            branches: vec![
                branch(&[10, 11, 12], &[&[(0, 2)]]),
                branch(&[20, 21, 22, 23, 24], &[&[(3, 4)], &[(0, 1), (2, 3)]]),
                branch(&[30], &[&[(0, 1)]]),
                branch(&[40, 41], &[]),
            ],
        };
        let second = Group { prompt: vec![], branches: vec![branch(&[50, 51, 52], &[&[(1, 3)]])] };
        let packed = Packed::new(&[&first, &second]);
        // Rows 0 1 | 2 | 3 4 5 | - | - and 6 7.
        assert_eq!(packed.tokens, [1, 2, 10, 20, 21, 22, 50, 51]);
        assert_eq!(packed.layout.positions, [0, 1, 2, 2, 3, 4, 0, 1]);
        assert_eq!(packed.targets.rows, [1, 2, 5, 1, 4, 1, 6, 7]);
        assert_eq!(packed.targets.tokens, [10, 11, 23, 20, 22, 30, 51, 52]);
        let needed = NeededRows::of(&packed.targets);
        assert_eq!(needed.rows, [1, 2, 4, 5, 6, 7]);
        assert_eq!(needed.of_target, [0, 1, 3, 0, 2, 0, 4, 5]);
        let all = NeededRows::all(&packed);
        assert_eq!((all.rows.len(), &all.of_target), (8, &packed.targets.rows));

        // Rows 0 1 2 | 3 4 5 6 7 | 8 9 | 10 11 and 12 13.
        let copies = Packed::with_prompt_copies(&[&first, &second]);
        assert_eq!(copies.tokens, [1, 2, 10, 1, 2, 20, 21, 22, 1, 2, 1, 2, 50, 51]);
        assert_eq!(copies.targets.tokens, packed.targets.tokens);
        assert_eq!(copies.targets.rows, [1, 2, 7, 4, 6, 9, 12, 13]);
        assert_eq!(first.rows_alone() + second.rows_alone(), 2 * 4 + 3 + 5 + 1 + 2 + 3);
    }

    #[test]
    fn others_have_rows_of_their_own() {
        let own = Group { prompt: vec![1, 2], branches: vec![branch(&[10, 11], &[&[(0, 2)]])] };
        let alone = Group { prompt: vec![], branches: vec![branch(&[50, 51], &[&[(1, 2)]])] };
        let other = |tokens: &[u32], trained: &[(usize, usize)]| Group {
            prompt: vec![1, 2],
            branches: vec![branch(tokens, &[trained])],
        };
        let first = other(&[20, 21, 22], &[(0, 1), (2, 3)]);
        let second = other(&[30], &[(0, 1)]);
        let third = other(&[40, 41], &[(1, 2)]);
        let batch = Packed::with_others(&[&alone, &own], &[(1, &first), (1, &second), (1, &third)]);
        // Rows 0 and 1 2 | 3; of the others 0 1 | - | 2.
        assert_eq!(batch.own.tokens, [50, 1, 2, 10]);
        let others = batch.others();
        assert_eq!(others.tokens, [20, 21, 40]);
        assert_eq!(others.beside.positions, [2, 3, 2]);
        let starts = others.beside.continuations.iter();
        let starts: Vec<_> = starts.map(|c| (c.prompt_start, c.branch.start)).collect();
        assert_eq!(starts, [(1, 0), (1, 2), (1, 2)]);
        assert_eq!(others.targets, [20, 22, 30, 41]);
        use Read::{Row, Target};
        assert_eq!(others.read, [Target(1), Row(1), Target(1), Row(2)]);
        assert_eq!(others.needed, [1, 2]);
    }

    #[test]
    #[should_panic(expected = "a prompt's end that is not read")]
    fn others_read_no_more_of_a_prompt_than_the_batch() {
        let group = |trained| Group { prompt: vec![1], branches: vec![branch(&[2, 3], trained)] };
        Packed::with_others(&[&group(&[&[(1, 2)]])], &[(0, &group(&[&[(0, 1)]]))]);
    }

    #[test]
    #[should_panic(expected = "a first token cannot be trained")]
    fn a_first_token_has_nothing_before_it() {
        let group = Group { prompt: vec![], branches: vec![branch(&[1, 2], &[&[(0, 2)]])] };
        Packed::new(&[&group]);
    }
}

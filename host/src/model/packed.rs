//! A packed micro-batch: groups laid out without padding, and which rows predict which tokens.

use crate::group::Group;
use std::ops::Range;
use uft_kernels::layout::Layout;

/// T rows of tokens with their layout, and M targets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// `[T]`.
    pub tokens: Vec<u32>,
    pub layout: Layout,
    pub targets: Targets,
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
        Self { tokens, layout, targets }
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
    /// If an other's prompt is not that of its group.
    pub fn with_others(groups: &[&Group], others: &[(usize, &Group)]) -> WithOthers {
        let mut joint: Vec<Group> = groups.iter().map(|&group| group.clone()).collect();
        for &(of, other) in others {
            assert_eq!(joint[of].prompt, other.prompt, "others share their group's prompt");
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
        Self { tokens: tokens.to_vec(), layout, targets: Targets::default() }
    }

    /// T.
    pub fn rows(&self) -> usize {
        self.tokens.len()
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
    #[should_panic(expected = "a first token cannot be trained")]
    fn a_first_token_has_nothing_before_it() {
        let group = Group { prompt: vec![], branches: vec![branch(&[1, 2], &[&[(0, 2)]])] };
        Packed::new(&[&group]);
    }
}

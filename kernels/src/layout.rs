//! The layout of a packed micro-batch: which rows belong together and who may attend to whom.
//!
//! A row is one token. A batch is a sequence of contiguous groups without padding; a group is a
//! prompt followed by its branches (the responses), each contiguous:
//!
//! ```text
//! rows       | prompt        | branch 0  | branch 1      | next group ...
//! positions  | 0 1 2 ... P-1 | P P+1 ... | P P+1 P+2 ... | 0 1 ...
//! ```
//!
//! A prompt row attends to the prompt rows up to itself. A branch row attends to its group's whole
//! prompt and to the rows of its own branch up to itself, so the prompt is computed once however
//! many branches it has, and every branch sees exactly what it would see alone.

/// One response: `len` rows from row `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Branch {
    /// First row, counted from the start of the batch.
    pub start: usize,
    /// Number of rows; may be 0.
    pub len: usize,
}

/// One prompt and its branches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// First row of the prompt, counted from the start of the batch.
    pub start: usize,
    /// Number of prompt rows; may be 0.
    pub prompt_len: usize,
    /// The branches in row order; the first begins right after the prompt.
    pub branches: Vec<Branch>,
}

impl Group {
    /// The rows of the prompt and all branches.
    pub fn rows(&self) -> std::ops::Range<usize> {
        let len: usize = self.branches.iter().map(|branch| branch.len).sum();
        self.start..self.start + self.prompt_len + len
    }
}

/// A packed micro-batch of T rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The groups in row order; together they cover every row once.
    pub groups: Vec<Group>,
    /// `[T]`: a row's distance from the start of its own text (prompt, then branch).
    pub positions: Vec<u32>,
}

impl Layout {
    /// Lays out groups given as `(prompt_len, branch_lens)` one after the other.
    pub fn new(groups: &[(usize, Vec<usize>)]) -> Self {
        let mut layout = Self { groups: Vec::with_capacity(groups.len()), positions: Vec::new() };
        for (prompt_len, branch_lens) in groups {
            let start = layout.positions.len();
            layout.push_positions(0, *prompt_len);
            let branches = branch_lens
                .iter()
                .map(|&len| {
                    let start = layout.positions.len();
                    layout.push_positions(*prompt_len, len);
                    Branch { start, len }
                })
                .collect();
            layout.groups.push(Group { start, prompt_len: *prompt_len, branches });
        }
        layout
    }

    /// T, the number of rows.
    pub fn rows(&self) -> usize {
        self.positions.len()
    }

    /// Panics unless the groups cover every row exactly once and in order: what lets tasks write to
    /// different texts at the same time.
    pub(crate) fn assert_covers_rows_once(&self) {
        let mut next = 0;
        for group in &self.groups {
            assert_eq!(group.start, next, "layout: a group starts at the wrong row");
            next += group.prompt_len;
            for branch in &group.branches {
                assert_eq!(branch.start, next, "layout: a branch starts at the wrong row");
                next += branch.len;
            }
        }
        assert_eq!(next, self.rows(), "layout: the groups do not end at the last row");
    }

    fn push_positions(&mut self, first: usize, len: usize) {
        self.positions.extend(positions(first, len));
    }
}

/// One response that continues a prompt of another batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// First row of the prompt in the other batch.
    pub prompt_start: usize,
    /// Number of prompt rows; may be 0.
    pub prompt_len: usize,
    /// Rows of its own.
    pub branch: Branch,
}

/// Responses beside a packed micro-batch: they continue its prompts, in T rows of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Beside {
    /// In row order; together they cover every row once.
    pub continuations: Vec<Continuation>,
    /// `[T]`: as [`Layout::positions`].
    pub positions: Vec<u32>,
}

impl Beside {
    /// Adds a response of `len` rows to the prompt of a group of the other batch.
    pub fn push(&mut self, group: &Group, len: usize) {
        let (start, prompt_len) = (self.rows(), group.prompt_len);
        self.positions.extend(positions(prompt_len, len));
        let branch = Branch { start, len };
        self.continuations.push(Continuation { prompt_start: group.start, prompt_len, branch });
    }

    /// T, the number of rows.
    pub fn rows(&self) -> usize {
        self.positions.len()
    }
}

fn positions(first: usize, len: usize) -> impl Iterator<Item = u32> {
    (first..first + len).map(|i| u32::try_from(i).expect("a text of more than 2^32 tokens"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_prompts_and_branches_without_gaps() {
        let layout = Layout::new(&[(3, vec![2, 1]), (0, vec![2]), (2, vec![])]);
        assert_eq!(layout.rows(), 10);
        assert_eq!(layout.positions, [0, 1, 2, 3, 4, 3, 0, 1, 0, 1]);
        assert_eq!(
            layout.groups[0].branches,
            [Branch { start: 3, len: 2 }, Branch { start: 5, len: 1 }]
        );
        assert_eq!(layout.groups[1].start, 6);
        assert_eq!(layout.groups[1].branches, [Branch { start: 6, len: 2 }]);
        assert_eq!(layout.groups[2].rows(), 8..10);
    }

    #[test]
    #[should_panic(expected = "layout: a branch starts at the wrong row")]
    fn overlapping_branches_are_found() {
        let mut layout = Layout::new(&[(3, vec![2, 2])]);
        layout.assert_covers_rows_once();
        layout.groups[0].branches[1].start = 4;
        layout.assert_covers_rows_once();
    }

    #[test]
    fn an_empty_batch_has_no_rows() {
        assert_eq!(Layout::new(&[]).rows(), 0);
        assert_eq!(Layout::new(&[(0, vec![0])]).rows(), 0);
    }
}

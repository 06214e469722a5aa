//! A group: a sample after tokenisation. Its prompt is computed once for all of its responses.

use std::ops::Range;
use std::sync::Arc;
use uft_core::Feedback;

/// Where a row comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    pub file: Arc<str>,
    /// Line in the file, from 1.
    pub line: usize,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// Prompt tokens once, then the branches that continue them.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    pub prompt: Vec<u32>,
    pub branches: Vec<Branch>,
}

/// One continuation of the prompt: a response, or the rest of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Branch {
    pub tokens: Vec<u32>,
    /// What is trained in it, in order, without overlaps.
    pub segments: Vec<Segment>,
}

/// The trained tokens of one response with the feedback that it got.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    pub feedback: Feedback,
    /// Ranges of token indices into [`Branch::tokens`], rising, none empty.
    pub trained: Vec<Range<usize>>,
}

impl Segment {
    /// Number of trained tokens.
    pub fn tokens(&self) -> usize {
        self.trained.iter().map(Range::len).sum()
    }
}

impl Group {
    /// Rows that the group takes in a packed batch.
    pub fn rows(&self) -> usize {
        self.prompt.len() + self.branches.iter().map(|b| b.tokens.len()).sum::<usize>()
    }

    /// Rows that it takes where every branch has a prompt of its own.
    pub fn rows_alone(&self) -> usize {
        self.prompt.len() * self.branches.len()
            + self.branches.iter().map(|b| b.tokens.len()).sum::<usize>()
    }

    /// Every branch as a group of its own.
    pub fn alone(&self) -> impl Iterator<Item = Group> {
        let group =
            |branch: &Branch| Group { prompt: self.prompt.clone(), branches: vec![branch.clone()] };
        self.branches.iter().map(group)
    }

    /// Length of the longest sequence: prompt plus one branch.
    pub fn longest(&self) -> usize {
        self.prompt.len() + self.branches.iter().map(|b| b.tokens.len()).max().unwrap_or(0)
    }

    /// Whether the prompt's last row predicts a trained token: the first of a branch.
    pub fn reads_prompt(&self) -> bool {
        self.segments().any(|segment| segment.trained.iter().any(|range| range.start == 0))
    }

    /// The segments of all branches.
    pub fn segments(&self) -> impl Iterator<Item = &Segment> {
        self.branches.iter().flat_map(|b| &b.segments)
    }
}

//! The token mask of a group, for people to look at.

use super::Text;
use crate::group::{Branch, Group};

/// A token of a group with what training does to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaskedToken {
    pub id: u32,
    /// Its part of the text. A character made of several tokens is with the last of them.
    pub text: String,
    pub state: Mask,
}

/// What training does to a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// Read only: part of the shared prompt.
    Prompt,
    /// Trained, in the segment with this number in [`Group::segments`].
    Trained(usize),
    /// Read only: part of a branch that no segment covers.
    Untrained,
}

impl Text {
    /// The prompt's tokens, then those of each branch.
    pub fn mask(&self, group: &Group) -> Vec<Vec<MaskedToken>> {
        let prompt = group.prompt.iter().map(|id| (*id, Mask::Prompt)).collect();
        let mut sequences = vec![self.masked(prompt)];
        let mut first = 0;
        for branch in &group.branches {
            sequences.push(self.masked(branch_mask(branch, first)));
            first += branch.segments.len();
        }
        sequences
    }

    fn masked(&self, tokens: Vec<(u32, Mask)>) -> Vec<MaskedToken> {
        let ids: Vec<u32> = tokens.iter().map(|(id, _)| *id).collect();
        let texts = self.token_texts(&ids);
        let with_text = tokens.into_iter().zip(texts);
        with_text.map(|((id, state), text)| MaskedToken { id, text, state }).collect()
    }

    /// The text of each token of a sequence. Bytes that are no whole character yet wait for the
    /// token that completes it; what never becomes one is shown as U+FFFD.
    pub fn token_texts(&self, ids: &[u32]) -> Vec<String> {
        let mut waiting = Vec::new();
        let mut texts = Vec::with_capacity(ids.len());
        for (i, id) in ids.iter().enumerate() {
            waiting.extend(self.tokenizer().token_bytes(*id));
            let whole = match std::str::from_utf8(&waiting) {
                Ok(_) => waiting.len(),
                Err(e) if e.error_len().is_none() && i + 1 < ids.len() => e.valid_up_to(),
                Err(_) => waiting.len(),
            };
            texts.push(String::from_utf8_lossy(&waiting[..whole]).into_owned());
            waiting.drain(..whole);
        }
        texts
    }
}

/// The tokens of a branch whose segments are numbered from `first`.
fn branch_mask(branch: &Branch, first: usize) -> Vec<(u32, Mask)> {
    let mut tokens: Vec<_> = branch.tokens.iter().map(|id| (*id, Mask::Untrained)).collect();
    for (i, segment) in branch.segments.iter().enumerate() {
        for token in segment.trained.iter().cloned().flatten() {
            tokens[token].1 = Mask::Trained(first + i);
        }
    }
    tokens
}

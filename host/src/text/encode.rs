//! From a sample to its groups, by TRL's rule: the prompt is encoded alone, then prompt and
//! response as one text, and the response is what follows the prompt's tokens (trl 1.16,
//! `SFTTrainer`, `DPOTrainer`, `KTOTrainer`: `tokenize_fn` and `add_eos`).

use super::tokenizer::Encoded;
use super::{Limits, Reason, Refused, Text};
use crate::config::EndOfTurn;
use crate::group::{Branch, Group, Segment};
use std::ops::Range;
use uft_core::{Content, Response, Sample};

impl Text {
    /// The groups of a sample: one, with a branch for each response, in their order. Further groups
    /// follow only for [`uft_core::Turns::Each`] where the template does not let all turns of a
    /// conversation be trained in one pass: then every turn but the first is a group of its own.
    ///
    /// # Errors
    /// The reason why the sample cannot be trained on, with what to do.
    pub fn encode_sample(&self, sample: &Sample, limits: &Limits) -> Result<Vec<Group>, Refused> {
        if sample.responses.is_empty() {
            return Err(Refused::new(Reason::NoTrainedTokens, "the sample has no response"));
        }
        let mut groups = match &sample.prompt {
            Content::Text(prompt) => vec![self.encode_text(prompt, &sample.responses)?],
            Content::Messages(prompt) => self.encode_chat(prompt, sample)?,
        };
        for group in &mut groups {
            check_trained(group)?;
            if limits.end_of_turn == EndOfTurn::Require {
                self.check_end_of_turn(group)?;
            }
            limits.fit(group, self.beginning(&group.prompt))?;
        }
        Ok(groups)
    }

    /// Text and text: BOS as the tokenizer adds it, EOS behind a response that has none.
    fn encode_text(&self, prompt: &str, responses: &[Response]) -> Result<Group, Refused> {
        let tokenizer = Refused::because(Reason::Tokenizer);
        let alone = self.tokenizer.encode(prompt).map_err(&tokenizer)?;
        let prompt_ids = self.with_prefix(&alone.ids);
        let eos = self.eos_text();
        let mut branches = Vec::new();
        for (i, response) in responses.iter().enumerate() {
            let Content::Text(text) = &response.content else {
                return Err(mixed("messages", "text"));
            };
            let end = eos.as_deref().filter(|eos| !text.ends_with(eos)).unwrap_or_default();
            let both = self.tokenizer.extend(&alone, format!("{prompt}{text}{end}"));
            let full = self.with_prefix(&both.map_err(&tokenizer)?.ids);
            let hint = "a token reaches across the border; end the prompt where a token ends, \
                        usually by moving its last space to the response's beginning";
            let tokens = self
                .after_prompt(&prompt_ids, &full, hint)
                .map_err(|e| e.of_response(i, responses.len()))?;
            let segments =
                vec![Segment { feedback: response.feedback, trained: vec![0..tokens.len()] }];
            branches.push(Branch { tokens, segments });
        }
        Ok(Group { prompt: prompt_ids, branches })
    }

    /// How many tokens a prompt has to begin with however short it is cut: a BOS.
    fn beginning(&self, prompt: &[u32]) -> usize {
        let bos = self.specials.get("bos_token").and_then(|text| self.tokenizer.id(text));
        let prefix = Some(self.tokenizer.prefix()).filter(|ids| prompt.starts_with(ids));
        let bos = bos.filter(|bos| prompt.first() == Some(bos)).map_or(0, |_| 1);
        prefix.map_or(0, <[u32]>::len).max(bos)
    }

    /// The EOS that responses in plain text end with.
    fn eos_text(&self) -> Option<String> {
        let named = self.specials.get("eos_token").map(str::to_owned);
        named.or_else(|| self.eos_ids.first().map(|id| self.token_text(*id)))
    }

    /// What follows the prompt's tokens.
    pub(super) fn after_prompt(
        &self,
        prompt: &[u32],
        full: &[u32],
        hint: &str,
    ) -> Result<Vec<u32>, Refused> {
        if let Some(rest) = full.strip_prefix(prompt) {
            return Ok(rest.to_vec());
        }
        let same = prompt.iter().zip(full).take_while(|(a, b)| a == b).count();
        let show = |ids: &[u32]| match ids.get(same) {
            Some(id) => format!("{:?} ({id})", self.token_text(*id)),
            None => "nothing".to_owned(),
        };
        Err(Refused::new(
            Reason::PromptMismatch,
            format!(
                "the prompt's token {same} is {} alone but {} with the response behind it: {hint}",
                show(prompt),
                show(full)
            ),
        ))
    }

    /// Every trained range has to end with a token that ends a turn; white space may follow it.
    fn check_end_of_turn(&self, group: &Group) -> Result<(), Refused> {
        let ends_turn = |id: &u32| self.eos_ids.contains(id) || self.tokenizer.is_special(*id);
        let blank = |id: &u32| self.token_text(*id).trim().is_empty();
        for (i, branch) in group.branches.iter().enumerate() {
            for range in branch.segments.iter().flat_map(|s| &s.trained) {
                let trained = &branch.tokens[range.clone()];
                match trained.iter().rev().find(|id| !blank(id) || ends_turn(id)) {
                    Some(id) if ends_turn(id) => {}
                    last => {
                        let last = last.map_or("white space".into(), |id| {
                            format!("{:?} ({id})", self.token_text(*id))
                        });
                        let refused = Refused::new(
                            Reason::EndOfTurn,
                            format!(
                                "the last trained token is {last}, which does not end a turn, so the \
                                 model would not learn to stop; the chat template has to write an EOS \
                                 or special token behind what the assistant says (inside of its \
                                 generation block, if it has one); [text] end_of_turn = \"ignore\" \
                                 trains it as it is"
                            ),
                        );
                        return Err(refused.of_response(i, group.branches.len()));
                    }
                }
            }
        }
        Ok(())
    }
}

impl Refused {
    /// Says which response it is about, if there are several.
    pub(super) fn of_response(mut self, index: usize, count: usize) -> Self {
        if count > 1 {
            self.detail = format!("response {}: {}", index + 1, self.detail);
        }
        self
    }
}

pub(super) fn mixed(response: &str, prompt: &str) -> Refused {
    Refused::new(
        Reason::MixedContent,
        format!("the response is {response} but the prompt is {prompt}; both have to be the same"),
    )
}

/// A trained token needs a token before it; a response needs a trained token.
fn check_trained(group: &mut Group) -> Result<(), Refused> {
    let (without_prompt, count) = (group.prompt.is_empty(), group.branches.len());
    for (i, branch) in group.branches.iter_mut().enumerate() {
        for segment in &mut branch.segments {
            if let Some(first) = segment.trained.first_mut().filter(|_| without_prompt) {
                first.start = first.start.max(1);
            }
            segment.trained.retain(|range| !range.is_empty());
            if segment.trained.is_empty() {
                let what = "nothing of the response is trained: it is empty, or the generation \
                            blocks of the chat template leave it out";
                return Err(Refused::new(Reason::NoTrainedTokens, what).of_response(i, count));
            }
        }
    }
    Ok(())
}

/// The tokens that cover some byte of a range, as transformers' `char_to_token` finds them.
pub(super) fn covering(encoded: &Encoded, bytes: &Range<usize>) -> Range<usize> {
    let start = encoded.spans.partition_point(|span| span.end <= bytes.start);
    let end = encoded.spans.partition_point(|span| span.start < bytes.end);
    start..end.max(start)
}

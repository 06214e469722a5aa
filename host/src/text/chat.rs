//! Conversations to groups.

use super::encode::mixed;
use super::tokenizer::Encoded;
use super::turns::Conversation;
use super::{Reason, Refused, Text, values};
use crate::group::{Branch, Group, Segment};
use std::ops::Range;
use uft_core::{Content, Kind, Message, Response, Sample, Turns};

const HINT: &str = "the chat template writes the prompt differently when it stands alone; name a \
                    template that does not in [text] template, or change what the row's prompt ends with";

impl Text {
    /// Messages and messages: the chat template writes everything, special tokens included.
    pub(super) fn encode_chat(
        &self,
        prompt: &[Message],
        sample: &Sample,
    ) -> Result<Vec<Group>, Refused> {
        let refused = Refused::because(Reason::Template);
        let variables = self.variables(&sample.template_args).map_err(&refused)?;
        let template = self.templates.choose(&variables).map_err(&refused)?;
        let prompt_values = prompt.iter().map(values::message).collect::<crate::Result<Vec<_>>>();
        let prompt_values = prompt_values.map_err(&refused)?;
        let count = sample.responses.len();

        let mut conversations = Vec::with_capacity(count);
        for (i, response) in sample.responses.iter().enumerate() {
            let Content::Messages(messages) = &response.content else {
                return Err(mixed("text", "messages"));
            };
            let conversation =
                Conversation::new(self, template, &variables, &prompt_values, messages)
                    .map_err(|e| e.of_response(i, count))?;
            conversations.push(conversation);
        }
        // The prompt ends with the header of the assistant's turn. If a response does not begin with
        // one, where the prompt ends makes no difference to anything that is trained, so all is in
        // the branches.
        let open = conversations.iter().all(Conversation::answers);
        let prompt = match conversations.first() {
            Some(_) if open && prompt_values.is_empty() => {
                let what = "the conversation begins with the assistant, so there is no prompt";
                return Err(Refused::new(Reason::Turns, what));
            }
            Some(first) if open => {
                let text = first.render(prompt_values.len(), true)?.text;
                self.tokenizer.encode(text).map_err(Refused::because(Reason::Tokenizer))?
            }
            _ => Encoded::default(),
        };

        let mut groups = vec![Group { prompt: prompt.ids.clone(), branches: Vec::new() }];
        for (i, (conversation, response)) in conversations.iter().zip(&sample.responses).enumerate()
        {
            let taken = self.add_response(&mut groups, &prompt, open, conversation, response);
            taken.map_err(|e| e.of_response(i, count))?;
        }
        groups.retain(|group| !group.branches.is_empty());
        Ok(groups)
    }

    /// Adds a response to the first group, or its turns as groups of their own.
    fn add_response(
        &self,
        groups: &mut Vec<Group>,
        prompt: &Encoded,
        open: bool,
        conversation: &Conversation,
        response: &Response,
    ) -> Result<(), Refused> {
        let rendered = conversation.render(conversation.len(), false)?;
        let full = self.tokenizer.extend(prompt, rendered.text);
        let full = full.map_err(Refused::because(Reason::Tokenizer))?;
        let border = prompt.ids.len();
        let header = open.then_some(prompt);
        let spans = if open && conversation.is_single_turn() {
            Some(vec![border..full.ids.len()])
        } else if response.turns == Turns::Together {
            Some(conversation.spans(&full, &rendered.generation, header)?)
        } else {
            conversation.stable_spans(&full, header)?
        };
        let Some(spans) = spans else {
            if matches!(response.feedback.kind(), Kind::Chosen | Kind::Rejected) {
                return Err(Refused::new(Reason::Turns, UNFOLDED_PAIR));
            }
            return self.unfold(groups, prompt, open, conversation, response);
        };
        let tokens = self.after_prompt(&prompt.ids, &full.ids, HINT)?;
        let spans = spans.iter().map(|s| s.start.max(border) - border..s.end.max(border) - border);
        let segment = |trained: Vec<Range<usize>>| Segment { feedback: response.feedback, trained };
        let segments = match response.turns {
            Turns::Together => vec![segment(spans.filter(|s| !s.is_empty()).collect())],
            Turns::Each => spans.map(|span| segment(vec![span])).collect(),
        };
        groups[0].branches.push(Branch { tokens, segments });
        Ok(())
    }

    /// Every turn as the only response to the conversation before it.
    fn unfold(
        &self,
        groups: &mut Vec<Group>,
        prompt: &Encoded,
        open: bool,
        conversation: &Conversation,
        response: &Response,
    ) -> Result<(), Refused> {
        let tokenizer = Refused::because(Reason::Tokenizer);
        for turn in conversation.turns() {
            let first = open && turn == conversation.prompt_len();
            let before = if first {
                prompt.clone()
            } else {
                let text = conversation.render(turn, true)?.text;
                self.tokenizer.encode(text).map_err(&tokenizer)?
            };
            let full = conversation.render(turn + 1, false)?.text;
            let full = self.tokenizer.extend(&before, full).map_err(&tokenizer)?;
            let tokens = self.after_prompt(&before.ids, &full.ids, HINT)?;
            let trained = vec![0..tokens.len()];
            let segments = vec![Segment { feedback: response.feedback, trained }];
            let branch = Branch { tokens, segments };
            if first {
                groups[0].branches.push(branch);
            } else {
                groups.push(Group { prompt: before.ids, branches: vec![branch] });
            }
        }
        Ok(())
    }
}

const UNFOLDED_PAIR: &str = "the chat template changes earlier turns when later ones follow, so the \
     turns of a chosen or rejected response cannot be trained one by one and stay a pair; set turns = \
     \"together\" in the adapter, or name a template in [text] template that keeps earlier turns";

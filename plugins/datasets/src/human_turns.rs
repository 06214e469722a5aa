//! Conversations as one text, each turn behind `\n\nHuman:` or `\n\nAssistant:` (HH-RLHF, Nectar).

use uft_core::prelude::*;

const TURNS: [(&str, &str); 2] = [("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant")];

/// The turns as messages, their texts without white space around them.
///
/// # Errors
/// If the text does not begin with a turn.
pub fn parse(name: &str, text: &str) -> Result<Vec<Message>, Fault> {
    let mut messages = Vec::new();
    // Some conversations begin without the empty line.
    let padded = format!("\n\n{}", text.trim_start_matches('\n'));
    let mut rest = padded.as_str();
    while !rest.is_empty() {
        let Some((marker, role)) = TURNS.iter().find(|(marker, _)| rest.starts_with(marker)) else {
            return Err(Fault::record(format!(
                "`{name}` does not begin with a turn behind `Human:` or `Assistant:`"
            )));
        };
        let body = &rest[marker.len()..];
        let end = TURNS.iter().filter_map(|(marker, _)| body.find(marker)).min();
        let (turn, next) = body.split_at(end.unwrap_or(body.len()));
        messages.push(Message::new(*role, turn.trim()));
        rest = next;
    }
    Ok(messages)
}

#[cfg(test)]
mod tests {
    use super::super::tests::messages;
    use super::*;

    #[test]
    fn turns_become_messages() {
        let text =
            "\n\nHuman: Hi.\n\nHow are you?\n\nAssistant: Well.\n\nHuman:And now?\n\nAssistant:";
        let turns = [
            ("user", "Hi.\n\nHow are you?"),
            ("assistant", "Well."),
            ("user", "And now?"),
            ("assistant", ""),
        ];
        assert_eq!(Content::messages(parse("chosen", text).unwrap()), messages(&turns));
        assert_eq!(parse("chosen", text.trim_start()).unwrap().len(), 4);
        let fault = parse("chosen", "Well, Human: no").unwrap_err();
        let says = "`chosen` does not begin with a turn behind `Human:` or `Assistant:`";
        assert_eq!(fault.message.as_str(), says);
    }
}

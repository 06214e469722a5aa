//! The token mask of a row in colour: what is prompt, what is trained, what is neither.

use crate::group::Group;
use crate::text::{Mask, Text};
use anstyle::{AnsiColor, Style};
use std::fmt::Write;

/// The prompt, then every branch: prompt tokens dim, trained ones green (a second response's cyan, and so on),
/// others yellow. Without colour, trained stretches stand in brackets.
pub fn render(text: &Text, group: &Group) -> String {
    let mut out = String::new();
    for (index, tokens) in text.mask(group).iter().enumerate() {
        let _ = match index {
            0 => writeln!(out, "prompt:"),
            _ => writeln!(out, "branch {index}:"),
        };
        for run in tokens.chunk_by(|a, b| a.state == b.state) {
            let (style, marks) = look(run[0].state);
            let words: String = run.iter().map(|t| t.text.as_str()).collect();
            let words = words.replace('\n', "⏎\n");
            let _ = write!(out, "{style}{}{words}{}{style:#}", marks.0, marks.1);
        }
        out.push('\n');
    }
    out
}

fn look(state: Mask) -> (Style, (&'static str, &'static str)) {
    let colour = |c: AnsiColor| Style::new().fg_color(Some(c.into()));
    match state {
        Mask::Prompt => (Style::new().dimmed(), ("", "")),
        Mask::Untrained => (colour(AnsiColor::Yellow), ("", "")),
        Mask::Trained(segment) => {
            let colours = [AnsiColor::Green, AnsiColor::Cyan, AnsiColor::Magenta];
            (colour(colours[segment % colours.len()]).bold(), ("[", "]"))
        }
    }
}

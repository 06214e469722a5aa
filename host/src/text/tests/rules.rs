//! The rules one by one, on small tokenizers made here.

use super::*;
use crate::group::{Branch, Group, Segment};
use uft_core::{Content, Feedback, Sample, Turns};

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\
     {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
/// Leaves out what earlier assistant turns thought.
const FORGETFUL: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n\
     {{ m.content if loop.last else m.content.split('|')[-1] }}<|im_end|>\n\n{% endfor %}\
     {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
pub const SPECIAL: [&str; 5] = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"];

/// A tokenizer of bytes and special tokens whose ids start at 256.
pub fn chat(template: &str) -> Text {
    text(&tokenizer(&[], &SPECIAL), json!({"eos_token": "<|im_end|>"}), Some(template))
}

/// Byte tokens, `<s>` in front of texts, `</s>` as EOS.
fn plain() -> Text {
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "special": true}});
    text(&around(tokenizer(&[], &SPECIAL), &["<s>"], &[]), config, None)
}

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

const BOS: u32 = 256;
const EOS: u32 = 257;

pub fn text_sample(prompt: &str, response: &str) -> Sample {
    Sample::new(Content::text(prompt)).response(Content::text(response), Feedback::Demonstration)
}

fn chat_sample(prompt: &[(&str, &str)], response: &[(&str, &str)]) -> Sample {
    let content = |turns: &[(&str, &str)]| {
        Content::messages(turns.iter().map(|(role, text)| Message::new(*role, *text)))
    };
    Sample::new(content(prompt)).response(content(response), Feedback::Demonstration)
}

pub fn only(groups: Vec<Group>) -> Group {
    let [group] = groups.try_into().unwrap();
    group
}

fn refused(text: &Text, sample: &Sample) -> (Reason, String) {
    let refused = text.encode_sample(sample, &LIMITS).unwrap_err();
    (refused.reason, refused.detail)
}

/// Trained stretches as text.
fn trained(text: &Text, branch: &Branch) -> Vec<Vec<String>> {
    let show = |r: &std::ops::Range<usize>| text.decode(&branch.tokens[r.clone()], false).unwrap();
    branch.segments.iter().map(|s| s.trained.iter().map(show).collect()).collect()
}

#[test]
fn text_gets_one_bos_and_one_eos() {
    let text = plain();
    let first = |prompt, response| {
        only(text.encode_sample(&text_sample(prompt, response), &LIMITS).unwrap())
    };
    let expected = Group {
        prompt: [vec![BOS], bytes("q")].concat(),
        branches: vec![Branch {
            tokens: vec![u32::from(b'a'), EOS],
            segments: vec![Segment { feedback: Feedback::Demonstration, trained: vec![0..2] }],
        }],
    };
    assert_eq!(first("q", "a"), expected);
    assert_eq!(first("<s>q", "a"), expected);
    assert_eq!(first("q", "a</s>"), expected);
    let empty = first("", "ab");
    assert_eq!((empty.prompt, empty.branches[0].segments[0].trained[0].clone()), (vec![BOS], 0..3));
    assert_eq!(first("", "<s>ab").branches[0].tokens, [bytes("ab"), vec![EOS]].concat());
}

#[test]
fn an_eos_that_the_tokenizer_adds_is_not_added_twice_nor_to_prompts() {
    let config = json!({"bos_token": "<s>", "eos_token": "</s>"});
    let json = around(tokenizer(&[], &SPECIAL), &["<s>"], &["</s>"]);
    let both = text(&json, config.clone(), None);
    let group = only(both.encode_sample(&text_sample("q", "a"), &LIMITS).unwrap());
    assert_eq!(group.prompt, [BOS, u32::from(b'q')]);
    assert_eq!(group.branches[0].tokens, [u32::from(b'a'), EOS]);
    assert_eq!(both.encode("a", true).unwrap(), [BOS, u32::from(b'a'), EOS]);
    assert_eq!(both.encode("<s>a</s>", true).unwrap(), [BOS, u32::from(b'a'), EOS]);
    assert_eq!(both.encode_prompt("a").unwrap(), [BOS, u32::from(b'a')]);
    assert_eq!(both.encode("a", false).unwrap(), bytes("a"));

    // tokenizer_config.json has the last word, as in transformers.
    let mut config = config;
    config["add_bos_token"] = json!(false);
    config["add_eos_token"] = json!(false);
    assert_eq!(text(&json, config, None).encode("a", true).unwrap(), bytes("a"));
}

#[test]
fn without_prompt_the_first_token_is_not_trained() {
    let text = text(&tokenizer(&[], &SPECIAL), json!({"eos_token": "</s>"}), None);
    let group = only(text.encode_sample(&text_sample("", "ab"), &LIMITS).unwrap());
    assert!(group.prompt.is_empty());
    assert_eq!(group.branches[0].segments[0].trained, [1..3]);
    let (reason, _) = refused(&text, &text_sample("", "</s>"));
    assert_eq!(reason, Reason::NoTrainedTokens);
}

#[test]
fn a_token_across_the_border_is_refused_with_what_to_do() {
    let config = json!({"eos_token": "</s>"});
    let text = text(&tokenizer(&["Ġyes"], &SPECIAL), config, None);
    let (reason, detail) = refused(&text, &text_sample("Good? ", "yes"));
    assert_eq!(reason, Reason::PromptMismatch);
    assert!(detail.contains("the prompt's token 5 is \" \" (32) alone but \" yes\""), "{detail}");
    assert!(detail.contains("moving its last space"), "{detail}");
    assert!(text.encode_sample(&text_sample("Good?", " yes"), &LIMITS).is_ok());
    let both = text_sample("Good?", " yes").response(Content::text("s"), Feedback::Binary(true));
    assert!(text.encode_sample(&both, &LIMITS).is_ok());
    let second = text_sample("Good? ", "no").response(Content::text("yes"), Feedback::Binary(true));
    assert!(refused(&text, &second).1.starts_with("response 2: "));
}

#[test]
fn all_assistant_turns_are_trained_in_one_pass() {
    let text = chat(CHATML);
    let sample = chat_sample(
        &[("user", "q")],
        &[("assistant", "a"), ("user", "r"), ("assistant", "b"), ("user", "s")],
    );
    let group = only(text.encode_sample(&sample, &LIMITS).unwrap());
    let prompt = text.render(&[Message::new("user", "q")], "", true).unwrap();
    assert_eq!(group.prompt, text.encode(&prompt, false).unwrap());
    let [branch] = &group.branches[..] else { panic!() };
    assert_eq!(trained(&text, branch), [["a<|im_end|>\n", "b<|im_end|>\n"]]);
    let whole = text.decode(&branch.tokens, false).unwrap();
    assert_eq!(
        whole,
        "a<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    );

    let each = only(text.encode_sample(&sample.clone().turns(Turns::Each), &LIMITS).unwrap());
    assert_eq!(each.branches[0].tokens, branch.tokens);
    assert_eq!(trained(&text, &each.branches[0]), [["a<|im_end|>\n"], ["b<|im_end|>\n"]]);
}

#[test]
fn turns_that_are_rewritten_later_become_groups_of_their_own() {
    let text = chat(FORGETFUL);
    let turns = [("assistant", "hm|a"), ("user", "r"), ("assistant", "well|b")];
    let sample = chat_sample(&[("user", "q")], &turns).turns(Turns::Each);
    let groups = text.encode_sample(&sample, &LIMITS).unwrap();
    assert_eq!(groups.len(), 2);
    let shown: Vec<_> = groups
        .iter()
        .map(|g| (text.decode(&g.prompt, false).unwrap(), trained(&text, &g.branches[0])))
        .collect();
    assert_eq!(shown[0].0, "<|im_start|>user\nq<|im_end|>\n\n<|im_start|>assistant\n");
    assert_eq!(shown[0].1, [["hm|a<|im_end|>\n\n"]]);
    assert!(shown[1].0.contains("assistant\na<|im_end|>\n\n<|im_start|>user\nr"), "{}", shown[1].0);
    assert_eq!(shown[1].1, [["well|b<|im_end|>\n\n"]]);

    // Together: what the whole conversation shows of each.
    let group = only(text.encode_sample(&chat_sample(&[("user", "q")], &turns), &LIMITS).unwrap());
    assert_eq!(trained(&text, &group.branches[0]), [["a<|im_end|>\n\n", "well|b<|im_end|>\n\n"]]);

    let mut pair = sample;
    pair.responses[0].feedback = Feedback::Chosen(None.into());
    assert_eq!(refused(&text, &pair).0, Reason::Turns);
}

#[test]
fn turns_that_cannot_be_found_are_refused() {
    // The assistant's words are not to be seen in what the template writes.
    let text = chat(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n\
         {{ '' if m.role == 'user' else loop.revindex }}<|im_end|>{% endfor %}\
         {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    );
    let turns = [("assistant", "a"), ("user", "r"), ("assistant", "b")];
    let (reason, detail) = refused(&text, &chat_sample(&[("user", "q")], &turns));
    assert_eq!(reason, Reason::Turns);
    assert!(detail.contains("turns = \"each\""), "{detail}");
}

#[test]
fn a_template_that_writes_prompts_differently_alone_is_refused() {
    let text = chat(&CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"));
    let (reason, detail) = refused(&text, &chat_sample(&[("user", "q")], &[("assistant", "a")]));
    assert_eq!(reason, Reason::PromptMismatch);
    assert!(detail.contains("is \"<\" (60) alone but \"a\" (97) with the response"), "{detail}");
}

#[test]
fn generation_blocks_say_what_is_trained_of_several_turns() {
    let text = chat(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}\
         {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n\
         {% else %}{{ m.content }}<|im_end|>\n{% endif %}\n{% endfor %}\
         {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    );
    let prompt = [("user", "q"), ("assistant", "earlier"), ("user", "r")];
    let turns = [("assistant", "a"), ("user", "s"), ("assistant", "b")];
    let group = only(text.encode_sample(&chat_sample(&prompt, &turns), &LIMITS).unwrap());
    assert_eq!(trained(&text, &group.branches[0]), [["a<|im_end|>", "b<|im_end|>"]]);
}

#[test]
fn a_response_may_begin_with_another_role() {
    let text = chat(CHATML);
    let sample = chat_sample(&[("system", "s")], &[("user", "q"), ("assistant", "a")]);
    let group = only(text.encode_sample(&sample, &LIMITS).unwrap());
    assert!(group.prompt.is_empty());
    assert_eq!(trained(&text, &group.branches[0]), [["a<|im_end|>\n"]]);
}

#[test]
fn the_end_of_turn_has_to_be_trained() {
    let endless = CHATML.replace("<|im_end|>", "");
    let text = chat(&endless);
    let sample = chat_sample(&[("user", "q")], &[("assistant", "a")]);
    let (reason, detail) = refused(&text, &sample);
    assert_eq!(reason, Reason::EndOfTurn);
    assert!(detail.contains("the last trained token is \"a\" (97)"), "{detail}");
    let limits = Limits { end_of_turn: EndOfTurn::Ignore, ..LIMITS };
    assert!(text.encode_sample(&sample, &limits).is_ok());
    // Any special token ends a turn, and white space may follow it.
    let other = chat(&CHATML.replace("<|im_end|>\n", "<pad> \n"));
    assert!(other.encode_sample(&sample, &LIMITS).is_ok());
}

#[test]
fn what_trains_nothing_is_refused() {
    let text = chat(CHATML);
    let no_assistant = chat_sample(&[("user", "q")], &[("user", "r")]);
    assert_eq!(refused(&text, &no_assistant).0, Reason::NoTrainedTokens);
    let no_response = Sample::new(Content::text("q"));
    assert_eq!(refused(&text, &no_response).0, Reason::NoTrainedTokens);
    let no_prompt = chat_sample(&[], &[("assistant", "a")]);
    assert_eq!(refused(&text, &no_prompt).0, Reason::Turns);
    let mixed = Sample::new(Content::text("q"))
        .response(Content::messages([Message::new("assistant", "a")]), Feedback::Demonstration);
    assert_eq!(refused(&text, &mixed).0, Reason::MixedContent);
    let (reason, detail) = refused(&plain(), &chat_sample(&[("user", "q")], &[("assistant", "a")]));
    assert_eq!(reason, Reason::Template);
    assert!(detail.contains("[text] template"), "{detail}");
}

#[test]
fn long_rows_are_refused_or_lose_their_prompts_beginning() {
    let text = plain();
    let sample =
        text_sample("0123456789", "abc").response(Content::text("a"), Feedback::Binary(false));
    let fit = |max_length, long_rows| {
        text.encode_sample(&sample, &Limits { max_length, long_rows, ..LIMITS })
    };
    // <s>, 10 of the prompt, abc, </s>
    assert_eq!(only(fit(15, LongRows::Skip).unwrap()).prompt.len(), 11);
    for policy in [LongRows::Skip, LongRows::Error] {
        let refused = fit(14, policy).unwrap_err();
        assert_eq!(refused.reason, Reason::TooLong);
        assert_eq!(refused.detail, "15 tokens, 1 more than max_length = 14");
    }
    let group = only(fit(8, LongRows::CutPrompt).unwrap());
    assert_eq!(group.prompt, [vec![BOS], bytes("789")].concat());
    assert_eq!(group.longest(), 8);
    assert_eq!(group.branches[1].tokens, [u32::from(b'a'), EOS]);
    assert_eq!(only(fit(5, LongRows::CutPrompt).unwrap()).prompt, [BOS]);
    let refused = fit(4, LongRows::CutPrompt).unwrap_err();
    assert!(refused.detail.contains("a response of 4 tokens leaves no room"), "{}", refused.detail);
}

/// Taking over tokens gives what encoding everything gives.
#[test]
fn extending_an_encoding_changes_nothing() {
    let text = text(&tokenizer(&["Ġa", "ab", "ĠĠ"], &SPECIAL), json!({}), None);
    let tokenizer = text.tokenizer();
    let pieces = ["<|im_start|>", "a", " a", "  ", "ab", "é🙂", "<|im_end|>", "\n", "<|im_"];
    let mut seed = 1u64;
    for _ in 0..200 {
        let mut random = |n: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize % n
        };
        let some = |n: usize, random: &mut dyn FnMut(usize) -> usize| {
            (0..n).map(|_| pieces[random(pieces.len())]).collect::<String>()
        };
        let count = random(8);
        let prompt = some(count, &mut random);
        let whole = format!("{prompt}{}", some(4, &mut random));
        let known = tokenizer.encode(prompt.as_str()).unwrap();
        let full = tokenizer.encode(whole.as_str()).unwrap();
        assert_eq!(tokenizer.extend(&known, whole.clone()).unwrap(), full);
        assert_eq!(full.ids, tokenizer.ids(&whole).unwrap());
        let prefix = full.ids.starts_with(&known.ids).then_some(known.ids.len());
        assert_eq!(tokenizer.prefix_tokens(&full, prompt.len()).unwrap(), prefix, "{whole:?}");
        for (span, id) in full.spans.iter().zip(&full.ids) {
            let bytes = tokenizer.token_bytes(*id);
            assert!(bytes.len() > 1 || span.len() <= 4, "{span:?} of {whole:?}");
        }
    }
}

#[test]
fn the_mask_shows_every_token_once() {
    let text = chat(CHATML);
    let turns = [("assistant", "é"), ("user", "r"), ("assistant", "b")];
    let mut sample = chat_sample(&[("user", "q")], &turns).turns(Turns::Each);
    sample.responses.push(sample.responses[0].clone());
    let group = only(text.encode_sample(&sample, &LIMITS).unwrap());
    let mask = text.mask(&group);
    assert_eq!(mask.len(), 3);
    assert!(mask[0].iter().all(|t| t.state == Mask::Prompt));
    let shown = |state| -> String {
        mask[2].iter().filter(|t| t.state == state).map(|t| t.text.as_str()).collect()
    };
    assert_eq!(shown(Mask::Trained(2)), "é<|im_end|>\n");
    assert_eq!(shown(Mask::Trained(3)), "b<|im_end|>\n");
    assert_eq!(shown(Mask::Untrained), "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n");
    // The first byte of é waits for the second.
    assert_eq!((mask[1][0].text.as_str(), mask[1][1].text.as_str()), ("", "é"));
    assert_eq!(text.token_texts(&[0xC3]), ["\u{FFFD}"]);
}

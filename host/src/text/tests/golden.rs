//! Every token of the committed golden files: templates, prompts and responses as transformers and
//! TRL encode them.

use super::*;
use crate::group::{Group, Segment};
use uft_core::{Content, Feedback, Response, Sample, Turns};

const MODELS: [&str; 5] = ["llama", "llama-bias", "mistral", "qwen2", "qwen3"];

fn load(model: &str) -> Text {
    Text::load(&folder("golden/models").join(model)).unwrap()
}

fn expected(model: &str, file: &str) -> Json {
    read_json(folder("golden/expected").join(model).join(file))
}

#[test]
fn templates_render_as_in_transformers() {
    let mut refused = 0;
    for model in MODELS {
        let text = load(model);
        for case in expected(model, "templates.json")["renders"].as_array().unwrap() {
            let name = format!("{model}, {}", case["name"]);
            let mut args = serde_json::Map::new();
            for key in ["tools", "enable_thinking"] {
                if let Some(value) = case.get(key) {
                    args.insert(key.to_owned(), value.clone());
                }
            }
            let header = case["add_generation_prompt"].as_bool().unwrap();
            let args = serde_json::to_string(&args).unwrap();
            match text.render(&messages(&case["messages"]), &args, header) {
                Err(error) => {
                    let reason =
                        case["error"].as_str().unwrap_or_else(|| panic!("{name}: {error}"));
                    assert!(error.message.ends_with(reason), "{name}: {error}");
                    refused += 1;
                }
                Ok(rendered) => {
                    assert_eq!(case["text"], json!(rendered), "{name}");
                    assert_eq!(ids(&case["ids"]), text.encode(&rendered, false).unwrap(), "{name}");
                }
            }
        }
    }
    assert!(refused > 0, "a template that refuses messages is among the golden ones");
}

/// A row as a sample, as the bundled adapters make it.
fn sample(row: &Json, turns: Turns) -> Sample {
    let content = |json: &Json| match json {
        Json::String(text) => Content::text(text.as_str()),
        json => Content::messages(messages(json)),
    };
    if let Some(all) = row["messages"].as_array() {
        let first = all.iter().position(|m| m["role"] == "assistant").unwrap();
        let response = content(&all[first..].to_vec().into());
        let sample = Sample::new(content(&all[..first].to_vec().into()));
        return sample.response(response, Feedback::Demonstration).turns(turns);
    }
    let mut sample = Sample::new(content(&row["prompt"]));
    for key in ["completion", "response", "chosen", "rejected"] {
        if let Some(response) = row.get(key) {
            sample = sample.response(content(response), Feedback::Binary(true));
        }
    }
    sample
}

/// What is read before each segment, and what is trained of it.
fn pairs(groups: &[Group]) -> Vec<(Vec<u32>, Vec<u32>)> {
    let mut pairs = Vec::new();
    for group in groups {
        for branch in &group.branches {
            for Segment { trained, .. } in &branch.segments {
                assert_eq!(trained.len(), 1);
                let before = [&group.prompt, &branch.tokens[..trained[0].start]].concat();
                pairs.push((before, branch.tokens[trained[0].clone()].to_vec()));
            }
        }
    }
    pairs
}

#[test]
fn responses_are_those_of_trl() {
    for model in MODELS {
        let text = load(model);
        let expected = expected(model, "responses.json");
        for file in ["demos", "scores", "labels", "pairs", "turns"] {
            let rows = read_lines(folder(&format!("golden/data/{file}.jsonl")));
            for (i, (row, responses)) in
                rows.iter().zip(expected[file].as_array().unwrap()).enumerate()
            {
                let groups = text
                    .encode_sample(&sample(row, Turns::Each), &LIMITS)
                    .unwrap_or_else(|e| panic!("{model}, {file}, row {i}: {e}"));
                let responses: Vec<_> = responses.as_array().unwrap().iter().collect();
                let golden: Vec<_> =
                    responses.iter().map(|r| (ids(&r["prompt_ids"]), ids(&r["ids"]))).collect();
                assert_eq!(pairs(&groups), golden, "{model}, {file}, row {i}");
            }
        }
    }
}

/// All turns are trained in one pass where earlier turns stay as they are, and in one group each
/// where the template rewrites them.
#[test]
fn conversations_are_one_group_if_the_template_lets_them() {
    for model in MODELS {
        let text = load(model);
        let rows = read_lines(folder("golden/data/turns.jsonl"));
        let golden = expected(model, "templates.json");
        for (row, expected) in rows.iter().zip(golden["conversations"].as_array().unwrap()) {
            let turns = row["messages"].as_array().unwrap().iter();
            let turns = turns.filter(|m| m["role"] == "assistant").count();
            let groups = text.encode_sample(&sample(row, Turns::Each), &LIMITS).unwrap();
            let stable = expected["turns_agree"].as_bool().unwrap();
            assert_eq!(groups.len(), if stable { 1 } else { turns }, "{model}");

            let together = text.encode_sample(&sample(row, Turns::Together), &LIMITS).unwrap();
            let [group] = &together[..] else { panic!("{} groups", together.len()) };
            let branch = &group.branches[0];
            assert_eq!([&group.prompt[..], &branch.tokens].concat(), ids(&expected["ids"]));
            let trained = &branch.segments[0].trained;
            assert_eq!((branch.segments.len(), trained.len()), (1, turns));
            if stable {
                let each = groups[0].branches[0].segments.iter().flat_map(|s| s.trained.clone());
                assert_eq!(*trained, each.collect::<Vec<_>>(), "{model}");
            }
            if let Some(mask) = expected.get("assistant_mask") {
                let first = group.prompt.len();
                let marked = trained.iter().flat_map(|r| r.clone().map(|i| i + first));
                let golden = ids(mask).into_iter().enumerate().filter(|(_, m)| *m == 1);
                assert!(marked.eq(golden.map(|(i, _)| i)), "{model}");
            }
        }
    }
}

/// Qwen3 drops earlier thoughts; what is trained together is then what the whole conversation shows
/// of each turn, to its end.
#[test]
fn turns_are_found_in_a_conversation_that_was_rewritten() {
    let text = load("qwen3");
    let said = [
        ("user", "a?"),
        ("assistant", "<think>\nhm\n</think>\n\nA."),
        ("user", "b?"),
        ("assistant", "B."),
        ("user", "c?"),
        ("assistant", "<think>\nwell\n</think>\n\nC."),
    ];
    let said = said.map(|(role, content)| Message::new(role, content));
    let sample = Sample::new(Content::messages(said[..1].to_vec()))
        .response(Content::messages(said[1..].to_vec()), Feedback::Demonstration);
    let groups = text.encode_sample(&sample, &LIMITS).unwrap();
    let branch = &groups[0].branches[0];
    let turns = branch.segments[0].trained.iter();
    let turns: Vec<_> =
        turns.map(|r| text.decode(&branch.tokens[r.clone()], false).unwrap()).collect();
    assert_eq!(
        turns,
        ["A.<|im_end|>\n", "B.<|im_end|>\n", "<think>\nwell\n</think>\n\nC.<|im_end|>\n"]
    );
}

#[test]
fn token_texts_join_to_the_text() {
    let said = "Say it in “Español” & <b>louder</b> 🙂\n日本\u{7}";
    for model in MODELS {
        let text = load(model);
        let ids = text.encode(said, false).unwrap();
        let texts = text.token_texts(&ids).concat();
        let expected = if model == "mistral" { format!(" {said}") } else { said.to_owned() };
        assert_eq!(texts, expected, "{model}");
        assert!(ids.iter().all(|id| (*id as usize) < text.vocab_size()));
    }
}

#[test]
fn special_tokens_come_from_every_file() {
    let llama = load("llama");
    let names: Vec<_> = llama.eos_ids().iter().map(|id| llama.token_text(*id)).collect();
    assert_eq!(names, ["<|eot_id|>", "<|end_of_text|>"]);
    assert_eq!(llama.specials().get("bos_token"), Some("<|begin_of_text|>"));
    assert_eq!(load("qwen2").specials().get("bos_token"), None);
    assert_eq!(llama.vocab_size(), 512);
}

/// The responses of a group with feedback in their order, and no prompt twice.
#[test]
fn responses_share_their_prompt() {
    let text = load("llama");
    let row = &read_lines(folder("golden/data/pairs.jsonl"))[0];
    let mut sample = sample(row, Turns::Together);
    let other: Response = sample.responses[1].clone();
    sample.responses.push(Response { feedback: Feedback::Score(0.5), ..other });
    let groups = text.encode_sample(&sample, &LIMITS).unwrap();
    assert_eq!((groups.len(), groups[0].branches.len()), (1, 3));
    assert_eq!(groups[0].branches[1].tokens, groups[0].branches[2].tokens);
    assert_eq!(groups[0].branches[2].segments[0].feedback, Feedback::Score(0.5));
}

//! The text files of a model directory, `tokenizer.json` above all, and texts through what they say.

use super::directory::Directory;
use super::{NUMBERS, Target, committed, scratch};
use std::sync::LazyLock;
use uft::text::Text;

pub const TARGET: Target = Target { name: "tokenizer", run, seeds, tokens: &TOKENS };

const TOKENS: [&str; 44] = [
    NUMBERS[0],
    NUMBERS[1],
    NUMBERS[3],
    NUMBERS[4],
    NUMBERS[5],
    NUMBERS[6],
    "null",
    "true",
    "[]",
    "{}",
    "\"type\":\"BPE\"",
    "\"type\":\"Unigram\"",
    "\"type\":\"WordPiece\"",
    "\"type\":\"WordLevel\"",
    "\"type\":\"Split\",\"pattern\":{\"Regex\":\"(a+)+$\"}",
    "\"type\":\"ByteLevel\"",
    "\"type\":\"Metaspace\"",
    "\"type\":\"Precompiled\",\"precompiled_charsmap\":\"\"",
    "\"type\":\"Sequence\"",
    "\"type\":\"Replace\"",
    "\"type\":\"TemplateProcessing\"",
    "\"type\":\"Strip\"",
    "\"type\":\"Fuse\"",
    "\"type\":\"CTC\"",
    "\"type\":\"ByteFallback\"",
    "\"type\":\"BertNormalizer\"",
    "\"type\":\"NFKC\"",
    "\"type\":\"Prepend\"",
    "\"type\":\"Digits\"",
    "\"type\":\"Punctuation\"",
    "\"type\":\"FixedLength\"",
    "\"vocab\":",
    "\"merges\":",
    "\"unk_id\":",
    "\"unk_token\":",
    "\"dropout\":",
    "\"added_tokens\":",
    "\"normalizer\":",
    "\"pre_tokenizer\":",
    "\"post_processor\":",
    "\"decoder\":",
    "\"byte_fallback\":true",
    "\"single_word\":true",
    "\"lstrip\":true",
];

/// With what tokenizers treat specially: spaces, capitals, digits, combining marks, other scripts.
const SAMPLE: &str =
    "The  year 1999, naïve e\u{301}\n日本 🙂 <s>aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!";

/// Small, so that most mutations fall on structure and not on the vocabulary.
const SMALL: &str = r#"{"version":"1.0","truncation":null,"padding":null,
"added_tokens":[{"id":5,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],
"normalizer":{"type":"NFC"},
"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"\\s+|\\p{L}+"},"behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false}]},
"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],"special_tokens":{"<s>":{"id":"<s>","ids":[5],"tokens":["<s>"]}}},
"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true},
"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":false,"vocab":{"a":0,"e":1,"h":2,"aa":3,"he":4},"merges":[["a","a"],["h","e"]]}}"#;

const OTHERS: [&str; 4] = [
    r#"{"added_tokens":[],"normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"▁"},{"type":"Replace","pattern":{"String":" "},"content":"▁"}]},"pre_tokenizer":null,"post_processor":null,
"decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},
"model":{"type":"Unigram","unk_id":0,"byte_fallback":true,"vocab":[["<unk>",0.0],["▁",-1.5],["a",-2.0],["aa",-2.5],["<0x0A>",-9.0]]}}"#,
    r###"{"added_tokens":[{"id":0,"content":"[UNK]","single_word":true,"lstrip":true,"rstrip":true,"normalized":true,"special":true}],"normalizer":{"type":"BertNormalizer","clean_text":true,"handle_chinese_chars":true,"strip_accents":null,"lowercase":true},"pre_tokenizer":{"type":"BertPreTokenizer"},
"post_processor":{"type":"BertProcessing","sep":["[UNK]",0],"cls":["[UNK]",0]},"decoder":{"type":"WordPiece","prefix":"##","cleanup":true},
"model":{"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":"##","max_input_chars_per_word":100,"vocab":{"[UNK]":0,"the":1,"##a":2,"year":3}}}"###,
    r#"{"added_tokens":[],"normalizer":{"type":"Precompiled","precompiled_charsmap":"ALQCAACEAAAAAACAAQAAgMz8AgC4BQAAhyIAgMzkAgC4PQAA"},"pre_tokenizer":{"type":"Metaspace","replacement":"▁","prepend_scheme":"always","split":true},"post_processor":{"type":"RobertaProcessing","sep":["</s>",1],"cls":["<s>",0],"trim_offsets":true,"add_prefix_space":true},
"decoder":{"type":"Metaspace","replacement":"▁","prepend_scheme":"always","split":true},"model":{"type":"WordLevel","vocab":{"<s>":0,"</s>":1,"▁The":2},"unk_token":"<s>"}}"#,
    r#"{"added_tokens":[{"id":4294967295,"content":"<far>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":null,"pre_tokenizer":null,"post_processor":null,"decoder":null,
"model":{"type":"BPE","vocab":{"a":0,"<far>":4294967295},"merges":[]}}"#,
];

static DIRECTORY: LazyLock<Directory> = LazyLock::new(|| {
    let text = |text: &str| text.as_bytes().to_vec();
    Directory(vec![
        ("tokenizer.json", text(SMALL)),
        (
            "tokenizer_config.json",
            text(
                r#"{"bos_token":"<s>","eos_token":{"content":"<s>"},"add_bos_token":true,"add_eos_token":false,"added_tokens_decoder":{"6":{"content":"<e>","lstrip":false,"normalized":false,"rstrip":false,"single_word":false,"special":true}},"chat_template":"{{ bos_token }}"}"#,
            ),
        ),
        ("special_tokens_map.json", text(r#"{"unk_token":{"content":"a"},"pad_token":"he"}"#)),
        ("generation_config.json", text(r#"{"eos_token_id":[5,6]}"#)),
    ])
});

fn run(input: &[u8]) {
    let dir = scratch();
    DIRECTORY.write(dir.path(), input);
    let Ok(text) = Text::load(dir.path()) else { return };
    for id in (0..8).chain([u32::MAX]) {
        text.token_text(id);
    }
    if let Ok(ids) = text.encode(SAMPLE, true) {
        // Either may be refused; that both return is what counts.
        let _ = (text.decode(&ids, true), text.encode_prompt("he"));
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = DIRECTORY.seeds();
    seeds.extend(OTHERS.map(|other| DIRECTORY.seed("tokenizer.json", other)));
    for model in ["llama", "mistral", "qwen3"] {
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            let bytes = committed(&format!("tests/golden/models/{model}/{file}"));
            seeds.push(DIRECTORY.seed(file, std::str::from_utf8(&bytes).expect("JSON is text")));
        }
    }
    seeds
}

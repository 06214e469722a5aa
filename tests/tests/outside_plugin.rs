//! docs/plugins.md, word for word: block after block, its files are written into a folder outside of the
//! workspace and its commands are run there, against the host that is there already.

use std::fs;
use uft_tests::outside::Outside;
use uft_tests::{lines, root};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");

/// A fenced block of the page, with the file name that stands before it as "`name`:".
struct Block {
    language: String,
    file: Option<String>,
    text: String,
}

fn blocks(page: &str) -> Vec<Block> {
    let (mut blocks, mut before) = (Vec::<Block>::new(), "");
    let mut inside = false;
    for line in page.lines() {
        match (line.strip_prefix("```"), inside) {
            (Some(language), false) => {
                let file = before.strip_suffix("`:").and_then(|b| b.rsplit_once('`')).map(|b| b.1);
                let (language, file) = (language.to_owned(), file.map(str::to_owned));
                blocks.push(Block { language, file, text: String::new() });
                inside = true;
            }
            (Some(_), true) => (inside, before) = (false, ""),
            (None, true) => {
                let block = blocks.last_mut().expect("inside of one");
                block.text.push_str(line);
                block.text.push('\n');
            }
            (None, false) if !line.is_empty() => before = line,
            (None, false) => {}
        }
    }
    blocks
}

#[test]
fn the_page_on_plugins_is_true() {
    let page = fs::read_to_string(root().join("docs/plugins.md")).expect("the page");
    let outside = Outside::new("page", UFT);
    let (mut files, mut said, mut transcripts) = (Vec::new(), String::new(), 0);
    for block in blocks(&page) {
        match (block.language.as_str(), block.file) {
            ("sh", None) => said += &outside.shell(&block.text),
            ("rust" | "toml" | "json" | "c", Some(file)) => {
                outside.write(&file, &block.text);
                files.push(file);
            }
            // How the program under test came to be.
            ("console", None) => transcripts += 1,
            (language, file) => panic!("a block of `{language}` ({file:?}) that nothing tries"),
        }
    }
    let written =
        ["ipo/src/lib.rs", "ipo/run.toml", "ipo/sum.toml", "ipo-c/ipo_c.c", "ipo-c/run.toml"];
    assert_eq!(files, written);
    assert_eq!(transcripts, 1);
    assert_eq!(said.matches("2 passed").count(), 3, "{said}");
    assert_eq!(said.matches("  ok    gradient: ").count(), 3, "{said}");
    assert!(said.contains("    most = 5.0  # a number from 2 to 100: "), "{said}");
    assert!(said.contains("  ok    its records: 4 of them, 4 samples"), "{said}");
    let steps = |run: &str| {
        let out = outside.folder.join(run);
        assert!(out.join("adapter_model.safetensors").is_file(), "{run}");
        lines(&fs::read_to_string(out.join("metrics.jsonl")).expect("metrics"))
    };
    let runs =
        ["ipo/out/first", "ipo/out/sum", "focal/out/first", "tickets/out/first", "ipo-c/out/first"];
    for run in runs {
        let steps = steps(run);
        assert_eq!(steps.len(), 20, "{run}");
        assert!(steps[1]["grad_norm"].as_f64().expect("a number") > 0.0, "{run}");
    }
    // With a new adapter every log-ratio is 0, so IPO starts at (1 / (2 beta))^2.
    assert_eq!(steps("ipo/out/first")[0]["loss"], 25.0);
    // The same rows, the same formula, the same seed: in C the run is that of Rust but for last bits.
    let (rust, c) = (steps("ipo/out/first"), steps("ipo-c/out/first"));
    assert_eq!(c[0]["loss"], 25.0);
    assert_eq!(c[0]["grad_norm"], rust[0]["grad_norm"]);
    let sum = steps("ipo/out/sum");
    assert_eq!(sum[0]["pairs/ipo/loss"], 100.0);
    assert_eq!(
        (&sum[0]["pairs/ipo/beta"], &sum[19]["pairs/ipo/beta"]),
        (&0.05.into(), &0.2.into())
    );
    let source = fs::read_to_string(outside.folder.join("ipo/src/lib.rs")).expect("written");
    let own = source.split("#[cfg(test)]").next().expect("a part").lines();
    assert!(own.filter(|line| !line.is_empty()).count() <= 40, "about 35 lines");
}

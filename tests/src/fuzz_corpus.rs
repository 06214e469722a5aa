//! Writes the seeds and dictionaries for libFuzzer: `cargo run -p uft-tests --bin fuzz-corpus -- DIR`
//! gives `DIR/TARGET/` and `DIR/TARGET.dict`.

use std::fmt::Write;
use std::path::PathBuf;
use uft_tests::fuzz::TARGETS;

fn main() -> std::io::Result<()> {
    let dir = std::env::args().nth(1).map(PathBuf::from).expect("the folder to write to");
    for target in &TARGETS {
        let seeds = dir.join(target.name);
        std::fs::create_dir_all(&seeds)?;
        for (index, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(seeds.join(format!("seed-{index:03}")), seed)?;
        }
        let mut dictionary = String::new();
        for token in target.tokens {
            dictionary.push('"');
            for byte in token.bytes() {
                let _ = write!(dictionary, "\\x{byte:02x}");
            }
            dictionary.push_str("\"\n");
        }
        std::fs::write(dir.join(format!("{}.dict", target.name)), dictionary)?;
    }
    Ok(())
}

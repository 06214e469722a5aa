//! docs/kernels.md has a line for every kernel, and none for what is no kernel.

use super::{HOPPER_KERNELS, KERNELS, Kernel};
use std::collections::BTreeSet;
use std::path::Path;

/// Names in backticks in the first column of the table that begins with this.
fn documented<'a>(text: &'a str, head: &str) -> Vec<&'a str> {
    let table = text.lines().skip_while(|line| !line.starts_with(head)).skip(2);
    let first = table.map_while(|line| line.strip_prefix("| ")?.split(" |").next());
    first.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect()
}

#[test]
fn every_kernel_is_documented_once() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kernels.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let listed = documented(&text, "| kernels |");
    let found: BTreeSet<&str> = listed.iter().copied().collect();
    let expected = names(KERNELS);
    let missing: Vec<_> = expected.difference(&found).collect();
    let gone: Vec<_> = found.difference(&expected).collect();
    let path = "docs/kernels.md, table of kernels";
    assert!(missing.is_empty(), "{path}: no line for {missing:?}");
    assert!(gone.is_empty(), "{path}: lines for {gone:?}, which are no kernels");
    assert_eq!(listed.len(), found.len(), "{path}: a kernel with two lines");
}

/// A line is a product's shape there, so that a kernel has several.
#[test]
fn every_kernel_of_hopper_is_documented() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kernels.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let found: BTreeSet<&str> = documented(&text, "| on Hopper |").into_iter().collect();
    assert_eq!(found, names(HOPPER_KERNELS), "docs/kernels.md, table of Hopper's kernels");
}

fn names(kernels: &[&'static [Kernel]]) -> BTreeSet<&'static str> {
    kernels.iter().flat_map(|kernels| kernels.iter()).map(|kernel| kernel.name).collect()
}

#[test]
fn the_table_is_read() {
    let text = "text `a`\n| kernels | b |\n| --- | --- |\n| `a`, `c` | `x` |\n| `d` | |\n\n| `e` |";
    assert_eq!(documented(text, "| kernels |"), ["a", "c", "d"]);
}

//! docs/abi.md is tied to the sources of the ABI: whatever is frozen is named there with a fingerprint
//! of its declaration.

use std::collections::BTreeMap;
use std::fmt::Write;
use uft_tests::root;

/// The declarations of everything that crosses the border: name → source without comments.
fn declarations() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let folder = std::fs::read_dir(root().join("core/src")).expect("the sources of uft-core");
    for path in folder.map(|entry| entry.expect("an entry").path()) {
        if path.extension().is_none_or(|e| e != "rs") {
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a source");
        let text = text.split("#[cfg(test)]").next().expect("a part");
        let lines: Vec<&str> = text.lines().filter(|l| !l.trim().starts_with("//")).collect();
        for (at, _) in lines.iter().enumerate().filter(|(_, line)| is_frozen(line)) {
            let (name, declaration) = declaration(&lines, at);
            assert!(found.insert(name.clone(), declaration).is_none(), "{name} is there twice");
        }
    }
    found
}

/// The same of the border in C. Its constants are one.
fn in_c() -> BTreeMap<String, String> {
    let path = root().join("core/src/c/declarations.rs");
    let text = std::fs::read_to_string(path).expect("the declarations");
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().starts_with("//")).collect();
    let structs = lines.iter().enumerate().filter(|(_, line)| line.starts_with("#[repr(C)]"));
    let mut found: BTreeMap<_, _> = structs.map(|(at, _)| declaration(&lines, at)).collect();
    let constants = lines.iter().filter(|line| line.starts_with("pub const "));
    found.insert("UFT_…".into(), constants.copied().collect::<Vec<_>>().join(" "));
    found
}

/// Whether what follows an attribute crosses the border.
fn is_frozen(line: &str) -> bool {
    line.starts_with("#[derive(StableAbi") || line.starts_with("#[sabi_trait]")
}

/// The item around an attribute: from its first attribute to its closing brace.
fn declaration(lines: &[&str], at: usize) -> (String, String) {
    let first = (0..=at).rev().take_while(|i| lines[*i].starts_with("#[")).last().expect("itself");
    let mut text = String::new();
    let mut depth = 0i32;
    for line in &lines[first..] {
        text.push_str(line.trim());
        text.push(' ');
        depth += line.matches(['{', '(']).count() as i32 - line.matches(['}', ')']).count() as i32;
        if depth == 0 && (line.ends_with('}') || line.ends_with(';')) {
            break;
        }
    }
    let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
    let name = words.skip_while(|w| !["struct", "enum", "trait"].contains(w)).nth(1);
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    (name.expect("an item has a name").to_owned(), text)
}

/// The table of a page, under a heading of its own.
fn table(heading: &str, declarations: BTreeMap<String, String>) -> String {
    let mut table = format!("| {heading} | fingerprint |\n| --- | --- |\n");
    for (name, declaration) in declarations {
        let hash = blake3::hash(declaration.as_bytes()).to_hex();
        let _ = writeln!(table, "| `{name}` | `{}` |", &hash[..16]);
    }
    table
}

#[test]
fn what_is_frozen_is_as_the_page_says() {
    let page = std::fs::read_to_string(root().join("docs/abi.md")).expect("the page");
    let table_of_rust = table("declaration", declarations());
    assert!(
        page.contains(&table_of_rust),
        "a type that crosses the border has changed; if today's plugins cannot be loaded any more, raise \
         ABI_REVISION and uft-core's minor version, and in any case write into docs/abi.md:\n\n{table_of_rust}"
    );
    let table_of_c = table("declaration in C", in_c());
    assert!(
        page.contains(&table_of_c),
        "a declaration of the border in C has changed; if it is more than a field at the end of a struct that \
         has its size, raise UFT_C_REVISION, and in any case write into docs/abi.md:\n\n{table_of_c}"
    );
    let revision = format!("the ABI revision, now {}", uft_core::abi::ABI_REVISION);
    assert!(page.contains(&revision), "{revision}");
    let revision = format!("the revision, now {}", uft_core::c::declarations::UFT_C_REVISION);
    assert!(page.contains(&revision), "{revision}");
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).expect("the manifest");
    let pinned = manifest.lines().find(|line| line.starts_with("abi_stable = ")).expect("a pin");
    let version = pinned.split('"').nth(1).expect("a version").trim_start_matches('=');
    assert!(page.contains(&format!("https://docs.rs/abi_stable/{version}")), "{version}");
}

#[test]
fn a_change_of_a_declaration_is_seen_and_one_of_a_comment_is_not() {
    let text = [
        "#[repr(C)]",
        "#[derive(StableAbi, Clone)]",
        "pub struct Step {",
        "    pub number: u64,",
        "}",
    ];
    let (name, before) = declaration(&text, 1);
    assert_eq!(name, "Step");
    assert_eq!(
        before,
        "#[repr(C)] #[derive(StableAbi, Clone)] pub struct Step { pub number: u64, }"
    );
    let mut other = text;
    other[3] = "    pub number: u32,";
    assert_ne!(declaration(&other, 1).1, before);
    // Every kind of declaration is found.
    let found = declarations();
    for name in ["PluginModule", "ObjectiveAbi", "Batch", "Kind", "Needs", "ParamDoc", "Extension"]
    {
        assert!(found.contains_key(name), "{name} in {:?}", found.keys());
    }
    assert!(
        found["ObjectiveAbi"]
            .ends_with("fn load_state(&mut self, state: RSlice<'_, u8>) -> RResult<(), Fault>; }")
    );
    let found = in_c();
    assert!(found["UftValue"].ends_with("pub number: f64, pub text: *const c_char, }"));
    assert!(found["UftPlugin"].ends_with("pub objective_count: u64, }"));
    assert_eq!(found.len(), 12, "{:?}", found.keys());
    assert!(found["UFT_…"].contains("pub const UFT_NEEDS_STATE: u64 = 128;"));
}

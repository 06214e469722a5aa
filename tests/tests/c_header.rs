//! core/include/uft_plugin.h is what cbindgen makes of the declarations in core/src/c. To renew it:
//!
//!     UFT_WRITE_HEADER=1 cargo test -p uft-tests --test c_header

use cbindgen::{Builder, Config, DocumentationStyle, Language, Style};
use std::fs;
use uft_core::c;
use uft_tests::root;

const PATH: &str = "core/include/uft_plugin.h";

/// What stands before and after the declarations; cbindgen's own include guard would leave the
/// helpers out.
const BEFORE: &str = "\
// A plugin for uft in C, or in any language that can export a C function: docs/plugins.md.
//
// Generated from core/src/c; a test compares the two.

#ifndef UFT_PLUGIN_H
#define UFT_PLUGIN_H";
const AFTER: &str = "#endif // UFT_PLUGIN_H";

fn generated() -> String {
    let config = Config {
        language: Language::C,
        cpp_compat: true,
        header: Some(BEFORE.into()),
        no_includes: true,
        sys_includes: ["stdint.h", "stdio.h", "string.h"].map(str::to_owned).into(),
        trailer: Some(format!("{}\n{AFTER}", c::HELPERS)),
        style: Style::Both,
        tab_width: 2,
        line_length: 110,
        documentation_style: DocumentationStyle::C99,
        ..Config::default()
    };
    let source = root().join("core/src/c/declarations.rs");
    let bindings = Builder::new().with_config(config).with_src(source).generate();
    let mut header = Vec::new();
    bindings.expect("declarations that C has, too").write(&mut header);
    String::from_utf8(header).expect("text")
}

#[test]
fn the_header_is_what_the_declarations_say() {
    let (path, header) = (root().join(PATH), generated());
    if std::env::var_os("UFT_WRITE_HEADER").is_some() {
        fs::write(&path, &header).expect("written");
    }
    let there = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        there == header,
        "{PATH} is not what core/src/c/declarations.rs says; renew it with\n\n    \
         UFT_WRITE_HEADER=1 cargo test -p uft-tests --test c_header\n"
    );
}

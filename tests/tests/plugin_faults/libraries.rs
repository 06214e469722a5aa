//! Files that cannot be loaded, or not together.

use super::{PLUGIN, UFT, check, library, refused, temporary, text};
use std::path::Path;
use uft_tests::succeed;

#[test]
fn a_plugin_that_is_not_there_is_told_with_the_folders_searched() {
    let dir = temporary();
    let line = refused(PLUGIN, &["plugin", "list", "no-such", "--plugin-dir", text(dir.path())]);
    let own = Path::new(UFT).parent().expect("a folder").display();
    let expected = format!(
        "plugin `no-such`: no libno_such.so in {}, {own}/deps, {own}; build it, add its folder to \
         [plugins] dirs, or give its path",
        dir.path().display()
    );
    assert_eq!(line, expected);

    let line = check(PLUGIN, "\"demonstrations\"", "\"no-such\"");
    assert!(line.starts_with("[[data]] `s`: plugin `no-such`: no libno_such.so in "), "{line}");

    let path = dir.path().join("libmine.so");
    assert_eq!(
        refused(PLUGIN, &["plugin", "list", text(&path)]),
        format!("plugin `{}`: no such file; build the plugin or correct the path", path.display())
    );
}

#[test]
fn a_file_that_is_no_plugin_is_refused() {
    let dir = temporary();
    let path = dir.path().join("libtext.so");
    std::fs::write(&path, "a text of more than sixty-four bytes ".repeat(4)).expect("written");
    assert_eq!(
        refused(PLUGIN, &["plugin", "list", text(&path)]),
        format!(
            "plugin {}: it is not a shared library (ELF, 64 bit); give the library that cargo \
             built for the plugin",
            path.display()
        )
    );
    assert_eq!(
        refused(PLUGIN, &["plugin", "list", "no-plugin"]),
        format!(
            "plugin {}: it is a shared library, but not a uft plugin; a plugin exports its \
             objectives and adapters with `uft_core::plugin!`, one in C the function `uft_c_plugin`",
            library("no-plugin").display()
        )
    );
}

#[test]
fn a_library_that_is_cut_short_does_not_kill_the_process() {
    let whole = std::fs::read(library("sft")).expect("the library");
    let dir = temporary();
    let path = dir.path().join("libsft.so");
    let sizes = [64, 4096, 100_000, whole.len() / 4, whole.len() / 2, whole.len() - 1];
    for size in sizes {
        std::fs::write(&path, &whole[..size]).expect("written");
        assert_eq!(
            refused(PLUGIN, &["plugin", "list", text(&path)]),
            format!(
                "plugin {}: the file is cut short ({size} bytes); build or copy it again",
                path.display()
            )
        );
    }
    for size in [0, 63] {
        std::fs::write(&path, &whole[..size]).expect("written");
        let line = refused(PLUGIN, &["plugin", "list", text(&path)]);
        assert!(line.contains("it is not a shared library"), "{size} bytes: {line}");
    }
    std::fs::write(&path, &whole).expect("written");
    assert!(succeed(UFT, &["plugin", "list", text(&path)]).starts_with("sft (objective"));
}

#[test]
fn a_library_for_another_machine_is_refused() {
    let whole = std::fs::read(library("sft")).expect("the library");
    let dir = temporary();
    let path = dir.path().join("libsft.so");
    let mut other = whole.clone();
    // `e_machine`: 8 is MIPS.
    other[18..20].copy_from_slice(&[8, 0]);
    std::fs::write(&path, other).expect("written");
    assert_eq!(
        refused(PLUGIN, &["plugin", "list", text(&path)]),
        format!(
            "plugin {}: it is built for another processor (ELF machine 8); build it for this one",
            path.display()
        )
    );
    // A library that it is linked to is not there.
    let name = whole.windows(9).position(|w| w == b"libc.so.6").expect("linked to libc");
    let mut lost = whole;
    lost[name..name + 9].copy_from_slice(b"no-such.6");
    std::fs::write(&path, lost).expect("written");
    assert_eq!(
        refused(PLUGIN, &["plugin", "list", text(&path)]),
        format!(
            "plugin {}: the loader refuses it (no-such.6: cannot open shared object file: No such \
             file or directory); build it on this machine",
            path.display()
        )
    );
}

#[test]
fn another_abi_revision_and_another_layout_are_refused() {
    assert_eq!(
        refused(PLUGIN, &["plugin", "list", "other-abi"]),
        format!(
            "plugin {}: it speaks ABI revision 99, this host speaks 1; rebuild it against this \
             uft-core",
            library("other-abi").display()
        )
    );
    assert_eq!(
        refused(PLUGIN, &["plugin", "list", "other-layout"]),
        format!(
            "plugin {}: its types differ from this host's uft-core (Entry.about: mismatched type, \
             expected RString, found u64); rebuild it against this uft-core",
            library("other-layout").display()
        )
    );
}

#[test]
fn a_name_that_is_taken_is_refused() {
    let (sft, namesakes) = (library("sft"), library("namesakes"));
    assert_eq!(
        refused(PLUGIN, &["plugin", "list", "sft", "namesakes"]),
        format!(
            "plugin {}: the objective `sft` is exported by {} too; load only one of them",
            namesakes.display(),
            sft.display()
        )
    );
    assert_eq!(
        refused(PLUGIN, &["plugin", "list", "namesakes"]),
        format!(
            "plugin {}: it exports the objective `sft` twice; this is a bug of the plugin, report \
             it to its author",
            namesakes.display()
        )
    );
    // The same library under two names is one.
    let listed = succeed(UFT, &["plugin", "list", "sft", text(&sft)]);
    assert_eq!(listed.matches("(objective").count(), 1, "{listed}");
}

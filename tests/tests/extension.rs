//! The generic door of a real library: what a later revision of the interface would come through.

use uft::plugins::library::{Library, find};
use uft_core::export::abi_stable::std_types::{RStr, Tuple2};
use uft_core::extension::Extension;

/// Opens a library that cargo built for the tests.
fn open(name: &str) -> Library {
    Library::open(&find(name, &[]).expect("it was built")).expect("a plugin")
}

/// What a library has behind a name.
fn ask(library: &Library, name: &str, revision: u32) -> Option<Extension> {
    library.query(name, revision)
}

#[test]
fn an_extension_opens_as_what_it_is() {
    let library = open("sound");
    let door = ask(&library, "secret", 1).expect("`sound` has it");
    let Tuple2(words, number) = door.open::<Tuple2<RStr<'static>, u64>>().expect("its own type");
    assert_eq!((words.as_str(), *number), ("behind the door", 42));
}

#[test]
fn another_layout_stays_shut() {
    let library = open("sound");
    let door = ask(&library, "secret", 1).expect("`sound` has it");
    let refused = door.open::<Tuple2<RStr<'static>, f64>>().expect_err("another number");
    assert_eq!(refused, "field `field_1`: mismatched type, expected f64, found u64");
    assert!(door.open::<u64>().is_err());
}

#[test]
fn what_a_library_does_not_know_is_none() {
    let library = open("sound");
    assert!(ask(&library, "no-such", 1).is_none());
    assert!(ask(&library, "secret", 2).is_none(), "a later revision of it");
    // Unwinding must not cross the border, and there is no way to tell a fault here.
    assert!(ask(&library, "panic", 1).is_none());
    assert!(ask(&open("sft"), "secret", 1).is_none(), "a plugin without extensions");
}

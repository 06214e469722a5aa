//! The declarations against those of Rust. What the bridge makes of libraries, good and bad, is tested
//! with real ones in tests/tests/plugin_faults.

use super::declarations::*;
use super::read;
use crate::needs::{Kinds, Needs};
use crate::sample::Kind;
use std::mem::offset_of;

#[test]
fn bits_and_kinds_are_those_of_rust() {
    let needs = [
        (UFT_NEEDS_REFERENCE, Needs::REFERENCE),
        (UFT_NEEDS_PAIRS, Needs::PAIRS),
        (UFT_NEEDS_GROUPS, Needs::GROUPS),
        (UFT_NEEDS_MISMATCHED, Needs::MISMATCHED),
        (UFT_NEEDS_STEP_LOG_RATIOS, Needs::STEP_LOG_RATIOS),
        (UFT_NEEDS_TOKEN_COUNTS, Needs::TOKEN_COUNTS),
        (UFT_NEEDS_TOKEN_LOGPS, Needs::TOKEN_LOGPS),
        (UFT_NEEDS_STATE, Needs::STATE),
        (UFT_NEEDS_STEP_RESPONSES, Needs::STEP_RESPONSES),
    ];
    assert_eq!(needs.map(|(c, _)| c), Needs::ALL.map(|(need, _)| need.0), "one for each need");
    assert!(needs.iter().all(|(c, rust)| *c == rust.0));
    let kinds = [
        (UFT_DEMONSTRATION, UFT_ACCEPTS_DEMONSTRATION),
        (UFT_SCORE, UFT_ACCEPTS_SCORE),
        (UFT_BINARY, UFT_ACCEPTS_BINARY),
        (UFT_CHOSEN, UFT_ACCEPTS_CHOSEN),
        (UFT_REJECTED, UFT_ACCEPTS_REJECTED),
    ];
    assert_eq!(kinds, Kind::ALL.map(|kind| (kind as u32, Kinds::of(kind).0)));
    assert_eq!(UFT_ACCEPTS_PAIR, Kinds::PAIR.0);
}

/// Appended fields are found by the size alone, so a struct must not end in padding, which C leaves
/// unwritten; and what revision 1 begins with stays where it is.
#[test]
fn structs_end_with_their_last_field() {
    let word = size_of::<usize>();
    assert_eq!(size_of::<UftFault>(), 512);
    assert_eq!(size_of::<UftStep>(), offset_of!(UftStep, responses) + word);
    assert_eq!(size_of::<UftBatch>(), offset_of!(UftBatch, tokens) + 8);
    assert_eq!(size_of::<UftEvaluation>(), offset_of!(UftEvaluation, metrics) + word);
    assert_eq!(size_of::<UftObjective>(), offset_of!(UftObjective, load_state) + word);
    assert_eq!(size_of::<UftPlugin>(), offset_of!(UftPlugin, objective_count) + 8);
    let elements = [
        size_of::<UftParam>(),
        size_of::<UftValue>(),
        size_of::<UftSegment>(),
        size_of::<UftResponse>(),
        size_of::<UftMetric>(),
    ];
    assert_eq!(elements, [64, 16, 24, 24, 80]);
}

#[repr(C)]
struct Later {
    plugin: UftPlugin,
    appended: u64,
}

#[test]
fn a_struct_is_read_as_far_as_both_sides_know_it() {
    let (at, smallest) = (offset_of!(UftPlugin, size), size_of::<UftPlugin>());
    let plugin = |size: usize| UftPlugin {
        revision: 1,
        size: size as u32,
        objectives: std::ptr::null(),
        objective_count: 3,
    };
    // SAFETY: each is as large as its size says.
    unsafe {
        let later = Later { plugin: plugin(size_of::<Later>()), appended: 7 };
        let seen = read::sized::<UftPlugin>((&raw const later).cast(), at, smallest).unwrap();
        assert_eq!(seen.objective_count, 3);
        let earlier = plugin(smallest);
        // A host of a later revision of the struct: what was not there is 0.
        let bytes = [earlier, plugin(0)];
        let seen = read::sized::<Later>(bytes.as_ptr().cast(), at, smallest).unwrap();
        assert_eq!((seen.plugin.objective_count, seen.appended), (3, 0));
        let cut = read::sized(&plugin(8), at, smallest).err().unwrap();
        assert!(cut.starts_with("has a size of 8 bytes, less than the 24 of revision 1"), "{cut}");
        assert_eq!(
            read::sized::<UftPlugin>(std::ptr::null(), at, smallest).err().unwrap(),
            "is NULL"
        );
    }
}

#[test]
fn texts_are_believed_only_as_far_as_they_end() {
    let long = vec![b'a'; 5000];
    // SAFETY: each ends with a zero byte or is longer than what is read.
    unsafe {
        assert_eq!(read::text(c"d_w - d_l".as_ptr()).unwrap(), "d_w - d_l");
        assert_eq!(read::text(c"\xff".as_ptr()).unwrap_err(), "is not UTF-8");
        assert_eq!(read::text(std::ptr::null()).unwrap_err(), "is NULL");
        let endless = read::text(long.as_ptr().cast()).unwrap_err();
        assert_eq!(endless, "does not end within 4096 bytes");
    }
}

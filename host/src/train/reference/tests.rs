//! The file under kills, cuts, damage and other runs.

use super::store::{HEADER, record_len};
use super::*;
use std::fs::OpenOptions;
use std::io::Write;

fn group(tokens: &[u32]) -> Group {
    let segment = Segment { feedback: Feedback::Demonstration, trained: vec![1..tokens.len()] };
    let branches = vec![Branch { tokens: tokens.to_vec(), segments: vec![segment] }];
    Group { prompt: vec![7], branches }
}

fn open(path: &Path) -> ReferenceLogps {
    ReferenceLogps::open(path, &[3; 32]).unwrap()
}

fn path(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("uft-logps-{}-{name}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

#[test]
fn what_is_written_is_read_by_every_later_run() {
    let path = path("written");
    let (a, b, c) = (group(&[1, 2, 3]), group(&[1, 2]), group(&[5, 6]));
    let mut first = open(&path);
    assert_eq!(first.get(&a).unwrap(), None);
    first.insert(&[(&a, &[-1.0, -2.5]), (&b, &[-0.5])]).unwrap();
    // A second run at the same time: it knows what was there when it began, and adds its own.
    let mut second = open(&path);
    second.insert(&[(&c, &[-9.0])]).unwrap();
    first.insert(&[(&c, &[-9.0])]).unwrap();
    for known in [first, second, open(&path)] {
        assert_eq!(known.get(&a).unwrap().as_deref(), Some(&[-1.0, -2.5][..]));
        assert_eq!(known.get(&b).unwrap().as_deref(), Some(&[-0.5][..]));
        assert_eq!(known.get(&c).unwrap().as_deref(), Some(&[-9.0][..]));
    }
    std::fs::remove_file(path).unwrap();
}

#[test]
fn feedback_is_no_part_of_a_row_but_what_is_trained_is() {
    let (a, mut b, mut c) = (group(&[1, 2, 3]), group(&[1, 2, 3]), group(&[1, 2, 3]));
    b.branches[0].segments[0].feedback = Feedback::Binary(false);
    c.branches[0].segments[0].trained = vec![1..2];
    assert_eq!(key(&a), key(&b));
    assert_ne!(key(&a), key(&c));
}

/// A record that another run writes where this one's was is not taken for it.
#[test]
fn another_run_may_cut_the_file_under_this_one() {
    let path = path("cut");
    let (a, b, c) = (group(&[1, 2, 3]), group(&[4, 5, 6]), group(&[7, 8, 9]));
    let mut first = open(&path);
    first.insert(&[(&a, &[-1.0, -2.0])]).unwrap();
    first.insert(&[(&b, &[-3.0, -4.0])]).unwrap();
    let half = HEADER + record_len(2) + 9;
    OpenOptions::new().write(true).open(&path).unwrap().set_len(half).unwrap();
    assert_eq!(first.get(&b).unwrap(), None, "cut off");
    open(&path).insert(&[(&c, &[-5.0, -6.0])]).unwrap();
    assert_eq!(first.get(&b).unwrap(), None, "overwritten");
    assert_eq!(first.get(&a).unwrap().as_deref(), Some(&[-1.0, -2.0][..]));
    // A half record of a run that was killed does not spoil what comes behind it.
    OpenOptions::new().append(true).open(&path).unwrap().write_all(&[7; 11]).unwrap();
    first.insert(&[(&b, &[-3.0, -4.0])]).unwrap();
    for known in [first, open(&path)] {
        assert_eq!(known.get(&b).unwrap().as_deref(), Some(&[-3.0, -4.0][..]));
    }
    std::fs::remove_file(path).unwrap();
}

/// Wherever a file is cut, the records before it are used and those after it are not.
#[test]
fn only_whole_records_are_used() {
    let path = path("torn");
    let (a, b) = (group(&[1, 2, 3]), group(&[4, 5]));
    let mut store = open(&path);
    store.insert(&[(&a, &[-1.0, -2.0])]).unwrap();
    store.insert(&[(&b, &[-3.0])]).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let first = (HEADER + record_len(2)) as usize;
    for len in 0..=bytes.len() {
        std::fs::write(&path, &bytes[..len]).unwrap();
        let mut known = open(&path);
        assert_eq!(known.get(&a).unwrap().is_some(), len >= first, "{len}");
        assert_eq!(known.get(&b).unwrap().is_some(), len == bytes.len(), "{len}");
        known.insert(&[(&b, &[-4.0])]).unwrap();
        assert_eq!(open(&path).get(&b).unwrap().as_deref(), Some(&[-4.0][..]), "{len}");
    }
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 4;
        std::fs::write(&path, &damaged).unwrap();
        let known = open(&path);
        assert_eq!(known.get(&a).unwrap().is_some(), at >= first, "{at}");
        assert!(known.get(&b).unwrap().is_none(), "{at}");
    }
    std::fs::remove_file(path).unwrap();
}

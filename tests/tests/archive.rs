//! A built plugin goes on working: libraries that were built against earlier cores (tests/abi/archive.toml) load
//! in today's host, pass the check, and train to the bits of today's build of the same source.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use toml::Table;
use uft::plugins::library::{Library, find};
use uft_core::abi::ABI_REVISION;
use uft_core::export::abi_stable::std_types::{RStr, Tuple2};
use uft_core::extension::Extension;
use uft_tests::mixed::{assert_same, finished, temporary};
use uft_tests::run::RunFile;
use uft_tests::{fail, root, succeed};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");
/// Where the archived libraries can be loaded. Elsewhere nothing is known of earlier builds; today's build
/// of their source is tested everywhere.
const LOADABLE: bool = cfg!(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu"));

/// An archived library, unpacked.
struct Archived {
    path: PathBuf,
    revision: u32,
}

fn manifest() -> Vec<Table> {
    let path = root().join("tests/abi/archive.toml");
    let text = std::fs::read_to_string(path).expect("the manifest");
    let manifest: Table = text.parse().expect("TOML");
    let libraries = manifest["library"].as_array().expect("libraries").iter();
    libraries.map(|library| library.as_table().expect("a table").clone()).collect()
}

fn text<'a>(library: &'a Table, key: &str) -> &'a str {
    library[key].as_str().unwrap_or_else(|| panic!("no {key} in {library}"))
}

fn revision(library: &Table) -> u32 {
    let revision = library["revision"].as_integer().expect("a revision");
    u32::try_from(revision).expect("a revision")
}

fn unpacked(library: &Table) -> Vec<u8> {
    let path = root().join("tests/abi").join(text(library, "file"));
    let output = Command::new("gzip").arg("-dc").arg(&path).output().expect("gzip");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// What can be loaded of the archive, under names of their own, for as long as the tests run.
static ARCHIVE: LazyLock<(tempfile::TempDir, Vec<Archived>)> = LazyLock::new(|| {
    let (guard, dir) = temporary();
    let unpack = |library: Table| {
        let commit = &text(&library, "commit")[..7];
        let path = dir.join(format!("libarchived_{commit}.so"));
        std::fs::write(&path, unpacked(&library)).expect("written");
        Archived { path, revision: revision(&library) }
    };
    let libraries = manifest().into_iter().filter(|_| LOADABLE).map(unpack).collect();
    (guard, libraries)
});

/// Those of today's revision, which have to work.
fn working() -> impl Iterator<Item = &'static Path> {
    let current = ARCHIVE.1.iter().filter(|library| library.revision == ABI_REVISION);
    current.map(|library| library.path.as_path())
}

/// Today's build of the same source.
fn todays() -> PathBuf {
    find("archived", &[]).expect("it was built")
}

/// The hash of the page's table of everything that crosses the border, as tests/abi/make.py computes it.
/// tests/abi.rs ties the table to the sources.
fn declarations() -> String {
    let page = std::fs::read_to_string(root().join("docs/abi.md")).expect("the page");
    let rows = page.lines().skip_while(|line| *line != "| declaration | fingerprint |");
    let table: String =
        rows.take_while(|row| row.starts_with('|')).map(|row| format!("{row}\n")).collect();
    blake3::hash(table.as_bytes()).to_hex()[..16].to_owned()
}

/// What the archive lacks for an interface of this revision, version and declarations.
fn lacks(archive: &[Table], current: u32, core: &str, declarations: &str) -> Vec<String> {
    let of = |wanted: u32| archive.iter().filter(move |library| revision(library) == wanted);
    let minor = |version: &str| version.rsplit_once('.').expect("three numbers").0.to_owned();
    let mut lacks = Vec::new();
    for wanted in (1..=current).filter(|wanted| of(*wanted).next().is_none()) {
        lacks.push(format!("a library of ABI revision {wanted}"));
    }
    if !of(current).any(|library| minor(text(library, "core")) == minor(core)) {
        lacks.push(format!("a library of uft-core {core}"));
    }
    if !of(current).any(|library| text(library, "declarations") == declarations) {
        lacks.push("a library with today's declarations (docs/abi.md)".to_owned());
    }
    lacks
}

#[test]
fn the_archive_is_whole_and_reaches_today() {
    let archive = manifest();
    for library in &archive {
        let hash = blake3::hash(&unpacked(library)).to_hex();
        assert_eq!(hash.as_str(), text(library, "blake3"), "{}", text(library, "file"));
    }
    let lacks = lacks(&archive, ABI_REVISION, env!("CARGO_PKG_VERSION"), &declarations());
    assert!(
        lacks.is_empty(),
        "the interface has changed and tests/abi lacks {}; commit, then: python tests/abi/make.py HEAD",
        lacks.join(", ")
    );
    let kept: u64 = archive
        .iter()
        .map(|library| root().join("tests/abi").join(text(library, "file")))
        .map(|path| path.metadata().expect("a file").len())
        .sum();
    assert!(kept < 4 << 20, "{kept} bytes of archived libraries: keep fewer of each revision");
}

#[test]
fn a_change_without_a_new_library_is_seen() {
    let (archive, today) = (manifest(), declarations());
    let core = env!("CARGO_PKG_VERSION");
    let next = ABI_REVISION + 1;
    let raised = lacks(&archive, next, core, &today);
    assert!(raised.contains(&format!("a library of ABI revision {next}")), "{raised:?}");
    assert_eq!(lacks(&archive, ABI_REVISION, "0.0.9", &today), ["a library of uft-core 0.0.9"]);
    let changed = lacks(&archive, ABI_REVISION, core, "0123456789abcdef");
    assert_eq!(changed, ["a library with today's declarations (docs/abi.md)"]);
    // The declarations' hash is one of a table, not of nothing.
    assert_ne!(today, blake3::hash(b"").to_hex()[..16]);
}

#[test]
fn archived_libraries_say_what_todays_does_and_pass_the_check() {
    let list = |path: &Path| {
        let path = path.display().to_string();
        let said = succeed(UFT, &["plugin", "list", &path]);
        assert!(said.contains("beta") && said.contains("archived-records"), "{said}");
        succeed(UFT, &["plugin", "check", &path]);
        said.replace(&path, "PATH")
    };
    let today = list(&todays());
    for path in working() {
        assert_eq!(list(path), today, "{}", path.display());
    }
}

#[test]
fn libraries_of_an_earlier_revision_are_refused_by_it() {
    for library in ARCHIVE.1.iter().filter(|library| library.revision != ABI_REVISION) {
        let path = library.path.display().to_string();
        let why = fail(UFT, 4, &["plugin", "list", &path]);
        let says = format!("it speaks ABI revision {}, this host speaks", library.revision);
        assert!(why.contains(&says), "{why}");
    }
}

const ROWS: [&str; 8] = [
    r#"{"prompt": [{"role": "user", "content": "Name a river."}], "response": [{"role": "assistant", "content": "The Rhine."}], "feedback": "demonstration", "value": 1}"#,
    r#"{"prompt": "2 + 2 =", "response": " 4", "other": " 5, or 4", "feedback": "score", "value": 0.875}"#,
    r#"{"prompt": "The sky is", "response": " blue", "feedback": "thumb", "value": 1}"#,
    r#"{"prompt": "The sky is", "response": " loud", "other": " high", "feedback": "thumb", "value": 0}"#,
    r#"{"prompt": "A cat says", "response": " miau, as cats do", "other": " nothing", "feedback": "pair", "value": 0.25}"#,
    r#"{"prompt": [{"role": "user", "content": "Count."}], "response": [{"role": "assistant", "content": "One."}, {"role": "user", "content": "On."}, {"role": "assistant", "content": "Two."}], "feedback": "demonstration", "value": 1, "turns": "each"}"#,
    r#"{"prompt": "A dog says", "response": " wau", "feedback": "score", "value": 0.5}"#,
    r#"{"prompt": "Left or", "response": " right", "other": " wrong", "feedback": "pair", "value": 0.75}"#,
];

/// A run over all of the rows, and over pairs alone, with a library by its path.
fn write_run(dir: &Path, library: &Path) -> String {
    let pairs = ROWS.iter().filter(|row| row.contains("\"pair\"")).copied();
    for (file, rows) in [("all", ROWS.to_vec()), ("pairs", pairs.collect())] {
        std::fs::write(dir.join(format!("{file}.jsonl")), rows.join("\n")).expect("written");
    }
    let pointwise = r#"{ plugin = "archived-pointwise", beta = 0.4 }"#;
    let pairwise =
        r#"{ plugin = "archived-pairwise", beta = { schedule = "linear", from = 0.1, to = 0.3 } }"#;
    RunFile::new(dir, "llama")
        .section("lora", "rank = 4\nalpha = 8")
        .section("plugins", &format!("load = [\"{}\"]", library.display()))
        .source("all", &dir.join("all.jsonl"), "archived-records", pointwise)
        .eval_fraction(0.25)
        .source("pairs", &dir.join("pairs.jsonl"), "archived-records", pairwise)
        .own_references()
        .train("steps = 6\nbatch = 6\nmicro_tokens = 100\nlr = 5e-3\nsave_every = 2")
        .and("[eval]\nevery = 3")
        .write()
}

#[test]
fn archived_libraries_train_and_resume_to_the_bits_of_todays() {
    let train = |library: &Path| {
        let (_guard, dir) = temporary();
        let run = write_run(&dir, library);
        succeed(UFT, &["train", &run]);
        let trained = finished(&dir.join("out"));
        let said = succeed(UFT, &["verify-resume", &run]);
        assert!(said.contains("bit for bit"), "{}: {said}", library.display());
        trained
    };
    let today = train(&todays());
    let last = today.metrics.last().expect("six steps");
    for key in ["all/center", "pairs/margin", "pairs/archived-pairwise/beta"] {
        assert!(last[key].is_f64(), "no {key} in {last}");
    }
    assert_ne!(last["all/center"], 0.0, "the state never changed: {last}");
    for path in working() {
        assert_same(&today, &train(path), &path.display().to_string());
    }
}

#[test]
fn faults_and_panics_of_archived_libraries_are_told() {
    for library in working().map(Path::to_owned).chain([todays()]) {
        for (feedback, code, says) in [
            ("opinion", 3, ["`feedback` must be a kind of feedback", ""]),
            ("panic", 4, ["`archived-records` panicked", ": on purpose"]),
        ] {
            let row = ROWS[2].replace("thumb", feedback);
            let (_guard, dir) = temporary();
            let run = write_run(&dir, &library);
            std::fs::write(dir.join("pairs.jsonl"), row).expect("written");
            let why = fail(UFT, code, &["check", &run]);
            let told = says.iter().all(|says| why.contains(says));
            assert!(told, "{}: {why}", library.display());
        }
    }
}

#[test]
fn the_door_of_archived_libraries_opens() {
    for path in working().map(Path::to_owned).chain([todays()]) {
        let library = Library::open(&path).expect("a plugin");
        let ask = |name: &str| -> Option<Extension> { library.query(name, 1) };
        let door = ask("archived").expect("it has one");
        let Tuple2(words, number) = door.open::<Tuple2<RStr<'static>, u64>>().expect("its type");
        assert_eq!((words.as_str(), *number), ("archived", 1));
        assert!(ask("no-such").is_none());
    }
}

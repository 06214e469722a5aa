//! `uft plugin new`: a crate of its own that builds, passes its tests and trains as it is, or the same in
//! C. What it consists of are the files in `host/templates`.

use super::super::print;
use crate::plugins::library::file_name;
use crate::{Error, Result};
use clap::{ArgGroup, Args};
use std::path::{Path, PathBuf};
use uft_core::c::HEADER;

#[derive(Args)]
#[command(group = ArgGroup::new("role").required(true))]
pub struct NewArgs {
    /// Name of the plugin, of its folder and of its crate: lower-case letters, digits and `-`
    name: String,
    /// An objective: feedback and log-probs in, loss and gradient out
    #[arg(long, group = "role")]
    objective: bool,
    /// A feedback adapter: a JSON record in, samples out
    #[arg(long, group = "role")]
    adapter: bool,
    /// With loss and gradient by hand for every token, instead of the loss alone
    #[arg(long, conflicts_with = "adapter")]
    token_level: bool,
    /// In C: one file beside the header, built by the system's compiler
    #[arg(long, conflicts_with_all = ["adapter", "token_level", "core"])]
    c: bool,
    /// Folder in which the plugin's folder is made
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Where uft-core is: a folder or a published version. By default the source that this program was
    /// built from
    #[arg(long, value_name = "DIR|VERSION")]
    core: Option<String>,
    /// Model of the example run; by default the one beside uft-core
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
}

/// What a template has in the place of the plugin's name, its type and what it refers to.
const NAME: &str = "my-plugin";
const TYPE: &str = "MyPlugin";
const CORE: &str = r#"{ path = "path/of/uft-core" }"#;
const MODEL: &str = r#""path/of/a/model""#;
/// Where cargo puts the library; in C it is beside its source.
const BUILT: &str = "target/debug";
/// In C, its file without the ending, and the library's.
const FILE: &str = "my_plugin";
const LIBRARY: &str = "path/of/the/library";

/// The files of a kind of plugin, beside those that all have.
struct Template<'a> {
    source: &'a str,
    run: &'a str,
    example: &'a str,
}

macro_rules! template {
    ($folder:literal, $source:literal) => {
        Template {
            source: include_str!(concat!("../../../templates/", $source)),
            run: include_str!(concat!("../../../templates/", $folder, "/run.toml")),
            example: include_str!(concat!("../../../templates/", $folder, "/example.jsonl")),
        }
    };
}

const OBJECTIVE: Template<'static> = template!("objective", "objective/lib.rs");
const TOKEN_LEVEL: Template<'static> = template!("token-level", "token-level/lib.rs");
const ADAPTER: Template<'static> = template!("adapter", "adapter/lib.rs");
const IN_C: Template<'static> = template!("objective", "c/objective.c");
const MANIFEST: &str = include_str!("../../../templates/Cargo.toml.txt");
const IGNORED: &str = include_str!("../../../templates/gitignore.txt");

/// Makes the folder.
///
/// # Errors
/// If the name cannot be one, the folder is there already, or uft-core is not where it should be.
pub fn run(args: &NewArgs) -> Result<()> {
    let template = match (args.adapter, args.token_level, args.c) {
        (true, ..) => ADAPTER,
        (_, true, _) => TOKEN_LEVEL,
        (.., true) => IN_C,
        (false, false, false) => OBJECTIVE,
    };
    let name = args.name.as_str();
    let type_name = type_name(name, template.source)?;
    let (core, source) = match core(args.core.as_deref()) {
        // An objective in C needs nothing of it.
        Err(_) if args.c => (String::new(), None),
        found => found?,
    };
    let model = model(args.model.as_deref(), source.as_deref())?;

    let folder = args.dir.join(name);
    if folder.exists() {
        let folder = folder.display();
        return Err(Error::config(format!(
            "{folder} is there already; choose another name or another --dir"
        )));
    }
    let template = Template {
        source: &template.source.replace(NAME, name).replace(TYPE, &type_name),
        run: &template.run.replace(NAME, name).replace(MODEL, &model),
        ..template
    };
    let made = if args.c { in_c(name, &template) } else { in_rust(name, &template, &core) };
    for (file, text) in &made.files {
        write(&folder.join(file), text)?;
    }
    write(&folder.join("example.jsonl"), template.example)?;
    print(&format!(
        "{folder}: a plugin that works as it is; next\n\n  cd {folder}\n  {build}\n  \
         uft plugin check {name} --plugin-dir {built}\n  uft train run.toml\n\n\
         then write your own into {source} (docs/plugins.md)\n",
        folder = folder.display(),
        build = made.build.join("\n  "),
        built = made.built,
        source = made.source,
    ))
}

/// What is to be written, and what a reader has to know of it.
struct Made {
    files: Vec<(String, String)>,
    /// The file that is to be changed.
    source: String,
    /// The commands that build it, and the folder in which the library is then.
    build: Vec<String>,
    built: &'static str,
}

fn in_rust(name: &str, template: &Template, core: &str) -> Made {
    let source = "src/lib.rs".to_owned();
    let files = vec![
        (source.clone(), template.source.to_owned()),
        ("Cargo.toml".to_owned(), MANIFEST.replace(NAME, name).replace(CORE, core)),
        (".gitignore".to_owned(), IGNORED.to_owned()),
        ("run.toml".to_owned(), template.run.to_owned()),
    ];
    let build = ["cargo test", "cargo build"].map(str::to_owned).into();
    Made { files, source, build, built: BUILT }
}

fn in_c(name: &str, template: &Template) -> Made {
    let (file, library) = (name.replace('-', "_"), file_name(name));
    let text = template.source.replace(FILE, &file).replace(LIBRARY, &library);
    // The source says how it is built.
    let lines = text.lines().filter_map(|line| line.strip_prefix("//     "));
    let build = lines.map(str::to_owned).collect();
    let source = format!("{file}.c");
    let files = vec![
        (source.clone(), text),
        ("uft_plugin.h".to_owned(), HEADER.to_owned()),
        (".gitignore".to_owned(), format!("/{library}\n/out\n")),
        ("run.toml".to_owned(), template.run.replace(BUILT, ".")),
    ];
    Made { files, source, build, built: "." }
}

fn write(path: &Path, text: &str) -> Result<()> {
    let fail =
        |e: std::io::Error| Error::other(format!("{}: cannot be written: {e}", path.display()));
    let folder = path.parent().expect("a file is in a folder");
    std::fs::create_dir_all(folder).and_then(|()| std::fs::write(path, text)).map_err(fail)
}

/// `una-score` → `UnaScore`.
///
/// # Errors
/// If it cannot be the name of a crate, or has a meaning already.
fn type_name(name: &str, source: &str) -> Result<String> {
    let wrong = |why: &str| Error::config(format!("the plugin cannot be called `{name}`: {why}"));
    let letter = |c: char| c.is_ascii_lowercase();
    let part = |part: &str| {
        part.starts_with(letter) && part.chars().all(|c| letter(c) || c.is_ascii_digit())
    };
    if !name.split('-').all(part) {
        return Err(wrong(
            "lower-case letters and digits, with `-` between words, each beginning with a letter",
        ));
    }
    if bundled::LIBRARIES.iter().any(|library| library.name == name) {
        return Err(wrong("a plugin that comes with uft has this name"));
    }
    if RESERVED.contains(&name) {
        return Err(wrong("the name has a meaning in Rust; add a word"));
    }
    let upper = |word: &str| word[..1].to_uppercase() + &word[1..];
    let type_name: String = name.split('-').map(upper).collect();
    let mut words = source.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    if words.any(|word| word == type_name) {
        return Err(wrong(&format!(
            "its type would be `{type_name}`, which has a meaning; add a word"
        )));
    }
    Ok(type_name)
}

/// Names that cargo or the compiler do not take for a crate.
const RESERVED: [&str; 48] = [
    "abstract",
    "alloc",
    "as",
    "async",
    "await",
    "become",
    "box",
    "break",
    "build",
    "const",
    "continue",
    "core",
    "crate",
    "deps",
    "do",
    "dyn",
    "else",
    "enum",
    "examples",
    "extern",
    "false",
    "final",
    "fn",
    "for",
    "gen",
    "if",
    "impl",
    "in",
    "incremental",
    "let",
    "loop",
    "macro",
    "match",
    "mod",
    "move",
    "mut",
    "override",
    "priv",
    "proc-macro",
    "pub",
    "ref",
    "return",
    "self",
    "std",
    "super",
    "test",
    "uft",
    "uft-core",
];

/// uft-core as a dependency, and its folder if it is one.
///
/// # Errors
/// If there is no uft-core.
fn core(given: Option<&str>) -> Result<(String, Option<PathBuf>)> {
    let version = |c: &str| c.starts_with(|c: char| c.is_ascii_digit()) && !Path::new(c).is_dir();
    if let Some(version) = given.filter(|c| version(c)) {
        return Ok((toml::Value::from(version).to_string(), None));
    }
    let source = given.map_or(Path::new(env!("CARGO_MANIFEST_DIR")).join("../core"), PathBuf::from);
    let there = source.canonicalize().ok().filter(|source| source.join("src/export.rs").is_file());
    let Some(source) = there else {
        let source = source.display();
        return Err(Error::config(match given {
            Some(_) => {
                format!("--core {source}: there is no uft-core in it; give its folder or a version")
            }
            None => format!(
                "no uft-core in {source}, where this program was built; give its folder with --core"
            ),
        }));
    };
    Ok((format!("{{ path = {} }}", quoted(&source)), Some(source)))
}

/// The model of the example run, as a text of TOML.
///
/// # Errors
/// If it is not there.
fn model(given: Option<&Path>, core: Option<&Path>) -> Result<String> {
    let beside = core.and_then(|core| Some(core.parent()?.join("examples/base")));
    let model = match (given, beside.filter(|model| model.is_dir())) {
        (Some(model), _) => model.canonicalize().map_err(|e| {
            Error::config(format!("--model {}: it cannot be found: {e}", model.display()))
        })?,
        (None, Some(model)) => model,
        (None, None) => {
            return Err(Error::config(
                "there is no example model beside uft-core; give a model's folder with --model",
            ));
        }
    };
    Ok(quoted(&model))
}

/// A path as a text of TOML.
fn quoted(path: &Path) -> String {
    toml::Value::from(path.display().to_string()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_be_are_refused_in_words() {
        assert_eq!(type_name("focal-loss2", OBJECTIVE.source).unwrap(), "FocalLoss2");
        for (name, says) in [
            ("Focal", "lower-case letters"),
            ("focal-2loss", "lower-case letters"),
            ("", "lower-case letters"),
            ("a--b", "lower-case letters"),
            ("../a", "lower-case letters"),
            ("kto", "comes with uft"),
            ("match", "a meaning in Rust"),
            ("batch", "its type would be `Batch`"),
        ] {
            let why = type_name(name, OBJECTIVE.source).unwrap_err().message;
            assert!(why.contains(says), "{name}: {why}");
        }
    }

    #[test]
    fn the_core_is_a_folder_or_a_version() {
        assert_eq!(core(Some("0.1.0")).unwrap(), ("\"0.1.0\"".into(), None));
        assert!(core(Some("/")).unwrap_err().message.contains("no uft-core in it"));
        let (dependency, source) = core(None).unwrap();
        assert!(
            source.unwrap().join("Cargo.toml").is_file() && dependency.starts_with("{ path = \"/")
        );
    }
}

//! The plugins that come with `uft`: the one list of them.
//!
//! Adding one means a folder beside this one, a line in this crate's manifest, which gets it built
//! with the host, and a line here, which lets `plugin = "ipo"` find the library that has it
//! (docs/plugins.md has the whole recipe). Nothing is linked, and no folder is scanned.

#![warn(missing_docs)]

/// A library with the names that it exports.
pub struct Library {
    /// As `[plugins] load` and `uft plugin list` name it.
    pub name: &'static str,
    /// Its objectives and adapters.
    pub entries: &'static [&'static str],
}

/// In the order of the table in plugins/README.md: adapters, then objectives.
pub const LIBRARIES: [Library; 16] = [
    Library { name: "demonstrations", entries: &["demonstrations"] },
    Library { name: "scores", entries: &["scores"] },
    Library { name: "labels", entries: &["labels"] },
    Library { name: "preferences", entries: &["preferences"] },
    Library {
        name: "datasets",
        entries: &["ultrafeedback", "rankings", "oasst", "hh-rlhf", "tool-calls"],
    },
    Library { name: "sft", entries: &["sft"] },
    Library { name: "uft-sft", entries: &["uft-sft"] },
    Library { name: "una-score", entries: &["una-score"] },
    Library { name: "una-binary", entries: &["una-binary"] },
    Library { name: "una-pairwise", entries: &["una-pairwise"] },
    Library { name: "kto", entries: &["kto"] },
    Library {
        name: "pairwise",
        entries: &[
            "robust-dpo",
            "hinge",
            "exo",
            "ipo",
            "ln-dpo",
            "dpop",
            "apo-down",
            "rpo",
            "simpo",
            "cpo",
            "orpo",
        ],
    },
    Library { name: "ld-dpo", entries: &["ld-dpo"] },
    Library { name: "aot", entries: &["aot", "aot-unpaired"] },
    Library { name: "groupwise", entries: &["info-nca", "nca", "sppo", "apo-zero"] },
    Library { name: "pointwise", entries: &["bco", "ulma"] },
];

/// The library that exports an objective or adapter.
pub fn library_of(entry: &str) -> Option<&'static str> {
    LIBRARIES.iter().find(|library| library.entries.contains(&entry)).map(|library| library.name)
}

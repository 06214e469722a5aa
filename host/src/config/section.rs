//! `section!`: a config section is one struct whose doc comments are its documentation, whose
//! defaults are its defaults, and whose keys are the only ones accepted.

/// One key of a section.
pub struct Key {
    pub name: &'static str,
    /// The doc comment, one entry per line.
    pub doc: &'static [&'static str],
}

/// A section as the documentation shows it.
pub struct SectionDoc {
    /// The header in TOML: `[train]` or `[[data]]`.
    pub header: &'static str,
    pub doc: &'static [&'static str],
    pub keys: &'static [Key],
    /// The defaults; keys without one are absent.
    pub defaults: toml::Table,
}

/// Declares a section: `struct Name = "[header]" { /// doc  key: Type = default, … }`.
macro_rules! section {
    (
        $(#[doc = $doc:literal])*
        struct $name:ident = $header:literal {
            $( $(#[doc = $key_doc:literal])* $key:ident : $type:ty = $default:expr, )*
        }
    ) => {
        $(#[doc = $doc])*
        #[derive(Clone, Debug, PartialEq, serde::Deserialize, serde::Serialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $( $(#[doc = $key_doc])* pub $key: $type, )*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $key: $default, )* }
            }
        }

        impl $name {
            /// What the documentation says of this section.
            pub fn documentation() -> $crate::config::section::SectionDoc {
                $crate::config::section::SectionDoc {
                    header: $header,
                    doc: &[$($doc),*],
                    keys: &[$( $crate::config::section::Key {
                        name: stringify!($key),
                        doc: &[$($key_doc),*],
                    } ),*],
                    defaults: toml::Table::try_from(Self::default())
                        .expect("a section's defaults are a TOML table"),
                }
            }
        }
    };
}

pub(super) use section;

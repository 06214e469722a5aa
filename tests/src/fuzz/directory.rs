//! Inputs that are one file of a directory whose other files are valid.

use std::path::Path;

/// The files of a valid directory. The first byte of an input says which of them the rest replaces.
pub struct Directory(pub Vec<(&'static str, Vec<u8>)>);

impl Directory {
    /// Writes the files to `dir`, one of them replaced by the input.
    pub fn write(&self, dir: &Path, input: &[u8]) {
        let (first, rest) = input.split_first().unwrap_or((&0, &[]));
        let replaced = usize::from(*first) % self.0.len();
        for (index, (name, valid)) in self.0.iter().enumerate() {
            let bytes = if index == replaced { rest } else { valid };
            std::fs::write(dir.join(name), bytes).expect("a file in a temporary folder");
        }
    }

    /// For every file the input that leaves it as it is.
    pub fn seeds(&self) -> Vec<Vec<u8>> {
        let seed = |(index, (_, valid)): (usize, &(_, Vec<u8>))| {
            let index = u8::try_from(index).expect("few files");
            [&[index], valid.as_slice()].concat()
        };
        self.0.iter().enumerate().map(seed).collect()
    }

    /// For one file the input that puts `text` in its place.
    pub fn seed(&self, name: &str, text: &str) -> Vec<u8> {
        let index = self.0.iter().position(|(n, _)| *n == name).expect("a file of the directory");
        [&[u8::try_from(index).expect("few files")], text.as_bytes()].concat()
    }
}

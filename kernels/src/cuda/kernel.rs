//! Which kernels there are: sources that are part of this program, and the constants they are compiled
//! with.

use super::{Error, Result};

/// A `.cu` file and those that it includes besides device.cuh. Several kernels may be in it.
pub struct Source {
    /// The file's name, for messages.
    pub name: &'static str,
    pub text: &'static str,
    /// Name and text.
    pub headers: &'static [(&'static str, &'static str)],
}

/// A source's kernel with its constants, which are macros: `HEAD_DIM` = 64.
#[derive(Clone, Copy)]
pub struct Kernel {
    pub source: &'static Source,
    pub name: &'static str,
    /// Threads of a block, at most as many as `KERNEL(threads)` says.
    pub threads: u32,
    defines: [Option<(&'static str, i64)>; 8],
}

/// What every kernel includes.
const HEADER: (&str, &str) = ("device.cuh", include_str!("device.cuh"));

/// For sources that use what only Hopper has.
pub const HOPPER: (&str, &str) = ("hopper.cuh", include_str!("hopper.cuh"));

/// For those of them in which warpgroups multiply; includes [`HOPPER`].
pub const HOPPER_PRODUCTS: (&str, &str) =
    ("hopper_products.cuh", include_str!("hopper_products.cuh"));

/// For sources that work at tiles, or at eight numbers at a time.
pub(crate) const TILE: (&str, &str) = ("tile.cuh", include_str!("tile.cuh"));

impl PartialEq for Kernel {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && self.module().key() == other.module().key()
    }
}

impl Kernel {
    pub const fn new(source: &'static Source, name: &'static str, threads: u32) -> Self {
        Self { source, name, threads, defines: [None; 8] }
    }

    /// With one more constant, of eight at most.
    pub const fn define(mut self, name: &'static str, value: i64) -> Self {
        let mut slot = 0;
        while self.defines[slot].is_some() {
            slot += 1;
        }
        self.defines[slot] = Some((name, value));
        self
    }

    /// Name and value of every constant.
    pub fn defines(&self) -> impl Iterator<Item = (&'static str, i64)> + '_ {
        self.defines.iter().flatten().copied()
    }

    /// What tells compiled modules apart; kernels of one source with the same constants share one.
    pub(super) fn module(&self) -> Module {
        Module { source: self.source, defines: self.defines }
    }

    /// For messages and tables: `attention_forward HEAD_DIM=64`.
    pub fn label(&self) -> String {
        let defines = self.defines().map(|(name, value)| format!(" {name}={value}"));
        format!("{}{}", self.name, defines.collect::<String>())
    }
}

/// A kernel as its source declares it: name, threads of a block and blocks of a cluster as they are written there.
pub(super) struct Declared {
    pub name: &'static str,
    pub threads: &'static str,
    pub cluster: &'static str,
}

/// A source with its constants: what a compiler makes one file of.
#[derive(Clone, Copy)]
pub(super) struct Module {
    pub source: &'static Source,
    pub(super) defines: [Option<(&'static str, i64)>; 8],
}

impl Module {
    /// Identity of the text and its constants.
    pub fn key(&self) -> (*const u8, [Option<(&'static str, i64)>; 8]) {
        (self.source.text.as_ptr(), self.defines)
    }

    /// Another source with the same constants.
    #[cfg(test)]
    pub fn of(&self, source: &'static Source) -> Self {
        Self { source, defines: self.defines }
    }

    /// `-DNAME=VALUE` for every constant.
    pub fn options(&self) -> Vec<String> {
        let defines = self.defines.iter().flatten();
        defines.map(|(name, value)| format!("-D{name}={value}")).collect()
    }

    /// Every file that is included, with its text, but for those of the emulation.
    pub fn headers(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        [HEADER].into_iter().chain(self.source.headers.iter().copied())
    }

    /// The name without `.cu`.
    pub fn stem(&self) -> &'static str {
        self.source.name.trim_end_matches(".cu")
    }

    /// All that a compiled file depends on, but for the compiler.
    pub fn text(&self) -> String {
        let mut all = self.options().join(" ");
        for (name, text) in self.headers().chain([(self.source.name, self.source.text)]) {
            all += &format!("\n// {name}: {} bytes\n{text}", text.len());
        }
        all
    }

    /// The source's kernels.
    ///
    /// # Errors
    /// There is none.
    pub fn kernels(&self) -> Result<Vec<Declared>> {
        let mut found = Vec::new();
        for line in self.source.text.split('\n').map(str::trim_start) {
            let of_hopper = line.strip_prefix("HOPPER_KERNEL(");
            let Some(rest) = of_hopper.or(line.strip_prefix("KERNEL(")) else { continue };
            let declared = rest.split_once(") ").and_then(|(size, rest)| {
                let name = rest.split_once('(')?.0.trim();
                let (threads, cluster) = match of_hopper {
                    Some(_) => size.split_once(',')?,
                    None => (size, "1"),
                };
                Some(Declared { name, threads: threads.trim(), cluster: cluster.trim() })
            });
            let Some(declared) = declared else {
                let message =
                    "a kernel is declared as KERNEL(threads) name(parameters), in one line up to (";
                return Err(Error::Failed(format!("{}: {message}: {line}", self.source.name)));
            };
            found.push(declared);
        }
        if found.is_empty() {
            return Err(Error::Failed(format!(
                "{}: no line begins with KERNEL(",
                self.source.name
            )));
        }
        Ok(found)
    }
}

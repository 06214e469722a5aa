//! Faults put into a kernel's source, to prove that its tests see them.

use super::kernel::{Module, Source};

/// A piece of text that becomes another. It must be there exactly once: a fault that no longer applies
/// fails the test that it is for.
pub(crate) struct Fault {
    /// Of the source, or of one of its headers: `rmsnorm.cu`.
    pub file: &'static str,
    pub from: &'static str,
    pub to: &'static str,
}

impl Fault {
    /// The module with the fault, if there is one for its files.
    pub(super) fn planted(fault: Option<&Self>, module: &Module) -> Module {
        let source = module.source;
        let Some(fault) = fault else { return *module };
        let mut text = source.text;
        let mut headers = source.headers.to_vec();
        let files = headers.iter_mut().map(|(name, text)| (*name, text));
        for (name, text) in files.chain([(source.name, &mut text)]) {
            if name == fault.file {
                let times = text.matches(fault.from).count();
                assert!(times == 1, "{:?} is in {name} {times} times, not once", fault.from);
                *text = text.replacen(fault.from, fault.to, 1).leak();
            }
        }
        let source = Source { name: source.name, text, headers: headers.leak() };
        module.of(Box::leak(Box::new(source)))
    }
}

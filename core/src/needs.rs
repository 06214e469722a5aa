//! What an objective asks for and which feedback it takes: open bit sets, so that a later
//! revision can add a bit without a new ABI. The host refuses bits that it does not know.

use crate::sample::Kind;
use abi_stable::StableAbi;
use std::ops::BitOr;

/// What the host must prepare for an objective.
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs(pub u64);

impl Needs {
    /// Log-probs of the policy are enough.
    pub const NOTHING: Needs = Needs(0);
    /// Log-probs of the reference model for every trained token.
    pub const REFERENCE: Needs = Needs(1);
    /// Every group holds at least one chosen and one rejected response.
    pub const PAIRS: Needs = Needs(1 << 1);
    /// Every group holds at least two responses, all of them in the same batch.
    pub const GROUPS: Needs = Needs(1 << 2);
    /// Log-ratios of mismatched completions (prompt i with the completion of another group) over
    /// the whole step, in [`Step::mismatched`](crate::batch::Step::mismatched). Implies
    /// [`REFERENCE`](Needs::REFERENCE).
    pub const MISMATCHED: Needs = Needs(1 << 3);
    /// The log-ratio of every segment of the whole step before the first call, in
    /// [`Step::log_ratios`](crate::batch::Step::log_ratios): batch statistics, sorting. Implies
    /// [`REFERENCE`](Needs::REFERENCE).
    pub const STEP_LOG_RATIOS: Needs = Needs(1 << 4);
    /// The number of trained tokens of each response has a meaning for the loss.
    pub const TOKEN_COUNTS: Needs = Needs(1 << 5);
    /// Log-probs per token have a meaning, not only their sum over the response.
    pub const TOKEN_LOGPS: Needs = Needs(1 << 6);
    /// The objective has state that a checkpoint must keep.
    pub const STATE: Needs = Needs(1 << 7);
    /// Kind, group, log-prob and log-ratio of every segment of the whole step before the first call,
    /// from [`Step::responses`](crate::batch::Step::responses): where the loss of a response
    /// depends on those of other batches. Implies [`STEP_LOG_RATIOS`](Needs::STEP_LOG_RATIOS).
    pub const STEP_RESPONSES: Needs = Needs(1 << 8);

    /// Every need with its name, in the order of the bits.
    pub const ALL: [(Needs, &'static str); 9] = [
        (Needs::REFERENCE, "reference"),
        (Needs::PAIRS, "pairs"),
        (Needs::GROUPS, "groups"),
        (Needs::MISMATCHED, "mismatched completions"),
        (Needs::STEP_LOG_RATIOS, "log-ratios of the whole step"),
        (Needs::TOKEN_COUNTS, "token counts"),
        (Needs::TOKEN_LOGPS, "per-token log-probs"),
        (Needs::STATE, "saved state"),
        (Needs::STEP_RESPONSES, "responses of the whole step"),
    ];

    /// These needs and what they imply: responses have log-ratios, and those need a reference.
    pub fn complete(self) -> Needs {
        let any = |needs: Needs, of: Needs| needs.0 & of.0 != 0;
        let mut all = self;
        if any(all, Needs::STEP_RESPONSES) {
            all = all | Needs::STEP_LOG_RATIOS;
        }
        if any(all, Needs::MISMATCHED | Needs::STEP_LOG_RATIOS) {
            all = all | Needs::REFERENCE;
        }
        all
    }

    /// Whether all of `other` are among these.
    pub fn contains(self, other: Needs) -> bool {
        self.0 & other.0 == other.0
    }

    /// The bits that this revision has no name for.
    pub fn unknown(self) -> u64 {
        self.0 & !Self::ALL.iter().fold(0, |bits, (need, _)| bits | need.0)
    }

    /// The names of those that this revision knows.
    pub fn names(self) -> Vec<&'static str> {
        Self::ALL.iter().filter(|(need, _)| self.contains(*need)).map(|(_, name)| *name).collect()
    }
}

impl BitOr for Needs {
    type Output = Needs;
    fn bitor(self, other: Needs) -> Needs {
        Needs(self.0 | other.0)
    }
}

/// A set of feedback kinds.
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kinds(pub u64);

impl Kinds {
    /// [`Kind::Demonstration`].
    pub const DEMONSTRATION: Kinds = Kinds(1);
    /// [`Kind::Score`].
    pub const SCORE: Kinds = Kinds(1 << 1);
    /// [`Kind::Binary`].
    pub const BINARY: Kinds = Kinds(1 << 2);
    /// [`Kind::Chosen`].
    pub const CHOSEN: Kinds = Kinds(1 << 3);
    /// [`Kind::Rejected`].
    pub const REJECTED: Kinds = Kinds(1 << 4);
    /// Chosen and rejected.
    pub const PAIR: Kinds = Kinds((1 << 3) | (1 << 4));

    /// The set of one kind.
    pub fn of(kind: Kind) -> Kinds {
        Kinds(1 << kind as u64)
    }

    /// Whether all of `other` are among these.
    pub fn contains(self, other: Kinds) -> bool {
        self.0 & other.0 == other.0
    }

    /// The names of those that this revision knows.
    pub fn names(self) -> Vec<&'static str> {
        Kind::ALL
            .iter()
            .filter(|kind| self.contains(Kinds::of(**kind)))
            .map(|kind| kind.name())
            .collect()
    }
}

impl BitOr for Kinds {
    type Output = Kinds;
    fn bitor(self, other: Kinds) -> Kinds {
        Kinds(self.0 | other.0)
    }
}

//! Objectives that are a mean over responses of a loss of the response alone.
//!
//! | objective | module |
//! |---|---|
//! | `bco` | [`bco`]: the cross-entropy of thumbs, around a running mean of the rewards |
//! | `ulma` | [`ulma`]: demonstrations by their likelihood, all else by its reward |
//!
//! UNA's and KTO's, of the same sort, are crates of their own.

mod bco;
mod ulma;

use bco::Bco;
use ulma::Ulma;

uft_core::plugin! { objectives: [Bco, Ulma] }

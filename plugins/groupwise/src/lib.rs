//! Objectives that are a mean over prompts of a loss of all responses to the prompt.
//!
//! | objective | module |
//! |---|---|
//! | `info-nca`, `nca` | [`contrast`]: which of K responses is the good one? |
//! | `sppo`, `apo-zero` | [`anchor`]: each response by itself, summed over the prompt's |
//!
//! All take preference pairs, which are groups of two, and what else the module says. Notation:
//! `d = log pi(y|x) - log pi_ref(y|x)` in nats, `r = beta * d`.

mod anchor;
mod contrast;

use anchor::{ApoZero, Sppo};
use contrast::{InfoNca, Nca};
use uft_core::prelude::*;

fn beta(params: &mut Params, default: f64) -> f64 {
    params.number("beta", default, Bound::Positive, "scale of the implicit reward")
}

uft_core::plugin! { objectives: [InfoNca, Nca, Sppo, ApoZero] }

#[cfg(test)]
mod tests {
    use super::*;
    use uft_core::check::{Case, Evaluated};

    /// Responses of one token to one prompt, with their log-ratios.
    pub fn group(responses: &[(Feedback, f32)]) -> Case {
        let tokens: Vec<[f32; 1]> = responses.iter().map(|(_, ratio)| [ratio - 9.0]).collect();
        let with_logps = responses.iter().zip(&tokens);
        let listed: Vec<(Feedback, &[f32], &[f32])> =
            with_logps.map(|((f, _), logp)| (*f, logp.as_slice(), [-9.0].as_slice())).collect();
        Case::new().group(&listed)
    }

    pub fn pair(chosen: f32, rejected: f32) -> Case {
        group(&[
            (Feedback::Chosen(None.into()), chosen),
            (Feedback::Rejected(None.into()), rejected),
        ])
    }

    pub fn on<T: Objective>(case: &Case, params: &str) -> Evaluated {
        case.on::<T>(params).unwrap()
    }
}

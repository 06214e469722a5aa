//! The arithmetic of `uft`: forward and backward of every op that a decoder with LoRA adapters needs.
//!
//! One file per op, each a lesson of its own: the formula, the contract, the two directions next to
//! each other, the tests. Nothing here knows a language model, an adapter's bookkeeping or a loss.
//!
//! Conventions, the same in every file:
//! * `f32`, row-major; a weight is stored as in safetensors, `[out, in]`.
//! * T tokens (rows of a packed batch), H hidden width, V vocabulary, D head_dim, r rank.
//! * An output is overwritten (`=`, never read, so it may hold anything) unless its doc says that it
//!   is accumulated (`+=`).
//! * A shape that does not fit is a mistake of the caller and panics with the shapes in the message.
//! * The same input on the same number of threads gives the same bits: every sum has a fixed order,
//!   and there are no atomics. Work runs on rayon's current pool.

pub mod adamw;
pub mod attention;
pub mod cuda;
pub mod elementwise;
pub mod embedding;
pub mod layout;
pub mod logprob;
pub mod matmul;
pub mod memory;
pub mod rmsnorm;
pub mod rope;
pub mod swiglu;

mod math;
pub mod parallel;
#[cfg(test)]
mod testing;

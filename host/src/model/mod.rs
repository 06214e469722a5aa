//! The decoder: configuration, weights, LoRA, forward and backward.
//!
//! What is computed stands here, how it is computed in `uft_kernels`. A batch of packed groups
//! ([`Packed`]) goes through [`Model::logps`] or [`Model::forward`] to one log-prob per trained
//! token; [`Model::backward`] takes the loss's derivative to those and adds to [`Gradients`].

pub mod config;
pub mod cuda;
pub mod device;
pub mod files;
pub mod generate;
pub mod inference;
pub mod lora;
pub mod memory;
pub mod merge;
pub mod packed;
pub mod peft;
pub mod targets;
pub mod trained;

mod buffers;
mod decoder;
mod engine;
mod frozen;
mod json;
mod layer;
mod linear;
mod rope;
mod shards;
mod weights;

pub use config::{Family, ModelConfig};
pub use decoder::{Decoder, Options};
pub use device::Device;
pub use engine::{Logps, Model, Tape};
pub use generate::{Generator, SampleOptions};
pub use inference::{Forward, Inference};
pub use lora::{Adapter, Lora, LoraConfig, LoraGrads};
pub use packed::Packed;
pub use trained::{Adapters, Gradients, Moments};

#[cfg(test)]
mod tests;

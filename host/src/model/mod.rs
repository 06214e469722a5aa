//! The decoder: configuration, weights, LoRA, forward and backward.

//! The shapes of a step.

use uft_kernels::attention::Heads;

/// See [`MISTRAL_7B`].
#[derive(Clone, Copy)]
pub struct Sizes {
    /// Rows of a step, in texts of `text` tokens.
    pub tokens: usize,
    pub text: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub heads: Heads,
    pub rank: usize,
    pub vocab: usize,
    /// The largest vocabulary, and how many tokens are looked up in it.
    pub large_vocab: usize,
    pub large_vocab_tokens: usize,
    /// Tokens of which the head has logits at a time.
    pub head_tokens: usize,
    /// Side of the square product that ceilings are measured with.
    pub square: usize,
    /// Bytes of the copy that ceilings are measured with.
    pub copied: usize,
    /// Numbers of all adapters.
    pub trained: usize,
}

/// Mistral-7B, rank 16 on all linear layers, 16k tokens packed at 4096.
pub const MISTRAL_7B: Sizes = Sizes {
    tokens: 16_384,
    text: 4096,
    hidden: 4096,
    intermediate: 14_336,
    heads: Heads { heads: 32, kv_heads: 8, head_dim: 128 },
    rank: 16,
    vocab: 32_000,
    large_vocab: 152_064,
    large_vocab_tokens: 2048,
    head_tokens: 1024,
    square: 8192,
    copied: 4 << 30,
    trained: 41_943_040,
};

/// What the emulation gets through in seconds.
pub const SMALL: Sizes = Sizes {
    tokens: 96,
    text: 48,
    hidden: 64,
    intermediate: 136,
    heads: Heads { heads: 4, kv_heads: 2, head_dim: 16 },
    rank: 16,
    vocab: 200,
    large_vocab: 333,
    large_vocab_tokens: 24,
    head_tokens: 16,
    square: 64,
    copied: 4096,
    trained: 9000,
};

/// The least for which every kernel of Hopper's is taken.
pub const SMALL_ON_HOPPER: Sizes = Sizes {
    hidden: 128,
    intermediate: 1024,
    heads: Heads { heads: 4, kv_heads: 2, head_dim: 64 },
    square: 128,
    ..SMALL
};

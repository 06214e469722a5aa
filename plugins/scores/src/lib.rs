//! Feedback adapter: responses with an explicit score

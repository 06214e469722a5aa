//! Feedback adapter: chosen and rejected responses to one prompt

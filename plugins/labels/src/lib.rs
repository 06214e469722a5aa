//! Feedback adapter: responses with a thumbs-up or thumbs-down label

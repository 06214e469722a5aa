//! Feedback adapter: conversations and prompt/completion rows as demonstrations

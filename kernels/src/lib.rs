//! The arithmetic of `uft`.

//! From samples to token groups.

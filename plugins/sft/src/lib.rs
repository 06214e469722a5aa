//! Objective: supervised fine-tuning, the negative log-likelihood per token

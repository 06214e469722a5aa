//! Objective: preference pairs on the implicit reward (UNA-pairwise, DPO)

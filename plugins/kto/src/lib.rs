//! Objective: Kahneman-Tversky optimisation on thumbs up and down

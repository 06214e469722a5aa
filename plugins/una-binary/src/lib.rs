//! Objective: thumbs up and down on the implicit score (UNA)

//! Objective: the implicit score meets the explicit one (UNA)

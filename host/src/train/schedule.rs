//! The learning rate over the steps, as transformers' schedulers have it.

use crate::config::Schedule;

/// Learning rate of optimizer step `step` (from 0) of `steps`, warm-up steps included.
///
/// During the warm-up the rate rises linearly from 0, so that with a warm-up the first step moves
/// nothing; this is what `get_cosine_schedule_with_warmup` and its siblings do.
pub fn learning_rate(schedule: Schedule, peak: f64, step: u64, steps: u64, warmup: u64) -> f64 {
    if step < warmup {
        return peak * step as f64 / warmup as f64;
    }
    let progress = (step - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
    peak * match schedule {
        Schedule::Constant => 1.0,
        Schedule::Linear => (1.0 - progress).max(0.0),
        Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos()),
    }
}

/// Warm-up steps: a share of the steps (rounded up, as transformers does) if below 1, otherwise a
/// number.
pub fn warmup_steps(warmup: f64, steps: u64) -> u64 {
    let warmup = if warmup < 1.0 { (warmup * steps as f64).ceil() } else { warmup.round() };
    (warmup as u64).min(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_to_the_peak_and_falls_to_nothing() {
        let rate = |schedule, step| learning_rate(schedule, 2.0, step, 110, 10);
        assert_eq!(rate(Schedule::Cosine, 0), 0.0);
        assert_eq!(rate(Schedule::Linear, 5), 1.0);
        assert_eq!(rate(Schedule::Cosine, 10), 2.0);
        assert!((rate(Schedule::Cosine, 60) - 1.0).abs() < 1e-12);
        assert!((rate(Schedule::Linear, 60) - 1.0).abs() < 1e-12);
        assert_eq!(rate(Schedule::Constant, 109), 2.0);
        assert!(rate(Schedule::Cosine, 110) < 1e-12);
    }

    #[test]
    fn a_warm_up_is_a_share_or_a_number() {
        assert_eq!(warmup_steps(0.1, 25), 3);
        assert_eq!(warmup_steps(7.0, 25), 7);
        assert_eq!(warmup_steps(0.0, 25), 0);
        assert_eq!(warmup_steps(50.0, 25), 25);
    }
}

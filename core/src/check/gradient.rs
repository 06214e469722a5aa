//! The gradient of an objective against difference quotients of its loss.

use super::case::Case;
use super::properties::{check_finite, fresh};
use super::{Make, Outcome};
use crate::needs::Needs;

/// The gradient against differences of the loss. Statistics of the step (`log_ratios`) may be
/// constants for it or move with the log-probs, but one of the two everywhere.
pub(super) fn gradient(make: Make, needs: Needs, random: &[Case], edges: &[Case]) -> Outcome {
    let mut compare = |moving: bool| {
        let mut seen = Compared::default();
        for case in random {
            let tokens: Vec<usize> = (0..case.logps.len()).collect();
            seen.case(make, case, &tokens, moving)?;
        }
        for case in edges {
            // The edges of each response; a log-prob of 0 cannot be moved both ways.
            let ends = case.segments.iter().flat_map(|s| [s.range().start, s.range().end - 1]);
            let tokens: Vec<usize> = ends.filter(|t| case.logps[*t] < -0.1).collect();
            seen.case(make, case, &tokens, moving)?;
        }
        seen.verdict()
    };
    let held = compare(false);
    if held.is_err() && needs.contains(Needs::STEP_LOG_RATIOS) {
        let moved = compare(true);
        return moved.map(|seen| format!("{seen}, through the step's log-ratios too")).or(held);
    }
    held
}

#[derive(Default)]
struct Compared {
    tokens: usize,
    /// Tokens where the loss is too rough for a difference quotient.
    unsure: usize,
    worst: f64,
}

impl Compared {
    fn case(
        &mut self,
        make: Make,
        case: &Case,
        tokens: &[usize],
        moving: bool,
    ) -> Result<(), String> {
        // What cannot be evaluated or is not finite has failed its own check.
        let Ok(seen) = fresh(make, case) else { return Ok(()) };
        if check_finite(case, &seen).is_err() {
            return Ok(());
        }
        let largest = seen.dlogp.iter().fold(0.0, |max: f64, g| max.max(f64::from(g.abs())));
        for &token in tokens {
            let mut at = |h: f32| {
                let mut case = case.clone();
                case.logps[token] += h;
                if moving {
                    case.refresh();
                }
                fresh(make, &case).map(|seen| seen.loss)
            };
            let given = f64::from(seen.dlogp[token]);
            let mut numeric = Differences::new(seen.loss, COARSE, &mut at)?;
            let mut verdict = numeric.verdict(given, largest);
            // A kink near the point is not in the way of smaller steps, if they are exact.
            if matches!(verdict, Verdict::Wrong | Verdict::Unsure) && case.logps[token].abs() < 16.0
            {
                numeric = Differences::new(seen.loss, FINE, &mut at)?;
                verdict = numeric.verdict(given, largest);
            }
            self.tokens += 1;
            match verdict {
                Verdict::Right(deviation) => self.worst = self.worst.max(deviation),
                Verdict::Subgradient => {}
                Verdict::Unsure => self.unsure += 1,
                Verdict::Wrong => {
                    let i = case.segments.iter().position(|s| s.range().contains(&token));
                    let (name, numeric, i) = (&case.name, numeric.value, i.unwrap_or_default());
                    return Err(format!(
                        "{name}, response {i}: d loss / d logp is {numeric:.6e} by central \
                     differences, given as {given:.6e}"
                    ));
                }
            }
        }
        Ok(())
    }

    fn verdict(&self) -> Outcome {
        if self.tokens == 0 || self.unsure * 4 > self.tokens {
            let (unsure, tokens) = (self.unsure, self.tokens);
            return Err(format!("the loss is too rough to differentiate ({unsure} of {tokens})"));
        }
        Ok(format!("{} tokens, worst deviation {:.0e} of the largest", self.tokens, self.worst))
    }
}

/// The largest of three steps: 2^-6, 2^-7 and 2^-8, or 2^-12, 2^-13 and 2^-14. Random log-ratios are
/// multiples of 2^-10, so a kink at one of them is at the point or beyond the smaller steps.
const COARSE: f32 = 1.0 / 64.0;
const FINE: f32 = COARSE / 64.0;

/// What the differences say of a gradient.
enum Verdict {
    /// With its deviation from them, relative to the step's largest.
    Right(f64),
    /// One of the slopes at a kink.
    Subgradient,
    /// The loss is too rough.
    Unsure,
    Wrong,
}

/// Central differences at three steps, each half the one before and exact in f32, extrapolated to 0.
struct Differences {
    value: f64,
    /// How far `value` can be off: by the last extrapolation and by rounding.
    error: f64,
    /// The rounding alone.
    rounding: f64,
    /// One-sided differences at the two smallest steps.
    sides: [(f64, f64); 2],
}

impl Differences {
    fn new(
        loss: f64,
        largest: f32,
        at: &mut dyn FnMut(f32) -> Result<f64, String>,
    ) -> Result<Self, String> {
        let mut central = [0.0; 3];
        let mut sides = [(0.0, 0.0); 3];
        for (i, h) in [largest, largest / 2.0, largest / 4.0].into_iter().enumerate() {
            let (up, down, h) = (at(h)?, at(-h)?, f64::from(h));
            central[i] = (up - down) / (2.0 * h);
            sides[i] = ((loss - down) / h, (up - loss) / h);
        }
        let [coarse, middle, fine] = central;
        let first = [(4.0 * middle - coarse) / 3.0, (4.0 * fine - middle) / 3.0];
        let value = (16.0 * first[1] - first[0]) / 15.0;
        // A loss near 0 may be the difference of terms of order 1.
        let rounding = 64.0 * f64::EPSILON * loss.abs().max(1.0) / f64::from(largest / 4.0);
        let error = 2.0 * (value - first[1]).abs() + rounding;
        Ok(Self { value, error, rounding, sides: [sides[1], sides[2]] })
    }

    /// Whether a gradient is right, in a step whose largest is `largest`.
    fn verdict(&self, given: f64, largest: f64) -> Verdict {
        let error = (given - self.value).abs();
        // Below MIN_POSITIVE a gradient may round to 0 in f32.
        let rounding = 1e-7 * largest + f64::from(f32::MIN_POSITIVE);
        let allowed = 1e-5 * self.value.abs() + rounding + self.error;
        let scale = largest.max(self.value.abs());
        if self.error > 0.01 * scale + self.rounding {
            Verdict::Unsure
        } else if error <= allowed {
            Verdict::Right(error / scale.max(f64::MIN_POSITIVE))
        } else if self.is_subgradient(given, scale, allowed) {
            Verdict::Subgradient
        } else {
            Verdict::Wrong
        }
    }

    /// At a kink of the loss every slope between those of its two sides is right. There the sides
    /// stay apart as the step shrinks; where the loss is smooth, their distance halves.
    fn is_subgradient(&self, slope: f64, scale: f64, allowed: f64) -> bool {
        let [coarse, fine] = self.sides;
        let apart = (fine.1 - fine.0).abs();
        let kink = apart > 0.75 * (coarse.1 - coarse.0).abs() && apart > 1e-4 * scale;
        // Each side extrapolated to a step of 0.
        let (left, right) = (2.0 * fine.0 - coarse.0, 2.0 * fine.1 - coarse.1);
        kink && (left.min(right) - allowed..=left.max(right) + allowed).contains(&slope)
    }
}

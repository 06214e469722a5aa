//! The link functions of preference objectives, safe for any finite argument. Those that take a
//! [`Number`] take `f64` and [`Dual64`] alike.

use num_dual::Dual64;

/// A number that a link takes: as it is, or with its derivative beside it.
pub trait Number: Copy {
    /// `f(x)`, whose derivative is `slope(x)`.
    fn through(self, f: fn(f64) -> f64, slope: fn(f64) -> f64) -> Self;
}

impl Number for f64 {
    fn through(self, f: fn(f64) -> f64, _slope: fn(f64) -> f64) -> f64 {
        f(self)
    }
}

impl Number for Dual64 {
    fn through(self, f: fn(f64) -> f64, slope: fn(f64) -> f64) -> Dual64 {
        Dual64::new(f(self.re), self.eps * slope(self.re))
    }
}

/// `1 / (1 + e^-x)`.
pub fn sigmoid<N: Number>(x: N) -> N {
    // sigmoid(-x) instead of 1 - sigmoid(x) keeps the small one of the two exact.
    x.through(logistic, |x| logistic(x) * logistic(-x))
}

fn logistic(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

/// `log(1 + e^x)`, without overflow.
pub fn softplus<N: Number>(x: N) -> N {
    x.through(|x| x.max(0.0) + (-x.abs()).exp().ln_1p(), logistic)
}

/// `log sigmoid(x)`; never `-inf` for a finite `x`.
pub fn log_sigmoid<N: Number>(x: N) -> N {
    x.through(|x| -softplus(-x), |x| logistic(-x))
}

/// `max(0, x)`; at its kink the slope is 0.
pub fn relu<N: Number>(x: N) -> N {
    x.through(|x| x.max(0.0), |x| f64::from(x > 0.0))
}

/// How far an implicit score `p = sigmoid(r)` is from its target: UNA's two discrepancies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discrepancy {
    /// `(p - s)^2` (UNA eq. 11 and 13, UFT eq. 7).
    Mse,
    /// `-s log p - (1 - s) log(1 - p)` (UNA eq. 12).
    Bce,
}

impl Discrepancy {
    /// Reads `loss = "mse" | "bce"` from the parameters; `mse` is the default.
    pub fn from_params(params: &mut crate::params::Params) -> Self {
        match params.choice(
            "loss",
            "mse",
            &["mse", "bce"],
            "discrepancy between sigmoid(r) and its target",
        ) {
            "bce" => Discrepancy::Bce,
            _ => Discrepancy::Mse,
        }
    }

    /// Loss and its derivative with respect to the reward `r`, for the target `s` in `0..=1`.
    pub fn at(self, r: f64, s: f64) -> (f64, f64) {
        // sigmoid(-r) instead of 1 - p keeps the small one of the two exact.
        let (p, q) = (sigmoid(r), sigmoid(-r));
        match self {
            Discrepancy::Mse => ((p - s).powi(2), 2.0 * (p - s) * p * q),
            Discrepancy::Bce => {
                (s * softplus(-r) + (1.0 - s) * softplus(r), s * -q + (1.0 - s) * p)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_finite_and_consistent_at_extremes() {
        for x in [-1e6, -745.5, -40.0, -1e-9, 0.0, 1e-9, 40.0, 745.5, 1e6] {
            assert!((sigmoid(x) + sigmoid(-x) - 1.0).abs() < 1e-15, "{x}");
            assert!(log_sigmoid(x).is_finite() && softplus(x).is_finite(), "{x}");
            assert!((softplus(x) - softplus(-x) - x).abs() <= 1e-15 * x.abs().max(1.0), "{x}");
        }
        assert_eq!(log_sigmoid(-1e6), -1e6);
    }

    #[test]
    fn values_at_zero_reward_are_the_step_0_oracles() {
        assert_eq!(Discrepancy::Mse.at(0.0, 1.0), (0.25, -0.25));
        let (loss, slope) = Discrepancy::Bce.at(0.0, 1.0);
        assert!((loss - std::f64::consts::LN_2).abs() < 1e-15);
        assert_eq!(slope, -0.5);
    }

    #[test]
    fn links_carry_their_derivative_along() {
        type Link = (fn(f64) -> f64, fn(Dual64) -> Dual64);
        let links: [Link; 4] =
            [(sigmoid, sigmoid), (softplus, softplus), (log_sigmoid, log_sigmoid), (relu, relu)];
        for (plain, dual) in links {
            for x in [-40.0, -3.0, -0.2, 0.1, 2.0, 40.0] {
                let seen = dual(Dual64::new(x, 2.0));
                let numeric = (plain(x + 1e-5) - plain(x - 1e-5)) / 1e-5;
                assert_eq!(seen.re, plain(x));
                assert!((seen.eps - numeric).abs() < 1e-9, "{x}: {} {numeric}", seen.eps);
            }
            for x in [-1e6, -745.5, 745.5, 1e6] {
                assert!(dual(Dual64::new(x, 1.0)).eps.is_finite(), "{x}");
            }
        }
    }

    #[test]
    fn slopes_match_central_differences() {
        for d in [Discrepancy::Mse, Discrepancy::Bce] {
            for s in [0.0, 0.3, 1.0] {
                for r in [-5.0, -0.7, 0.0, 0.4, 6.0] {
                    let h = 1e-5;
                    let numeric = (d.at(r + h, s).0 - d.at(r - h, s).0) / (2.0 * h);
                    assert!((numeric - d.at(r, s).1).abs() < 1e-9, "{d:?} {s} {r}");
                }
            }
        }
    }
}

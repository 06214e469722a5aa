//! What the vectorised loops share: a macro that compiles a loop for AVX2 as well, an exponential
//! that the compiler can turn into vector code, and reductions with a fixed order.

/// Defines functions whose bodies are compiled several times on x86-64, for the baseline, AVX2 and
/// AVX-512, and chooses at run time. A body is plain Rust over slices that the compiler vectorises. It
/// multiplies and adds separately instead of `mul_add`, so all versions give the same bits.
macro_rules! vectorised {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn portable($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    portable($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    portable($($arg),*)
                }
                if is_x86_feature_detected!("avx512f") {
                    // SAFETY: the processor has AVX-512F.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has AVX2.
                    return unsafe { avx2($($arg),*) };
                }
            }
            portable($($arg),*)
        }
    )*};
}
pub(crate) use vectorised;

/// Partial sums kept side by side in a reduction: four AVX2 registers, enough to hide the latency
/// of an addition.
const LANES: usize = 32;

/// A piece shorter than [`LANES`], filled up: cheaper than a loop over single elements.
#[inline(always)]
fn padded(rest: &[f32], filler: f32) -> [f32; LANES] {
    let mut piece = [filler; LANES];
    piece[..rest.len()].copy_from_slice(rest);
    piece
}

/// e^x within 2 ulp on the whole range of `f32`, except that results below 2^-125 become 0.
/// NaN stays NaN, +inf gives +inf and -inf gives 0.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + r + r² q(r), where q is the polynomial of
/// degree 4 with the smallest relative error in e^r (3e-9, found by Remez exchange).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const Q: [f32; 5] = [0.499_999_93, 0.166_665_21, 0.041_668_39, 0.008_368_711, 0.001_381_461_2];
    // ln 2 in two parts; the first has few enough bits that n times it is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    const LOWEST: f32 = -86.98;
    const HIGHEST: f32 = 88.722_84;

    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let q = (((Q[4] * r + Q[3]) * r + Q[2]) * r + Q[1]) * r + Q[0];
    let power = 1.0 + (r + r * r * q);
    // 2^(n - 1), because 2^128 is no f32; the missing factor comes last.
    let half_scale = f32::from_bits((rounded.to_bits() << 23).wrapping_add(126 << 23));
    let y = power * half_scale * 2.0;
    let y = if x < LOWEST { 0.0 } else { y };
    if x > HIGHEST { f32::INFINITY } else { y }
}

/// Runs `step` for every piece of some slices of one length, the last filled up with `filler`.
macro_rules! for_pieces {
    ($(($piece:ident, $slice:expr)),+; $filler:expr; $step:block) => {{
        let len = [$($slice.len()),+][0];
        let whole = len / LANES * LANES;
        let mut at = 0;
        while at < whole {
            $(let $piece: &[f32; LANES] = $slice[at..at + LANES].try_into().expect("a whole piece");)+
            $step
            at += LANES;
        }
        if whole < len {
            $(let $piece = &padded(&$slice[whole..], $filler);)+
            $step
        }
    }};
}

/// Σ a_i b_i.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let mut sums = [0.0; LANES];
    for_pieces!((a, a), (b, b); 0.0; {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    });
    sum_lanes(&sums)
}

/// Σ a_i b_i c_i.
#[inline(always)]
pub(crate) fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    assert!(a.len() == b.len() && b.len() == c.len());
    let mut sums = [0.0; LANES];
    for_pieces!((a, a), (b, b), (c, c); 0.0; {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane] * c[lane];
        }
    });
    sum_lanes(&sums)
}

/// Σ e^(x_i - shift).
#[inline(always)]
pub(crate) fn sum_exp(x: &[f32], shift: f32) -> f32 {
    let mut sums = [0.0; LANES];
    for_pieces!((x, x); f32::NEG_INFINITY; {
        for lane in 0..LANES {
            sums[lane] += exp(x[lane] - shift);
        }
    });
    sum_lanes(&sums)
}

/// Replaces every x_i by e^(x_i - shift) and returns the sum of the results, that of [`sum_exp`].
#[inline(always)]
pub(crate) fn exp_and_sum(x: &mut [f32], shift: f32) -> f32 {
    let mut sums = [0.0; LANES];
    let (pieces, rest) = x.as_chunks_mut::<LANES>();
    for x in pieces {
        for lane in 0..LANES {
            x[lane] = exp(x[lane] - shift);
            sums[lane] += x[lane];
        }
    }
    if !rest.is_empty() {
        let mut x = padded(rest, f32::NEG_INFINITY);
        for lane in 0..LANES {
            x[lane] = exp(x[lane] - shift);
            sums[lane] += x[lane];
        }
        rest.copy_from_slice(&x[..rest.len()]);
    }
    sum_lanes(&sums)
}

/// The largest x_i, or -inf of nothing. A NaN may be passed over; the exponentials that follow keep it.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut maxima = [f32::NEG_INFINITY; LANES];
    for_pieces!((x, x); f32::NEG_INFINITY; {
        for lane in 0..LANES {
            maxima[lane] = larger(maxima[lane], x[lane]);
        }
    });
    max_lane(&maxima)
}

/// Adds up the lanes, the upper half onto the lower half until one is left. A call of its own: where
/// the compiler sees the pairs of the last steps, it vectorises the loop before for two lanes.
#[inline(never)]
fn sum_lanes(lanes: &[f32; LANES]) -> f32 {
    fold(lanes, |a, b| a + b)
}

/// The largest lane, found in the way of [`sum_lanes`] and kept apart for its reason.
#[inline(never)]
fn max_lane(lanes: &[f32; LANES]) -> f32 {
    fold(lanes, larger)
}

#[inline(always)]
fn fold(lanes: &[f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = *lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = combine(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    /// Distance between two floats in units of the last place of the exact value.
    fn ulps(actual: f32, exact: f64) -> f64 {
        let unit = (exact as f32).next_up() as f64 - (exact as f32) as f64;
        (f64::from(actual) - exact).abs() / unit
    }

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0.0f64;
        // Every 97th float from -86.98 to 88.72: odd enough to meet all mantissas, quick enough to run.
        for bits in (0..=88.72f32.to_bits()).step_by(97) {
            let x = f32::from_bits(bits);
            worst = worst.max(ulps(exp(x), f64::from(x).exp()));
            if x <= 86.98 {
                worst = worst.max(ulps(exp(-x), f64::from(-x).exp()));
            }
        }
        assert!(worst < 2.0, "{worst} ulp");
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(-87.1), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert!(exp(88.72).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }

    vectorised! {
        fn all(x: &mut [f32], y: &[f32]) -> [f32; 4] {
            let product = dot(x, y);
            let top = max(x);
            let kept = sum_exp(x, top);
            [product, top, kept, exp_and_sum(x, top)]
        }
    }

    #[test]
    fn reductions_agree_with_f64_at_every_length() {
        for n in 1..140 {
            let (mut x, y) = (random(n, 1), random(n, 2));
            let before = x.clone();
            let [product, top, kept, stored] = all(&mut x, &y);
            let wide = |x: &f32| f64::from(*x);
            let exact: f64 = before.iter().zip(&y).map(|(a, b)| wide(a) * wide(b)).sum();
            assert!((f64::from(product) - exact).abs() < 1e-5 * n as f64);
            assert_eq!(top, before.iter().copied().fold(f32::MIN, f32::max));
            let exact: f64 = before.iter().map(|x| (wide(x) - wide(&top)).exp()).sum();
            assert!((f64::from(kept) / exact - 1.0).abs() < 1e-6);
            assert_eq!(kept, stored);
            assert!((f64::from(x[n / 2]) - (wide(&before[n / 2]) - wide(&top)).exp()).abs() < 1e-6);
        }
    }

    #[test]
    fn every_compilation_gives_the_same_bits() {
        let (x, y) = (random(1000, 3), random(1000, 4));
        let mut kept = x.clone();
        let [product, _, _, sum] = all(&mut kept, &y);
        assert_eq!(product.to_bits(), dot(&x, &y).to_bits());
        let mut plain = x.clone();
        assert_eq!(sum.to_bits(), exp_and_sum(&mut plain, max(&x)).to_bits());
        assert_eq!(kept, plain);
    }
}

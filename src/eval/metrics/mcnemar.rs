//! The exact test of McNemar: whether two models differ on the same examples. Only the examples on which exactly one of them is
//! right count; if the models are equally good, each such example favours either with probability ½.

use std::f64::consts::{LN_2, TAU};

/// The two-sided p-value (McNemar 1947, in its exact binomial form) for `b` examples that only the first model has right and
/// `c` that only the second has: min(1, 2 · P(X ≤ min(b, c))) with X ~ Binomial(b + c, ½), as `mcnemar(exact=True)` of
/// statsmodels. 1 if there are none.
pub(crate) fn mcnemar(b: u64, c: u64) -> f64 {
    let (least, most) = (b.min(c) as f64, b.max(c) as f64);
    // The tail in units of its largest term, P(X = min). Each term is a factor k / (n - k + 1) < 1 smaller than the one before.
    let (mut tail, mut term, mut k) = (1.0, 1.0, least);
    while k > 0.0 && term > tail * f64::EPSILON / 16.0 {
        term *= k / (most + least - k + 1.0);
        tail += term;
        k -= 1.0;
    }
    (2.0 * (ln_half_binomial(least, most) + tail.ln()).exp()).min(1.0)
}

/// ln(C(n, k) 2⁻ⁿ) with n = k + rest, by the saddle-point expansion of Loader (2000, "Fast and accurate computation of binomial
/// probabilities"), which does not lose digits to the difference of large logarithms of factorials.
fn ln_half_binomial(k: f64, rest: f64) -> f64 {
    let n = k + rest;
    if k == 0.0 || rest == 0.0 {
        return -n * LN_2;
    }
    stirling_error(n) - stirling_error(k) - stirling_error(rest) - deviance(k, rest) + 0.5 * (n / (TAU * k * rest)).ln()
}

/// k ln(2k/n) + (n - k) ln(2(n - k)/n) = n/2 · ((1 - d) ln(1 - d) + (1 + d) ln(1 + d)) with d = |n - 2k| / n.
fn deviance(k: f64, rest: f64) -> f64 {
    let n = k + rest;
    let d = (rest - k).abs() / n;
    if d < 0.1 {
        // Both terms nearly cancel: their series is Σ d²ʲ / (j(2j - 1)), and ten terms of it are exact to the last place.
        let series: f64 = (1..=10).rev().fold(0.0, |sum, j| (sum + 1.0 / f64::from(j * (2 * j - 1))) * d * d);
        return 0.5 * n * series;
    }
    // (1 - d) n/2 is the smaller count itself.
    let (small, large) = (k.min(rest), k.max(rest));
    small * (2.0 * small / n).ln() + large * d.ln_1p()
}

/// ln(n!) - ln(√(2πn) (n/e)ⁿ), the error of Stirling's formula.
fn stirling_error(n: f64) -> f64 {
    if n <= 15.0 {
        let factorial: f64 = (1..=n as u32).map(f64::from).product();
        return factorial.ln() - (n + 0.5) * n.ln() + n - 0.5 * TAU.ln();
    }
    let square = n * n;
    let series = [1.0 / 1188.0, -1.0 / 1680.0, 1.0 / 1260.0, -1.0 / 360.0, 1.0 / 12.0];
    series.iter().fold(0.0, |sum, coefficient| sum / square + coefficient) / n
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `statsmodels.stats.contingency_tables.mcnemar([[0, b], [c, 0]], exact=True).pvalue`, statsmodels 0.15.0 with scipy
    /// 1.17.1; the same as `scipy.stats.binomtest(b, b + c).pvalue`.
    #[test]
    fn values_are_those_of_statsmodels() {
        let cases = [
            (0, 0, 1.0),
            (0, 1, 1.0),
            (0, 5, 0.0625),
            (1, 5, 0.21875),
            (3, 3, 1.0),
            (4, 5, 1.0),
            (10, 25, 0.016673847800120715),
            (15, 16, 1.0),
            (59, 121, 4.4344492637551645e-06),
            (200, 200, 1.0),
            (480, 520, 0.2174482932041415),
            (900, 1300, 1.463722041926662e-17),
            (49500, 50500, 0.0015823598788515154),
        ];
        for (b, c, wanted) in cases {
            let found = mcnemar(b, c);
            assert!((found - wanted).abs() <= 1e-11 * wanted, "{b} {c}: {found:e} {wanted:e}");
            assert_eq!(found, mcnemar(c, b));
        }
    }

    /// 2 · Σ C(n, i) / 2ⁿ with Python's integers and `fractions.Fraction`, rounded once.
    #[test]
    fn values_are_those_of_exact_fractions() {
        let cases = [
            (1, 2, 1.0),
            (2, 9, 0.0654296875),
            (7, 8, 1.0),
            (8, 30, 0.0004719867429230362),
            (14, 17, 0.720100131817162),
            (16, 16, 1.0),
            (40, 61, 0.046044066929342806),
            (300, 420, 8.807756168615078e-06),
            (1000, 1001, 1.0),
            (4700, 5300, 2.0760336959207247e-09),
            (300, 900, 5.3451220728110286e-70),
            (9000, 9800, 5.604241736872194e-09),
        ];
        for (b, c, wanted) in cases {
            let found = mcnemar(b, c);
            // The error grows with |ln p|, of which the last place is lost.
            assert!(
                (found - wanted).abs() <= 4.0 * f64::EPSILON * (20.0 - wanted.ln()) * wanted,
                "{b} {c}: {found:e} {wanted:e}"
            );
        }
    }

    #[test]
    fn no_count_is_too_large() {
        assert_eq!(mcnemar(0, u64::MAX), 0.0);
        assert!((mcnemar(1 << 40, 1 << 40) - 1.0).abs() < 1e-9);
    }
}

//! A proportion, such as an accuracy, with Wilson's score interval. Unlike the normal approximation it stays within 0 and 1 and
//! has a width at 0 of n and at n of n.

use super::interval::Interval;

/// The 97.5th percentile of the standard normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// `hits` of `of` trials.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Share {
    /// How many trials succeeded.
    pub(crate) hits: u64,
    /// How many trials there were.
    pub(crate) of: u64,
}

impl Share {
    /// The share and its interval at 95 % (Wilson 1927), with p = hits / n and z the 97.5th percentile of the normal
    /// distribution:
    ///
    /// ```text
    /// (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n)
    /// ```
    ///
    /// `None` without trials, or if there are more hits than trials.
    pub(crate) fn wilson(self) -> Option<Interval> {
        if self.of == 0 || self.hits > self.of {
            return None;
        }
        let n = self.of as f64;
        let value = self.hits as f64 / n;
        let scale = 1.0 + Z * Z / n;
        let centre = (value + Z * Z / (2.0 * n)) / scale;
        let half = Z * (value * (1.0 - value) / n + Z * Z / (4.0 * n * n)).sqrt() / scale;
        // At the ends the formula gives 0 and 1 but for rounding.
        let low = if self.hits == 0 { 0.0 } else { (centre - half).max(0.0) };
        let high = if self.hits == self.of { 1.0 } else { (centre + half).min(1.0) };
        Some(Interval { value, low, high })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `statsmodels.stats.proportion.proportion_confint(hits, n, method="wilson")`, statsmodels 0.15.0.
    #[test]
    fn intervals_are_those_of_statsmodels() {
        let cases = [
            (0, 1, 0.0, 0.7934506856227627),
            (0, 10, 0.0, 0.27753279986288926),
            (10, 10, 0.7224672001371106, 1.0),
            (1, 2, 0.09453120573423068, 0.9054687942657693),
            (7, 9, 0.45258896910698887, 0.9367748928821533),
            (81, 263, 0.2552885198782742, 0.36620957698280004),
            (999, 1000, 0.9943574414020421, 0.9998234536293739),
            (123456, 1000000, 0.12281269653142285, 0.12410219641400438),
        ];
        for (hits, of, low, high) in cases {
            let found = Share { hits, of }.wilson().unwrap();
            assert!((found.value - hits as f64 / of as f64).abs() < 1e-15);
            assert!((found.low - low).abs() < 1e-12 && (found.high - high).abs() < 1e-12, "{hits} of {of}: {found:?}");
        }
    }

    #[test]
    fn the_ends_are_exact_at_none_and_all() {
        let (none, all) = (Share { hits: 0, of: 7 }.wilson().unwrap(), Share { hits: 7, of: 7 }.wilson().unwrap());
        assert_eq!((none.value, none.low, all.value, all.high), (0.0, 0.0, 1.0, 1.0));
        assert!(none.high > 0.3 && all.low < 0.7);
    }

    #[test]
    fn without_trials_there_is_no_share() {
        assert_eq!(Share::default().wilson(), None);
        assert_eq!(Share { hits: 3, of: 2 }.wilson(), None);
    }
}

//! Percentile bootstrap intervals (Efron 1979) over documents, for means and for ratios of sums such as the negative
//! log-likelihood for each token. Documents are drawn, not tokens, because tokens of one document are not independent.

use super::interval::Interval;

/// How many times the documents are drawn anew.
const RESAMPLES: usize = 1000;

/// Σ aᵢ / Σ bᵢ over documents `(aᵢ, bᵢ)`, with the interval from the 2.5th to the 97.5th percentile (interpolated as numpy and
/// `scipy.stats.bootstrap(method="percentile")` do) of the same ratio over 1000 draws of as many documents. The same seed gives
/// the same interval. A single document gives an interval without width, which tells nothing.
///
/// `None` without documents, or if a value is not finite, a bᵢ is not positive, or a sum overflows.
pub(crate) fn ratio(documents: &[(f64, f64)], seed: u64) -> Option<Interval> {
    if documents.iter().any(|(a, b)| !a.is_finite() || !b.is_finite() || *b <= 0.0) {
        return None;
    }
    interval(documents.len(), seed, |indices| {
        let (a, b) = indices.filter_map(|i| documents.get(i)).fold((0.0, 0.0), |(a, b), (x, y)| (a + x, b + y));
        a / b
    })
}

/// The mean, as [`ratio`] with every bᵢ = 1.
pub(crate) fn mean(values: &[f64], seed: u64) -> Option<Interval> {
    interval(values.len(), seed, |indices| indices.filter_map(|i| values.get(i)).sum::<f64>() / values.len() as f64)
}

fn interval(count: usize, seed: u64, statistic: impl Fn(&mut dyn Iterator<Item = usize>) -> f64) -> Option<Interval> {
    let value = statistic(&mut (0..count));
    let mut random = SplitMix(seed);
    let mut found: Vec<f64> =
        (0..RESAMPLES).map(|_| statistic(&mut (0..count).map(|_| random.below(count as u64) as usize))).collect();
    if !value.is_finite() || found.iter().any(|x| !x.is_finite()) {
        return None;
    }
    found.sort_by(f64::total_cmp);
    Some(Interval { value, low: percentile(&found, 0.025)?, high: percentile(&found, 0.975)? })
}

/// The quantile of sorted values, interpolated between the two ranks nearest to q(n - 1) (Hyndman and Fan 1996, type 7).
fn percentile(sorted: &[f64], q: f64) -> Option<f64> {
    let place = q * sorted.len().saturating_sub(1) as f64;
    let (below, above) = (sorted.get(place.floor() as usize)?, sorted.get(place.ceil() as usize)?);
    Some(below + (above - below) * place.fract())
}

/// SplitMix64 (Steele, Lea and Flood 2014) with the finaliser of Vigna's `splitmix64.c`: enough for draws that nobody tries to
/// guess.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, by the high half of a product (Lemire 2019); its bias, bound / 2⁶⁴, is left in.
    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents() -> Vec<(f64, f64)> {
        (0..40u32).map(|i| (f64::from(i * i % 37) + 5.5, f64::from(i * 7 % 11) + 1.0)).collect()
    }

    /// The values that Rosetta Code lists for `splitmix64` with seed 1234567.
    #[test]
    fn the_generator_gives_the_published_values() {
        let mut random = SplitMix(1_234_567);
        let wanted = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423, 4_593_380_528_125_082_431];
        assert_eq!(wanted.map(|_| random.next()), wanted);
    }

    /// The same draws in Python, and `numpy.percentile(replicates, [2.5, 97.5])` of them, numpy 2.4.6.
    #[test]
    fn intervals_are_the_percentiles_of_numpy() {
        let found = ratio(&documents(), 7).unwrap();
        let wanted = [3.6818181818181817, 2.92486835712316, 4.54749611670156];
        for (found, wanted) in [found.value, found.low, found.high].into_iter().zip(wanted) {
            assert!((found - wanted).abs() < 1e-12, "{found} {wanted}");
        }
        let values: Vec<f64> = documents().iter().map(|(a, _)| *a).collect();
        let found = mean(&values, 8).unwrap();
        let wanted = [22.275, 18.249375, 25.7];
        for (found, wanted) in [found.value, found.low, found.high].into_iter().zip(wanted) {
            assert!((found - wanted).abs() < 1e-12, "{found} {wanted}");
        }
    }

    /// `scipy.stats.bootstrap(..., n_resamples=200000, method="percentile", paired=True)`, scipy 1.17.1: other draws, so only
    /// nearly.
    #[test]
    fn intervals_are_nearly_those_of_scipy() {
        let found = ratio(&documents(), 1).unwrap();
        let wanted: [f64; 2] = [2.9109, 4.6386];
        let width = wanted[1] - wanted[0];
        assert!((found.low - wanted[0]).abs() < 0.06 * width && (found.high - wanted[1]).abs() < 0.06 * width, "{found:?}");
    }

    #[test]
    fn the_seed_decides() {
        assert_eq!(ratio(&documents(), 3), ratio(&documents(), 3));
        assert_ne!(ratio(&documents(), 3), ratio(&documents(), 4));
    }

    #[test]
    fn perplexity_is_the_exponential_of_all_three() {
        let found = mean(&[0.0, 1.0, 2.0], 1).unwrap();
        let perplexity = found.exp();
        assert_eq!((perplexity.value, perplexity.low, perplexity.high), (1f64.exp(), found.low.exp(), found.high.exp()));
    }

    #[test]
    fn what_has_no_ratio_gives_none() {
        assert_eq!(ratio(&[], 1), None);
        assert_eq!(mean(&[], 1), None);
        assert_eq!(ratio(&[(1.0, 0.0)], 1), None);
        assert_eq!(ratio(&[(1.0, 1.0), (f64::NAN, 1.0)], 1), None);
        assert_eq!(ratio(&[(f64::MAX, 1.0), (f64::MAX, 1.0)], 1), None);
        assert_eq!(mean(&[1.0, f64::INFINITY], 1), None);
    }

    #[test]
    fn one_document_has_no_width() {
        assert_eq!(ratio(&[(3.0, 2.0)], 1), Some(Interval { value: 1.5, low: 1.5, high: 1.5 }));
    }
}

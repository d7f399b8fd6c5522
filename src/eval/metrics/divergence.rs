//! What two models say about the next token, from their logits: Kullback-Leibler divergence, agreement of the first choice and
//! the likelihood of the token that came. All in f64 and in nats, however the logits were computed.

/// The logits of one position, all of them finite, with what their softmax needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row<'a> {
    logits: &'a [f32],
    top: usize,
    /// ln Σ exp(xᵢ), which turns logits into log-probabilities.
    normaliser: f64,
}

impl<'a> Row<'a> {
    /// `None` if there are no logits or one is not finite.
    pub(crate) fn new(logits: &'a [f32]) -> Option<Self> {
        let (mut top, mut most) = (0, *logits.first()?);
        for (i, logit) in logits.iter().enumerate() {
            if !logit.is_finite() {
                return None;
            }
            if *logit > most {
                (top, most) = (i, *logit);
            }
        }
        // Without the largest logit no exponential overflows, and the sum is at least 1.
        let most = f64::from(most);
        let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - most).exp()).sum();
        Some(Self { logits, top, normaliser: most + sum.ln() })
    }

    /// The first choice: the token with the largest logit, the lowest of several.
    pub(crate) fn top(&self) -> usize {
        self.top
    }

    /// ln softmax(x)ᵢ = xᵢ - ln Σ exp(xⱼ), whose negative is the loss at a token; `None` beyond the vocabulary.
    pub(crate) fn log_softmax_at(&self, index: usize) -> Option<f64> {
        self.logits.get(index).map(|logit| f64::from(*logit) - self.normaliser)
    }

    /// KL(p‖q) = Σ pᵢ (ln pᵢ - ln qᵢ) (Kullback and Leibler 1951), with p from this row and q from the other. What rounding
    /// leaves below zero is given as zero. `None` if the vocabularies differ in size.
    pub(crate) fn kl(&self, q: &Row<'_>) -> Option<f64> {
        if self.logits.len() != q.logits.len() {
            return None;
        }
        let terms = self.logits.iter().zip(q.logits).map(|(p, q_logit)| {
            let (ln_p, ln_q) = (f64::from(*p) - self.normaliser, f64::from(*q_logit) - q.normaliser);
            ln_p.exp() * (ln_p - ln_q)
        });
        Some(terms.sum::<f64>().max(0.0))
    }
}

/// Many values in three numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Summary {
    pub(crate) mean: f64,
    /// By nearest rank: the ⌈0.99 n⌉-th smallest value, one of the values themselves.
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

impl Summary {
    /// `None` without values or if one is not finite.
    pub(crate) fn new(values: &[f64]) -> Option<Self> {
        if values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        // n - ⌊n/100⌋ = ⌈0.99 n⌉, without a product that overflows or rounds.
        let rank = sorted.len() - sorted.len() / 100;
        let p99 = *sorted.get(rank.checked_sub(1)?)?;
        Some(Self { mean: sorted.iter().sum::<f64>() / sorted.len() as f64, p99, max: *sorted.last()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: Option<f64>, wanted: f64) -> bool {
        found.is_some_and(|found| (found - wanted).abs() <= 1e-13 * wanted.abs().max(1e-3))
    }

    /// `scipy.special.log_softmax` and `scipy.special.rel_entr(softmax(p), softmax(q)).sum()` of float64, scipy 1.17.1.
    #[test]
    fn divergence_and_likelihood_are_those_of_scipy() {
        let (p, q) = ([1.0f32, 2.5, -3.0, 0.25], [0.5f32, 2.0, 1.0, -4.0]);
        let (p, q) = (Row::new(&p).unwrap(), Row::new(&q).unwrap());
        assert!(close(p.kl(&q), 0.4615760770783156));
        assert!(close(q.kl(&p), 0.8542741599435313));
        for (i, wanted) in
            [-1.7871440448524547, -0.2871440448524547, -5.787144044852455, -2.5371440448524547].into_iter().enumerate()
        {
            assert!(close(p.log_softmax_at(i), wanted));
        }
        assert_eq!(p.log_softmax_at(4), None);
        let (p, q) = (wide(0.37), wide(0.38));
        assert!(close(Row::new(&p).unwrap().kl(&Row::new(&q).unwrap()), 20.686530358394222));
    }

    /// Halves from -20 to 20, exact in f32, as `numpy.round(20 * numpy.sin(step * i) * 2) / 2`.
    fn wide(step: f64) -> Vec<f32> {
        (0..1000).map(|i| ((20.0 * (step * f64::from(i)).sin() * 2.0).round_ties_even() / 2.0) as f32).collect()
    }

    /// As above, with logits whose exponentials overflow or underflow.
    #[test]
    fn large_logits_do_not_overflow() {
        let (p, q) = ([1000.0f32, 0.0], [0.0f32, 3e38]);
        let (p, q) = (Row::new(&p).unwrap(), Row::new(&q).unwrap());
        assert!(close(p.log_softmax_at(1), -1000.0));
        assert!(close(p.kl(&q), f64::from(3e38f32)));
        assert_eq!(p.kl(&p), Some(0.0));
    }

    #[test]
    fn what_is_not_finite_or_empty_is_refused() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(Row::new(&[1.0, bad]).is_none() && Row::new(&[bad, 1.0]).is_none());
        }
        assert!(Row::new(&[]).is_none());
        let (two, three) = ([1.0f32, 2.0], [1.0f32, 2.0, 3.0]);
        assert_eq!(Row::new(&two).unwrap().kl(&Row::new(&three).unwrap()), None);
    }

    #[test]
    fn the_first_choice_is_the_lowest_of_several() {
        assert_eq!(Row::new(&[0.5, 3.0, 3.0, -1.0]).unwrap().top(), 1);
        assert_eq!(Row::new(&[-0.0, 0.0]).unwrap().top(), 0);
    }

    /// `numpy.percentile(values, 99, method="inverted_cdf")`, numpy 2.4.6.
    #[test]
    fn the_percentile_is_the_nearest_rank() {
        for (n, wanted) in
            [(1, 1.0), (2, 2.0), (99, 99.0), (100, 99.0), (101, 100.0), (199, 198.0), (200, 198.0), (201, 199.0), (1000, 990.0)]
        {
            let values: Vec<f64> = (1..=n).rev().map(f64::from).collect();
            let found = Summary::new(&values).unwrap();
            assert_eq!((found.mean, found.p99, found.max), (f64::from(n + 1) / 2.0, wanted, f64::from(n)));
        }
        assert_eq!(Summary::new(&[]), None);
        assert_eq!(Summary::new(&[1.0, f64::NAN]), None);
    }
}

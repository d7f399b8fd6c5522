//! A value with the ends of its 95 % interval, the form in which every uncertain number of an evaluation is reported.

/// An estimate and its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Interval {
    /// The estimate from all the data.
    pub(crate) value: f64,
    /// The lower end.
    pub(crate) low: f64,
    /// The upper end.
    pub(crate) high: f64,
}

impl Interval {
    /// The interval of `exp` of the quantity: perplexity from the mean negative log-likelihood. Percentile and Wilson intervals
    /// may be carried over like this because `exp` is monotone.
    pub(crate) fn exp(self) -> Self {
        Self { value: self.value.exp(), low: self.low.exp(), high: self.high.exp() }
    }
}

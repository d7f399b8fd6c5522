//! The confusion matrix of a classification, and the scores that follow from it. Labels are numbers below a known count; what
//! they stand for, and what becomes of an answer that is none of them, is the caller's to say.

use super::share::Share;

/// How often each label was predicted for each true label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Confusion {
    labels: usize,
    /// Row by row: rows are the truth, columns the prediction.
    counts: Vec<u64>,
}

/// The scores of one label; a score without a denominator is 0, as with `zero_division=0` of scikit-learn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LabelScores {
    /// tp / (tp + fp).
    pub(crate) precision: f64,
    /// tp / (tp + fn).
    pub(crate) recall: f64,
    /// 2 tp / (2 tp + fp + fn).
    pub(crate) f1: f64,
    /// How often the label is the truth, tp + fn.
    pub(crate) support: u64,
}

impl Confusion {
    /// Counts pairs of truth and prediction. `None` if one of them is not below `labels`.
    pub(crate) fn new(labels: usize, pairs: impl IntoIterator<Item = (usize, usize)>) -> Option<Self> {
        let mut counts = vec![0u64; labels.checked_mul(labels)?];
        for (truth, predicted) in pairs {
            if truth >= labels || predicted >= labels {
                return None;
            }
            *counts.get_mut(truth * labels + predicted)? += 1;
        }
        Some(Self { labels, counts })
    }

    /// The rows, one for each true label, of counts for each predicted label.
    pub(crate) fn rows(&self) -> impl Iterator<Item = &[u64]> {
        self.counts.chunks(self.labels.max(1))
    }

    /// How many predictions are right.
    pub(crate) fn accuracy(&self) -> Share {
        Share { hits: (0..self.labels).map(|label| self.right(label)).sum(), of: self.counts.iter().sum() }
    }

    /// The scores of each label, in their order; those of a label that occurs nowhere are 0.
    pub(crate) fn per_label(&self) -> Vec<LabelScores> {
        (0..self.labels).map(|label| self.label_scores(label)).collect()
    }

    /// The mean of F1 over the labels that occur in truth or prediction, as `f1_score(average="macro", zero_division=0)` of
    /// scikit-learn takes it when it is not given the labels. `None` without pairs.
    pub(crate) fn macro_f1(&self) -> Option<f64> {
        let occurring = (0..self.labels).filter(|label| self.truths(*label) + self.predictions(*label) > 0);
        let (sum, count) = occurring.fold((0.0, 0u64), |(sum, count), label| (sum + self.label_scores(label).f1, count + 1));
        (count > 0).then(|| sum / count as f64)
    }

    fn label_scores(&self, label: usize) -> LabelScores {
        let (right, support, predicted) = (self.right(label), self.truths(label), self.predictions(label));
        LabelScores {
            precision: quotient(right, predicted),
            recall: quotient(right, support),
            f1: quotient(2 * right, support + predicted),
            support,
        }
    }

    fn right(&self, label: usize) -> u64 {
        self.counts.get(label * self.labels + label).copied().unwrap_or(0)
    }

    fn truths(&self, label: usize) -> u64 {
        self.counts.iter().skip(label * self.labels).take(self.labels).sum()
    }

    fn predictions(&self, label: usize) -> u64 {
        self.counts.iter().skip(label).step_by(self.labels.max(1)).sum()
    }
}

fn quotient(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Label 2 is never predicted, 3 never true, 4 nowhere.
    const TRUTH: [usize; 10] = [0, 0, 0, 1, 1, 2, 2, 1, 0, 1];
    const PREDICTED: [usize; 10] = [0, 1, 0, 1, 1, 0, 3, 3, 0, 1];

    fn example() -> Confusion {
        Confusion::new(5, TRUTH.into_iter().zip(PREDICTED)).unwrap()
    }

    /// `confusion_matrix(truth, predicted, labels=range(5))`, `precision_recall_fscore_support(truth, predicted,
    /// labels=range(5), zero_division=0)` and `f1_score(truth, predicted, average="macro", zero_division=0)`, scikit-learn
    /// 1.9.1.
    #[test]
    fn scores_are_those_of_scikit_learn() {
        let found = example();
        let rows: [[u64; 5]; 5] = [[3, 1, 0, 0, 0], [0, 3, 0, 1, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]];
        assert!(found.rows().eq(rows.iter().map(|row| &row[..])));
        assert_eq!(found.accuracy(), Share { hits: 6, of: 10 });
        let wanted = [(0.75, 0.75, 0.75, 4), (0.75, 0.75, 0.75, 4), (0.0, 0.0, 0.0, 2), (0.0, 0.0, 0.0, 0), (0.0, 0.0, 0.0, 0)];
        for (found, (precision, recall, f1, support)) in found.per_label().into_iter().zip(wanted) {
            assert!((found.precision - precision).abs() < 1e-15 && (found.recall - recall).abs() < 1e-15);
            assert!((found.f1 - f1).abs() < 1e-15 && found.support == support);
        }
        assert!((found.macro_f1().unwrap() - 0.375).abs() < 1e-15);
    }

    #[test]
    fn without_pairs_there_is_no_score() {
        for labels in [0, 3] {
            let none = Confusion::new(labels, []).unwrap();
            assert_eq!((none.accuracy(), none.macro_f1(), none.per_label().len()), (Share { hits: 0, of: 0 }, None, labels));
            assert_eq!(none.rows().count(), labels);
        }
    }

    #[test]
    fn labels_beyond_the_count_are_refused() {
        assert_eq!(Confusion::new(2, [(0, 1), (2, 0)]), None);
        assert_eq!(Confusion::new(2, [(0, 2)]), None);
        assert_eq!(Confusion::new(usize::MAX, []), None);
    }
}

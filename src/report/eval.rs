//! The report of `eval`.

use serde::Serialize;

use super::{Note, UsedAdapter};

/// How good a model is on labelled data.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct EvalReport {
    /// The base, as given.
    pub model: String,
    /// What was put on it.
    pub adapters: Vec<UsedAdapter>,
    /// `base`, `on_the_fly` or `merged`.
    pub view: &'static str,
    /// `classify`, `qa`, `translate` or `perplexity`.
    pub task: &'static str,
    /// The file of rows.
    pub data: String,
    /// How many there are.
    pub rows: u64,
    /// What the model reaches.
    pub scores: Scores,
    /// The view that it is compared with, if one was asked for: `base` or `merged`.
    pub against: Option<&'static str>,
    /// What that one reaches, and the two beside each other.
    pub compared: Option<Compared>,
    /// What is worth saying.
    pub warnings: Vec<Note>,
}

/// The measures of a task; those of other tasks are null.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Scores {
    /// The share of rows whose label is the likeliest class; Wilson's interval at 95 %.
    pub accuracy: Option<Measure>,
    /// The mean of the labels' F1.
    pub macro_f1: Option<f64>,
    /// Which label was taken for which.
    pub confusion: Option<ConfusionReport>,
    /// The share of answers that are right to the letter, by SQuAD's rules; Wilson's interval.
    pub exact_match: Option<Measure>,
    /// The mean overlap of words with the answer, by SQuAD's rules; bootstrap interval.
    pub f1: Option<Measure>,
    /// Corpus BLEU, 0 to 100, as sacrebleu computes it by default.
    pub bleu: Option<f64>,
    /// chrF2, 0 to 100, as sacrebleu computes it by default.
    pub chrf: Option<f64>,
    /// exp(−Σ log p / tokens) of the true texts; bootstrap interval over rows.
    pub perplexity: Option<Measure>,
    /// The tokens that the perplexity is over.
    pub predicted_tokens: u64,
}

/// A figure with its interval at 95 %.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Measure {
    /// The figure.
    pub value: f64,
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

/// Rows by true and by predicted label.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ConfusionReport {
    /// By number.
    pub labels: Vec<LabelReport>,
    /// A list for each true label, of counts by predicted label.
    pub counts: Vec<Vec<u64>>,
}

/// How well one label is found.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LabelReport {
    /// Its name.
    pub label: String,
    /// Of the rows that were given it, the share that has it.
    pub precision: f64,
    /// Of the rows that have it, the share that was given it.
    pub recall: f64,
    /// The harmonic mean of the two.
    pub f1: f64,
    /// Rows that have it.
    pub rows: u64,
}

/// Two models on the same rows.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Compared {
    /// What the other one reaches.
    pub scores: Scores,
    /// Decisions that both took: one for each class of a row, two for each answer, one for each token of a text.
    pub decisions: u64,
    /// The share in which both find the same likeliest; Wilson's interval.
    pub agreement: Option<Measure>,
    /// KL(first ‖ second) of a decision in the mean, in nats. Against `merged` it is the merge loss.
    pub kl_mean: f64,
    /// What 99 % of the decisions do not exceed.
    pub kl_p99: f64,
    /// The largest.
    pub kl_max: f64,
    /// Rows that the first alone has right.
    pub only_first_right: u64,
    /// Rows that the second alone has right.
    pub only_second_right: u64,
    /// How likely so uneven a split is if both are as good: exact McNemar test, two-sided. `null` if nothing is right or wrong.
    pub mcnemar: Option<f64>,
}

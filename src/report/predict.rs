//! The report of `predict`.

use serde::Serialize;

use super::Note;

/// What a model says.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PredictReport {
    /// The base, as given.
    pub model: String,
    /// What was put on it.
    pub adapters: Vec<UsedAdapter>,
    /// `base`, `on_the_fly` or `merged`.
    pub view: &'static str,
    /// `classify`, `qa`, `translate` or `reply`.
    pub task: &'static str,
    /// By the order of the rows.
    pub predictions: Vec<Prediction>,
    /// What is worth saying.
    pub warnings: Vec<Note>,
}

/// An adapter of a model that runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct UsedAdapter {
    /// The file of weights.
    pub path: String,
    /// What its updates are multiplied by.
    pub weight: f64,
}

/// What a model says of one row.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Prediction {
    /// The line of the row, from 1.
    pub line: u64,
    /// A label, an answer, a translation or a reply.
    pub text: String,
    /// Tokens that went in, with special ones.
    pub tokens: u64,
    /// All classes, the likeliest first; empty for other tasks.
    pub classes: Vec<ClassShare>,
}

/// One class of a prediction.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ClassShare {
    /// Its name.
    pub label: String,
    /// exp(logit) / Σ exp(logit).
    pub probability: f64,
    /// What the head gives.
    pub logit: f32,
}

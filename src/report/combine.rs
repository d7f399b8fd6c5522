//! The report of `combine`.

use serde::Serialize;

use super::Note;

/// What was combined, and what it lost.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct CombineReport {
    /// The adapters, in the order that was given.
    pub adapters: Vec<CombinedAdapter>,
    /// The method, as the command line spells it.
    pub method: &'static str,
    /// As given; `None` before it is written.
    pub output: Option<String>,
    /// Dialect of the output; `None` before it is written.
    pub to: Option<&'static str>,
    /// The low-rank updates, in the order of their names.
    pub targets: Vec<CombinedTarget>,
    /// ‖stored − wanted‖ / ‖wanted‖ (Frobenius) over all targets together, where the wanted update is that of the method: what the rank and
    /// the dtype of the factors cost. 0 if the stored factors hold it without any rounding.
    pub error: f64,
    /// ‖stored − Σ wₜ·Δₜ‖ / ‖Σ wₜ·Δₜ‖ over all targets together: how far the method is from the plain sum.
    pub from_sum: f64,
    /// Dtype of the factors.
    pub dtype: String,
    /// Values in all tensors.
    pub parameters: u64,
    /// Bytes written; 0 before.
    pub bytes: u64,
    /// Content root of the tensors written; empty before.
    pub content: String,
    /// What the policy decided on parts that are not low rank.
    pub decided: Vec<Note>,
    /// What the output's dialect cannot express.
    pub losses: Vec<Note>,
    /// What is worth saying.
    pub warnings: Vec<Note>,
}

/// One of the adapters.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct CombinedAdapter {
    /// The file of weights that was read.
    pub path: String,
    /// Its dialect.
    pub dialect: &'static str,
    /// Its weight, before those of layers.
    pub weight: f64,
    /// Updates that it adds.
    pub targets: u64,
    /// The content root of its tensors.
    pub content: String,
    /// SHA-256 of what its tensors do not say: which tensors of the base they change, as what, and with which scales.
    pub scaling: String,
}

/// One low-rank update.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct CombinedTarget {
    /// The base tensor.
    pub tensor: String,
    /// How many adapters add to it.
    pub adapters: u64,
    /// The sum of their ranks.
    pub rank_sum: u64,
    /// The rank that it has; 0 if nothing of it is left.
    pub rank: u64,
    /// ‖Σ wₜ·Δₜ‖ (Frobenius), of the plain sum.
    pub norm: f64,
    /// ‖stored − wanted‖ / ‖wanted‖, where the wanted update is that of the method.
    pub error: f64,
    /// ‖stored − Σ wₜ·Δₜ‖ / ‖Σ wₜ·Δₜ‖.
    pub from_sum: f64,
}

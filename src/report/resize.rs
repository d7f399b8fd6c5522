//! The report of `resize`.

use serde::Serialize;

use super::Note;

/// What was resized, and what it lost.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ResizeReport {
    /// The file of weights that was read.
    pub input: String,
    /// Dialect of the input.
    pub from: &'static str,
    /// Dialect of the output.
    pub to: &'static str,
    /// As given.
    pub output: String,
    /// The low-rank updates, in the order of their names.
    pub targets: Vec<ResizedTarget>,
    /// ‖ΔW′ − ΔW‖ / ‖ΔW‖ (Frobenius) over all targets together, of the factors as they are stored.
    pub error: f64,
    /// Values in all tensors of the adapter that was read.
    pub parameters_before: u64,
    /// Values in all tensors written.
    pub parameters: u64,
    /// The rank that the loader makes room for, if one was named.
    pub room: Option<u64>,
    /// Bytes written.
    pub bytes: u64,
    /// Content root of the tensors written.
    pub content: String,
    /// What the output's dialect cannot express.
    pub losses: Vec<Note>,
    /// What is worth saying.
    pub warnings: Vec<Note>,
}

/// One low-rank update.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ResizedTarget {
    /// The base tensor.
    pub tensor: String,
    /// The rank that it had.
    pub rank_before: u64,
    /// The rank that it has; 0 if nothing of it is left.
    pub rank: u64,
    /// ‖ΔW‖ (Frobenius).
    pub norm: f64,
    /// ‖ΔW′ − ΔW‖ / ‖ΔW‖.
    pub error: f64,
    /// All singular values of ΔW that are not zero, largest first; of a stack those of all parts together.
    pub singular_values: Vec<f64>,
}

//! The report of `bake`.

use serde::Serialize;

use super::Note;

/// What was baked, and what it cost.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct BakeReport {
    /// The file of weights that was read.
    pub input: String,
    /// Dialect of the input.
    pub from: &'static str,
    /// As given.
    pub output: String,
    /// Low-rank updates written.
    pub targets: u64,
    /// The rank of all of them.
    pub rank: u64,
    /// The alpha of all of them.
    pub alpha: f64,
    /// Their scale: alpha / rank.
    pub scale: f64,
    /// Targets whose rank was made up with zeros.
    pub padded: u64,
    /// Targets whose B was multiplied by a number.
    pub folded: u64,
    /// Targets whose factors have another dtype now.
    pub retyped: u64,
    /// Targets of which a value was rounded.
    pub rounded: u64,
    /// Every update is what it was, bit for bit.
    pub exact: bool,
    /// ‖ΔW′ − ΔW‖ / ‖ΔW‖ (Frobenius) over all targets together; 0 if exact.
    pub error: f64,
    /// The target with the largest such error of its own; `None` if exact.
    pub worst: Option<WorstTarget>,
    /// Bytes written.
    pub bytes: u64,
    /// Content root of the tensors written.
    pub content: String,
    /// Loaders that are not known to refuse it or to compute something else.
    pub read_by: Vec<&'static str>,
    /// The others.
    pub not_read_by: Vec<&'static str>,
    /// What a plain adapter does not say.
    pub losses: Vec<Note>,
    /// What is worth saying.
    pub warnings: Vec<Note>,
}

/// The target that lost most.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct WorstTarget {
    /// The base tensor.
    pub tensor: String,
    /// ‖ΔW′ − ΔW‖ / ‖ΔW‖ (Frobenius).
    pub error: f64,
}

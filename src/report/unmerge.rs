//! The report of `unmerge`.

use serde::Serialize;

use super::Note;

/// What was taken out, and how exactly.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct UnmergeReport {
    /// The merged checkpoint, as given.
    pub merged: String,
    /// The output; the merged checkpoint itself if it was changed in place.
    pub output: String,
    /// True if the output is the merged checkpoint itself.
    pub in_place: bool,
    /// `undo log` or `subtraction`.
    pub by: &'static str,
    /// Tensors that were put back.
    pub tensors: u64,
    /// Bytes of weights written.
    pub bytes: u64,
    /// Values in these tensors.
    pub values: u64,
    /// Values that are certain to be what they were before the merge.
    pub certain: u64,
    /// All values are certain.
    pub exact: bool,
    /// A bound on ‖error‖ / ‖weights‖ over these tensors. `None` if all values are zero.
    pub error_bound: Option<f64>,
    /// What is worth saying.
    pub warnings: Vec<Note>,
}

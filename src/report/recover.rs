//! The report of `recover`.

use serde::Serialize;

/// What was completed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RecoverReport {
    /// The checkpoint, as given.
    pub path: String,
    /// The journal that was carried out and removed; `None` if no merge was pending.
    pub journal: Option<String>,
    /// The files that it was about.
    pub files: Vec<String>,
    /// Tensors that the merge changes.
    pub tensors: u64,
    /// Bytes that had to be written; the rest had been before.
    pub bytes: u64,
}

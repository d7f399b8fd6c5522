//! The report of `convert`.

use serde::Serialize;

use super::Note;

/// What a conversion did.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ConvertReport {
    /// The file of weights that was read.
    pub input: String,
    /// Dialect of the input.
    pub from: &'static str,
    /// Dialect of the output.
    pub to: &'static str,
    /// As given.
    pub output: String,
    /// Low-rank updates written.
    pub targets: u64,
    /// Full tensors written.
    pub replacements: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Content root of the tensors written.
    pub content: String,
    /// What the output's dialect cannot express; empty if nothing is lost.
    pub losses: Vec<Note>,
    /// What is worth saying.
    pub warnings: Vec<Note>,
}

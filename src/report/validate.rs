//! The report of `validate`: what was checked, and what was found worth saying. What is wrong is an error, not a report.

use serde::Serialize;

use super::{LoaderReport, Note};

/// What was checked, all of it in order.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ValidateReport {
    /// For an adapter the file of weights that was read, for a checkpoint the path as given.
    pub path: String,
    /// `adapter` or `checkpoint`.
    pub kind: &'static str,
    /// The checks that were made.
    pub checks: Vec<Check>,
    /// What the loaders that were asked for would make of it; see [`check_loaders`](crate::check_loaders).
    pub loaders: Vec<LoaderReport>,
    /// What is worth saying.
    pub warnings: Vec<Note>,
}

/// One check that passed, or could not be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Check {
    /// What was checked.
    pub name: &'static str,
    /// `ok`, or `none` if the file has nothing to check against.
    pub outcome: &'static str,
    /// Figures.
    pub detail: String,
}

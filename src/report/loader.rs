//! What `validate --for` found out about one loader.

use serde::Serialize;

/// What a loader would make of an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct LoaderReport {
    /// The loader, as it was asked for.
    pub loader: &'static str,
    /// The name that people know it by.
    pub title: &'static str,
    /// The version that the rules were read from.
    pub version: &'static str,
    /// The files that they were read in.
    pub read_from: &'static str,
    /// Nothing is known for which it would refuse the adapter or compute something else.
    pub reads_it: bool,
    /// Every rule that is true of the adapter, most severe first.
    pub findings: Vec<LoaderFinding>,
}

/// One rule of a loader that is true of the adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct LoaderFinding {
    /// Id of the rule, as in `docs/loaders.md`.
    pub id: &'static str,
    /// `refused`, `ignored in silence`, `changed meaning`, `needs a flag`, `rounded once more` or `not known`.
    pub effect: &'static str,
    /// The loader does not compute what the adapter says.
    pub wrong: bool,
    /// What the adapter has.
    pub what: &'static str,
    /// What the loader does with it.
    pub does: &'static str,
    /// How many targets or full tensors it is true of; 0 if it is true of the adapter as a whole.
    pub targets: u64,
    /// The first of them; for `other-files` a file.
    pub first: Option<String>,
    /// What to do.
    pub way_out: String,
    /// `read` in the source, `concluded` from it, or `none` for what nobody has looked at.
    pub basis: &'static str,
    /// Where users met it.
    pub issues: Vec<&'static str>,
}

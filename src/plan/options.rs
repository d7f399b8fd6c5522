//! What the user may decide about a binding. Every field that relaxes a check says what it lets pass.

use crate::adapter::Adapter;

/// An adapter and how much of it to apply.
#[derive(Debug, Clone, Copy)]
pub struct Weighted<'a> {
    /// The adapter.
    pub adapter: &'a Adapter,
    /// Multiplies the adapter's effective scales. 1 applies it as trained, 0 leaves it out, -1 subtracts it.
    pub weight: f64,
}

impl<'a> Weighted<'a> {
    /// The adapter as trained.
    pub fn full(adapter: &'a Adapter) -> Self {
        Weighted { adapter, weight: 1.0 }
    }
}

/// Decisions about binding. `Default` relaxes nothing.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct BindOptions {
    /// Rename the adapter's targets that start with the first string so that they start with the second, instead of trying exact
    /// names and the known renamings. Default none.
    pub prefix: Option<(String, String)>,
    /// Targets that may be missing from the base, as patterns with `*`. Default none: every target must be found.
    pub allow_missing: Vec<String>,
    /// Leave out replacement tensors (`modules_to_save`, trained biases). Default false: they are applied.
    pub skip_replacements: bool,
    /// Add replacement tensors that the base does not have, such as a trained classifier head. Default false: they are refused.
    pub add_new_tensors: bool,
    /// Write a tied `lm_head` as a tensor of its own and say so in `config.json`. Default false: refused where it matters.
    pub untie: bool,
    /// Accept a replacement of an embedding or output layer with another number of rows than the base's, and write that number into
    /// `config.json`. Default false: refused.
    pub resize_vocabulary: bool,
    /// The base is the one that training saw, of an adapter whose initialisation took something out of the published one (PiSSA, OLoRA,
    /// CorDA, LoRA-GA, LoftQ, KaSA). Default false: such an adapter is refused.
    pub residual_base: bool,
    /// Leave base values that are not finite as they are; with another rounding than to the nearest, a NaN may get another payload. Default
    /// false: they are refused in the tensors that change.
    pub allow_nonfinite_base: bool,
    /// Merge into a base that is not the one that the adapter names by its digests. Default false.
    pub allow_base_mismatch: bool,
}

//! Holds a base against what an adapter says of it: names, dtypes and shapes of all tensors, and the bytes of those that the adapter
//! changes. `spec/adapter-model.md`, A-027.

use crate::adapter::Adapter;
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Result};
use crate::limits::Limits;
use crate::plan::{BindOptions, Binding, Weighted};
use crate::rules;
use crate::tensor::TensorSource;

/// What is known of a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Identity {
    /// The adapter names it by digests.
    Verified,
    /// The adapter names none by digests.
    Unverified,
    /// The adapter names another one, and the caller allowed that.
    Mismatch,
}

impl Identity {
    pub(super) fn name(self) -> &'static str {
        match self {
            Identity::Verified => "verified",
            Identity::Unverified => "unverified",
            Identity::Mismatch => "mismatch",
        }
    }
}

/// Names of the base tensors that the adapter changes, whatever the caller's options leave out of it.
pub(super) fn tensors(base: &Checkpoint, adapter: &Adapter, options: &BindOptions, limits: &Limits) -> Result<Vec<String>> {
    let whole = BindOptions {
        skip_replacements: false,
        add_new_tensors: true,
        untie: true,
        allow_base_mismatch: true,
        ..options.clone()
    };
    let binding = Binding::new(base, Weighted::full(adapter), 0, &whole, limits)?;
    Ok(binding.tensors().filter(|name| base.info(name).is_some()).map(str::to_owned).collect())
}

/// Compares the base with what the adapter states of it. A mismatch that the options allow comes back as a warning.
///
/// # Errors
/// `A-027`, and what [`Binding::new`] finds.
pub(super) fn check(
    base: &Checkpoint,
    adapter: &Adapter,
    options: &BindOptions,
    limits: &Limits,
) -> Result<(Identity, Option<Diagnostic>)> {
    let stated = adapter.base();
    let same_structure = stated.structure.as_ref().map(|wanted| *wanted == base.structure_root());
    let message = match (&stated.targets, same_structure) {
        (None, None) => return Ok((Identity::Unverified, None)),
        (_, Some(false)) => "different base: names, dtypes or shapes of its tensors are not those that the adapter names",
        (Some(wanted), _) => {
            let names = tensors(base, adapter, options, limits)?;
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            if base.content_root(&names)? == *wanted {
                return Ok((Identity::Verified, None));
            }
            "different base: the tensors that the adapter changes are not the ones that it was made for"
        }
        (None, Some(true)) => return Ok((Identity::Verified, None)),
    };
    let diagnostic = Diagnostic::new(rules::BASE_IDENTITY, message)
        .file(base.path())
        .help("use the base that the adapter was made for, or pass --allow-base-mismatch");
    if options.allow_base_mismatch { Ok((Identity::Mismatch, Some(diagnostic))) } else { Err(diagnostic.into()) }
}

//! `validate`: everything that can be checked without running the model. What opening a file checks (header, names, shapes, config,
//! scales) has passed when an `Adapter` or a `Checkpoint` exists; here come the values, the digests and the fit to a base.

use super::digests::verify_stated;
use crate::adapter::Adapter;
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Result};
use crate::exec;
use crate::limits::Limits;
use crate::plan::{BindOptions, Plan, Weighted};
use crate::report::{Check, Note, ValidateReport};
use crate::rules;
use crate::tensor::TensorSource;

/// Checks an adapter, and its fit to `base` if one is given.
///
/// # Errors
/// `A-008` for values, `C-037` and `C-038` for digests, and what [`Plan::new`] finds.
pub fn validate_adapter(adapter: &Adapter, base: Option<(&Checkpoint, &BindOptions)>, limits: &Limits) -> Result<ValidateReport> {
    let count = adapter.factors().count();
    let mut checks = vec![Check {
        name: "names, shapes and scales",
        outcome: "ok",
        detail: format!("{} targets, {count} tensors", adapter.targets().len()),
    }];
    for factor in adapter.factors() {
        exec::check_finite(factor)?;
    }
    checks.push(Check { name: "values", outcome: "ok", detail: format!("{} parameters, all finite", adapter.parameters()) });
    let checked = verify_stated(adapter)?;
    checks.push(match checked {
        0 => Check { name: "digests", outcome: "none", detail: "unsigned, no digests in the file".into() },
        n => Check { name: "digests", outcome: "ok", detail: format!("unsigned, {n} digests match") },
    });
    let mut warnings: Vec<Note> = adapter.warnings().iter().map(Note::from).collect();
    if let Some((base, options)) = base {
        let plan = Plan::new(base, &[Weighted::full(adapter)], options, limits)?;
        let identity = match adapter.base().structure {
            Some(_) => "structure verified",
            None => "base UNVERIFIED: the adapter names none by digest",
        };
        checks.push(Check {
            name: "fit to the base",
            outcome: "ok",
            detail: format!("{} tensors would change; {identity}", plan.changes().count()),
        });
        warnings.extend(base.warnings().iter().chain(plan.warnings()).map(Note::from));
    }
    Ok(ValidateReport { path: adapter.label().to_owned(), kind: "adapter", checks, warnings })
}

/// Checks a checkpoint. Reading all its values is optional, since it takes as long as reading the files.
///
/// # Errors
/// `K-012` if a file's content is not what its name says; `E-001` while reading.
pub fn validate_checkpoint(base: &Checkpoint, values: Values) -> Result<ValidateReport> {
    let mut checks = vec![Check {
        name: "headers and index",
        outcome: "ok",
        detail: format!("{} files, {} tensors", base.shards().len(), base.names().count()),
    }];
    base.verify_blobs()?;
    let mut warnings: Vec<Note> = base.warnings().iter().map(Note::from).collect();
    if values == Values::Read {
        let mut bad = 0;
        for name in base.names() {
            let found = exec::count_nonfinite(base, name)?;
            if let Some((count, first)) = found {
                bad += 1;
                let message = format!("{name:?} holds {count} values that are not finite, the first at {first}");
                warnings.push(Note::from(&Diagnostic::new(rules::BASE_FINITE, message).file(base.path()).tensor(name)));
            }
        }
        checks.push(Check { name: "values", outcome: "ok", detail: format!("{bad} tensors hold values that are not finite") });
    }
    Ok(ValidateReport { path: base.path().display().to_string(), kind: "checkpoint", checks, warnings })
}

/// Whether [`validate_checkpoint`] reads all values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Values {
    /// Headers only (default).
    #[default]
    Skip,
    /// Read every float and count those that are not finite.
    Read,
}

//! `validate`: everything that can be checked without running the model. What opening a file checks (header, names, shapes, config,
//! scales) has passed when an `Adapter` or a `Checkpoint` exists; here come the values, the digests and the fit to a base.

use super::digests::verify_stated;
use super::identity::{self, Identity};
use crate::adapter::Adapter;
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Result};
use crate::exec;
use crate::limits::Limits;
use crate::plan::{BindOptions, Plan, Weighted};
use crate::report::text::plural;
use crate::report::{Check, Note, ValidateReport};
use crate::rules;
use crate::tensor::TensorSource;

/// Checks an adapter, and its fit to `base` if one is given.
///
/// # Errors
/// `A-008` for values, `C-037` and `C-038` for digests, and what [`Plan::new`] finds.
pub fn validate_adapter(adapter: &Adapter, base: Option<(&Checkpoint, &BindOptions)>, limits: &Limits) -> Result<ValidateReport> {
    let (targets, tensors) = (adapter.targets().len() as u64, adapter.factors().count() as u64);
    let mut checks = vec![Check {
        name: "names, shapes and scales",
        outcome: "ok",
        detail: format!("{}, {}", plural(targets, "target"), plural(tensors, "tensor")),
    }];
    for factor in adapter.factors() {
        exec::check_finite(factor)?;
    }
    let detail = format!("{}, all finite", plural(adapter.parameters(), "parameter"));
    checks.push(Check { name: "values", outcome: "ok", detail });
    let checked = verify_stated(adapter)?;
    checks.push(match checked {
        0 => Check { name: "digests", outcome: "none", detail: "unsigned, no digests in the file".into() },
        n => Check { name: "digests", outcome: "ok", detail: format!("unsigned, {} checked", plural(n as u64, "digest")) },
    });
    let mut warnings: Vec<Note> = adapter.warnings().iter().map(Note::from).collect();
    if let Some((base, options)) = base {
        let plan = Plan::new(base, &[Weighted::full(adapter)], options, limits)?;
        let (identity, warning) = identity::check(base, adapter, options, limits)?;
        warnings.extend(warning.iter().map(Note::from));
        let identity = match identity {
            Identity::Verified => "base verified: it is the one that the adapter names by digest",
            Identity::Unverified => "base UNVERIFIED: the adapter names none by digest",
            Identity::Mismatch => "base MISMATCH: the adapter names another one; allowed by a flag",
        };
        checks.push(Check {
            name: "fit to the base",
            outcome: "ok",
            detail: format!("{} would change; {identity}", plural(plan.changes().count() as u64, "tensor")),
        });
        warnings.extend(base.warnings().iter().chain(plan.warnings()).map(Note::from));
    }
    Ok(ValidateReport { path: adapter.label().to_owned(), kind: "adapter", checks, loaders: Vec::new(), warnings })
}

/// Checks a checkpoint. Reading all its values is optional, since it takes as long as reading the files.
///
/// # Errors
/// `K-012` if a file's content is not what its name says; `E-001` while reading.
pub fn validate_checkpoint(base: &Checkpoint, values: Values) -> Result<ValidateReport> {
    let (files, tensors) = (base.shards().len() as u64, base.names().count() as u64);
    let detail = format!("{}, {}", plural(files, "file"), plural(tensors, "tensor"));
    let mut checks = vec![Check { name: "headers and index", outcome: "ok", detail }];
    base.verify_blobs()?;
    let mut warnings: Vec<Note> = base.warnings().iter().map(Note::from).collect();
    if values == Values::Read {
        let mut bad = 0u64;
        for name in base.names() {
            let found = exec::count_nonfinite(base, name)?;
            if let Some((count, first)) = found {
                bad += 1;
                let message = format!("{name:?} is not finite in {}, the first at {first}", plural(count, "value"));
                warnings.push(Note::from(&Diagnostic::new(rules::BASE_FINITE, message).file(base.path()).tensor(name)));
            }
        }
        let detail = match bad {
            0 => "all finite".to_owned(),
            n => format!("not all finite in {}", plural(n, "tensor")),
        };
        checks.push(Check { name: "values", outcome: "ok", detail });
    }
    Ok(ValidateReport { path: base.path().display().to_string(), kind: "checkpoint", checks, loaders: Vec::new(), warnings })
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

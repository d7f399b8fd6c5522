//! What changed and gets no factors: measured, then stored, left out or refused, as the policy says.

use super::options::RestPolicy;
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Error, Result};
use crate::exec::{self, Progress, Weight, float_of};
use crate::plan::{Rest, Whole};
use crate::report::RestTensor;
use crate::report::text::plural;
use crate::rules;
use crate::tensor::{TensorSource, pieces};

/// The share of the square of the whole change up to which something is left out unasked.
const LITTLE: f64 = 0.01;

/// A changed tensor without factors.
pub(super) struct Changed {
    pub(super) rest: Rest,
    /// ‖D‖²; `None` if there is nothing to compare it with.
    pub(super) squared: Option<f64>,
}

/// Those of `rest` that changed, and how many did not.
///
/// # Errors
/// `A-030`, `E-001`, `E-004`, `E-006`.
pub(super) fn changed(
    rest: &[Rest],
    base: Option<&Checkpoint>,
    tuned: &Checkpoint,
    progress: &dyn Progress,
) -> Result<(Vec<Changed>, u64)> {
    let (mut found, mut same) = (Vec::new(), 0);
    for one in rest {
        let Some(base) = base.filter(|_| one.compares) else {
            if base.is_some() {
                found.push(Changed { rest: one.clone(), squared: None });
            }
            continue;
        };
        let (Some(before), Some(after)) = (base.info(&one.tensor), tuned.info(&one.tuned)) else { continue };
        let squared = match (float_of(before.dtype), float_of(after.dtype)) {
            // The same bytes did not change, whatever they are: a mask of -inf, too.
            _ if before == after && equal(base, tuned, one, after.bytes())? => Some(0.0),
            (Some(before), Some(float)) => {
                let base = Weight { source: base, name: &one.tensor, float: before, first: 0 };
                let tuned = Weight { source: tuned, name: &one.tuned, float, first: 0 };
                match exec::change_squared(tuned, base, after.shape.elements(), progress) {
                    // What is left out by name may hold anything.
                    Err(error) if one.why == Whole::Excluded && error.diagnostics()[0].rule() == rules::BASE_FINITE => None,
                    squared => Some(squared?),
                }
            }
            _ => None,
        };
        match squared {
            Some(0.0) => same += 1,
            squared => found.push(Changed { rest: one.clone(), squared }),
        }
    }
    Ok((found, same))
}

/// Refuses what must not be left out whatever its share is, before anything is computed that takes long.
///
/// # Errors
/// `U-009`.
pub(super) fn check(changed: &[Changed], policy: RestPolicy) -> Result<()> {
    let unasked: Vec<&Changed> = changed.iter().filter(|one| one.rest.why != Whole::Excluded).collect();
    if let (RestPolicy::Store, Some(one)) = (policy, unasked.iter().find(|one| one.rest.why == Whole::Reshaped)) {
        let message = format!("{:?} has another shape than in the base, in which no merge takes it", one.rest.tensor);
        return Err(Error::new(rules::LITTLE_LEFT_OUT, message).tensor(&one.rest.tensor).help("leave it out with --exclude"));
    }
    refused(&unasked, &|_| None, policy).map_or(Ok(()), Err)
}

/// What becomes of each of them. `total` is ‖D‖² over everything that changed.
///
/// # Errors
/// `U-009`, with the tensors that must not be left out.
pub(super) fn settle(
    changed: &[Changed],
    total: f64,
    policy: RestPolicy,
    warnings: &mut Vec<Diagnostic>,
) -> Result<Vec<RestTensor>> {
    let asked = |one: &Changed| one.rest.why == Whole::Excluded;
    let share = |one: &Changed| one.squared.map(|squared| if total > 0.0 { squared / total } else { 0.0 });
    let unasked: Vec<&Changed> = changed.iter().filter(|one| !asked(one)).collect();
    if let Some(problem) = refused(&unasked, &share, policy) {
        return Err(problem);
    }
    let mut report = Vec::new();
    for one in changed {
        let mut is_stored = policy == RestPolicy::Store && !asked(one);
        if is_stored && one.rest.why == Whole::NoFloat {
            let message = format!("{:?} changed and holds no floats, so no adapter can hold it", one.rest.tensor);
            warnings.push(Diagnostic::new(rules::FACTOR_DTYPE, message).tensor(&one.rest.tensor));
            is_stored = false;
        }
        report.push(RestTensor {
            tensor: one.rest.tensor.clone(),
            why: one.rest.why.name(),
            norm: one.squared.map(f64::sqrt),
            share: share(one),
            stored: is_stored,
        });
    }
    Ok(report)
}

/// Whether the bytes are the same.
fn equal(base: &Checkpoint, tuned: &Checkpoint, one: &Rest, len: u64) -> Result<bool> {
    let (mut same, mut other) = (true, Vec::new());
    pieces(len, |offset, piece| {
        other.resize(piece.len(), 0);
        base.read(&one.tensor, offset, piece)?;
        tuned.read(&one.tuned, offset, &mut other)?;
        same &= *piece == other[..];
        Ok(())
    })?;
    Ok(same)
}

/// The error if the policy does not let them be left out.
fn refused(unasked: &[&Changed], share: &dyn Fn(&Changed) -> Option<f64>, policy: RestPolicy) -> Option<Error> {
    let sum: f64 = unasked.iter().filter_map(|one| share(one)).sum();
    let new: Vec<&&Changed> = unasked.iter().filter(|one| one.squared.is_none() && one.rest.why != Whole::NoFloat).collect();
    let refuse = match policy {
        RestPolicy::Skip | RestPolicy::Store => false,
        RestPolicy::Refuse => !unasked.is_empty(),
        RestPolicy::SkipSmall => sum > LITTLE || !new.is_empty(),
    };
    if !refuse {
        return None;
    }
    let mut worst: Vec<&&Changed> = unasked.iter().collect();
    worst.sort_by(|x, y| share(y).unwrap_or(f64::INFINITY).total_cmp(&share(x).unwrap_or(f64::INFINITY)));
    let names: Vec<String> = worst.iter().take(3).map(|one| format!("{:?} ({})", one.rest.tensor, one.rest.why.name())).collect();
    let more = if worst.len() > 3 { format!(" and {} more", worst.len() - 3) } else { String::new() };
    let with = if sum > 0.0 { format!(", with {:.3} % of the square of the change", 100.0 * sum) } else { String::new() };
    let count = plural(unasked.len() as u64, "changed tensor");
    let message = format!("{count} would be left out{with}: {}{more}", names.join(", "));
    let help = "--rest store keeps them whole beside the factors, --rest skip leaves them out";
    Some(Error::new(rules::LITTLE_LEFT_OUT, message).help(help))
}

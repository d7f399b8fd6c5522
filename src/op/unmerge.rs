//! `unmerge`: a checkpoint without the adapters that were merged into it. By the undo log of a merge in place, bit for bit; or by
//! subtracting the adapters, with a statement of how far that can be from what was there before.

use std::path::Path;

use super::in_place::merge_in_place_as;
use super::lineage::Merged;
use super::merge::{MergeOptions, merge_as};
use crate::adapter::{Adapter, AdapterParts, Replacement};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::exec::{self, Progress, Restored, UndoLog, on_threads};
use crate::plan::{Plan, Weighted};
use crate::report::{MergeReport, UnmergeReport};
use crate::rules;

/// Puts back what the undo log `log` of a merge in place holds: into the files of `merged` if `output` is `None`, else into a copy.
/// The tensors are then the bytes from before the merge.
///
/// # Errors
/// `E-010` if the log is damaged, or if `merged` does not hold what that merge wrote, so that something else would be lost; otherwise
/// as [`merge`](super::merge()) and [`merge_in_place`](super::merge_in_place).
pub fn unmerge_by_log(
    merged: &Checkpoint,
    log: &Path,
    output: Option<&Path>,
    options: &MergeOptions,
    progress: &dyn Progress,
) -> Result<UnmergeReport> {
    let opened = UndoLog::open(log, &options.limits)?;
    opened.check(merged, &options.exec, progress)?;
    let replacement =
        |(tensor, with): (&str, &crate::Factor)| Replacement { tensor: tensor.to_owned(), with: with.clone(), shared: true };
    let parts = AdapterParts {
        label: log.display().to_string(),
        dialect: "undo log",
        replacements: opened.originals().map(replacement).collect(),
        ..Default::default()
    };
    let adapter = Adapter::new(parts, &options.limits)?;
    let undone = |(adapter, content, weight): &(String, String, f64)| Merged {
        adapter: adapter.clone(),
        content: content.clone(),
        weight: -weight,
        by: None,
    };
    let entries = Some(opened.merged().iter().map(undone).collect());
    let done = carry_out(merged, &[Weighted::full(&adapter)], entries, output, options, progress)?;
    let values = done.tensors.iter().map(|tensor| tensor.elements).sum();
    let whole = Restored { values, certain: values, error: 0.0, size: 0.0 };
    Ok(report(done, "undo log", whole))
}

/// Subtracts `adapters`, with the weights that they were merged with. The report says of how many values it is certain that they are
/// what they were, and bounds the error of the others, if the merge was one that rounds once to the nearest.
///
/// # Errors
/// `A-025` if a weight is quantised; `A-010` if the merge put a full tensor in the place of another, which subtracting does not bring back; otherwise as
/// [`merge`](super::merge()) and [`merge_in_place`](super::merge_in_place).
pub fn unmerge_by_subtraction(
    merged: &Checkpoint,
    adapters: &[Weighted<'_>],
    output: Option<&Path>,
    options: &MergeOptions,
    progress: &dyn Progress,
) -> Result<UnmergeReport> {
    let negated: Vec<Weighted<'_>> = adapters.iter().map(|w| Weighted { adapter: w.adapter, weight: -w.weight }).collect();
    let plan = Plan::new(merged, &negated, &options.bind, &options.limits)?;
    if let Some(change) = plan.changes().find(|change| change.quantised.is_some()) {
        let message = format!("{:?} is quantised, and the scales that it had before the merge are not known", change.name);
        let error = Error::new(rules::BASE_DTYPE, message).file(merged.path()).tensor(&change.name);
        return Err(error.help("use the base that it was merged into"));
    }
    let restored = on_threads(&options.exec, || exec::restored(&plan, progress))?;
    drop(plan);
    Ok(report(carry_out(merged, &negated, None, output, options, progress)?, "subtraction", restored))
}

fn carry_out(
    merged: &Checkpoint,
    adapters: &[Weighted<'_>],
    entries: Option<Vec<Merged>>,
    output: Option<&Path>,
    options: &MergeOptions,
    progress: &dyn Progress,
) -> Result<MergeReport> {
    match output {
        Some(output) => merge_as(merged, adapters, entries, output, options, progress),
        None => merge_in_place_as(merged, adapters, entries, None, options, progress),
    }
}

fn report(done: MergeReport, by: &'static str, restored: Restored) -> UnmergeReport {
    let error = (restored.size > 0.0).then(|| (restored.error / restored.size).sqrt());
    UnmergeReport {
        merged: done.base,
        output: done.output,
        in_place: done.in_place,
        by,
        tensors: done.tensors.len() as u64,
        bytes: done.bytes,
        values: restored.values,
        certain: restored.certain,
        exact: restored.certain == restored.values,
        error_bound: if by == "undo log" { Some(0.0) } else { error.map(|e| format!("{e:.5e}").parse().unwrap_or(e)) },
        warnings: done.warnings,
    }
}

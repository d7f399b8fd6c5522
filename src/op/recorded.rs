//! The digests that a merge recorded of its output, held against what is there now: whether a checkpoint is still, bit for bit, what was
//! written, for which neither base nor adapter is needed.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::lineage::{Digests, RECORD, Record};
use super::verify::VerifyOptions;
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Error, Result};
use crate::exec::{self, Progress, on_threads};
use crate::io::tensor_digest;
use crate::report::text::plural;
use crate::report::{DigestReport, Note};
use crate::rules;
use crate::tensor::{TensorInfo, TensorSource, pieces};

/// Holds every tensor of `merged` against the digest that the last merge into it recorded.
///
/// # Errors
/// `U-001` if none are recorded or only a sample is to be read, `C-037` naming every tensor that is not as recorded, `C-038` if tensors are
/// missing or new; `A-032` if the record cannot be understood; `E-001`, `E-004`; `E-006` if `progress` cancels.
pub fn verify_digests(merged: &Checkpoint, options: &VerifyOptions, progress: &dyn Progress) -> Result<DigestReport> {
    if options.sample.is_some() {
        let message = "a digest is one of all bytes, and only a sample is to be read";
        return Err(Error::new(rules::ARGUMENT, message).help("leave out --sample, or give --base and --adapter"));
    }
    let Some(recorded) = Record::of(merged)?.digests else {
        let message = format!("there is nothing to hold the checkpoint against: no digests in {RECORD}");
        let help = "give --base and --adapter, or merge with --digests";
        return Err(Error::new(rules::ARGUMENT, message).file(merged.path()).help(help));
    };
    let problems = differences(merged, &recorded, options, progress)?;
    let most = options.limits.problems_shown;
    let more = problems.len().saturating_sub(most);
    let mut shown: Vec<Diagnostic> = problems.into_iter().take(most).collect();
    if more > 0 {
        let message = format!("and {} more", plural(more as u64, "tensor"));
        shown.push(Diagnostic::new(rules::TENSOR_DIGEST, message).file(merged.path()));
    }
    Error::check(shown)?;
    Ok(DigestReport {
        path: merged.path().display().to_string(),
        content: recorded.content,
        tensors: recorded.tensors.len() as u64,
        bytes: merged.names().filter_map(|name| merged.info(name)).map(TensorInfo::bytes).sum(),
        warnings: merged.warnings().iter().map(Note::from).collect(),
    })
}

/// What is not as recorded; empty if there is no record of digests.
///
/// # Errors
/// As [`verify_digests`], but for what it finds.
pub(super) fn unlike_recorded(merged: &Checkpoint, options: &VerifyOptions, progress: &dyn Progress) -> Result<Vec<Diagnostic>> {
    match Record::of(merged)?.digests {
        Some(recorded) if options.sample.is_none() => differences(merged, &recorded, options, progress),
        _ => Ok(Vec::new()),
    }
}

fn differences(
    merged: &Checkpoint,
    recorded: &Digests,
    options: &VerifyOptions,
    progress: &dyn Progress,
) -> Result<Vec<Diagnostic>> {
    let names: Vec<&str> = merged.names().collect();
    let found: BTreeMap<&str, String> = on_threads(&options.exec, || {
        names.par_iter().map(|name| Ok((*name, digest(merged, name, progress)?))).collect::<Result<_>>()
    })?;
    let help = "the checkpoint was changed after it was written, or is damaged; merge again, or get it again";
    let mut problems = Vec::new();
    if Digests::of(recorded.tensors.clone()).content != recorded.content {
        let message = format!("the content root in {RECORD} does not follow from the digests in it");
        problems.push(Diagnostic::new(rules::CONTENT_ROOT, message).file(merged.path()).help(help));
    }
    for (name, stated) in &recorded.tensors {
        match found.get(name.as_str()) {
            Some(digest) if digest == stated => {}
            Some(_) => {
                let message = format!("the bytes of {name:?} are not those that were written, by the digest in {RECORD}");
                problems.push(Diagnostic::new(rules::TENSOR_DIGEST, message).file(merged.path()).tensor(name).help(help));
            }
            None => {
                let message = format!("{name:?} was written and is not there");
                problems.push(Diagnostic::new(rules::CONTENT_ROOT, message).file(merged.path()).tensor(name).help(help));
            }
        }
    }
    for name in found.keys().filter(|name| !recorded.tensors.contains_key(**name)) {
        let message = format!("{name:?} is there and was not written");
        problems.push(Diagnostic::new(rules::CONTENT_ROOT, message).file(merged.path()).tensor(*name).help(help));
    }
    Ok(problems)
}

fn digest(merged: &Checkpoint, name: &str, progress: &dyn Progress) -> Result<String> {
    let Some(info) = merged.info(name) else { return Ok(String::new()) };
    let mut hash = tensor_digest(info);
    pieces(info.bytes(), |offset, bytes| {
        if progress.cancelled() {
            return Err(exec::interrupted());
        }
        merged.read(name, offset, bytes)?;
        hash.update(bytes);
        progress.advance(bytes.len() as u64);
        Ok(())
    })?;
    Ok(hash.finish())
}

//! The answer for a whole checkpoint, from the verdicts on its tensors.

use crate::error::Diagnostic;
use crate::report::text::{count, plural};
use crate::report::{StructureFinding, Untouched, Verdict, VerifiedTensor};
use crate::rules;

/// The answer for the whole checkpoint.
pub(super) fn overall(tensors: &[VerifiedTensor], untouched: &Untouched, structure: &[StructureFinding]) -> (Verdict, String) {
    let wrong: Vec<&VerifiedTensor> = tensors.iter().filter(|tensor| !tensor.verdict.is_merged()).collect();
    let faults = structure.iter().filter(|finding| finding.fault).count() as u64;
    let all = plural(tensors.len() as u64, "changed tensor");
    let mut parts = Vec::new();
    let verdict = match wrong.first() {
        None if faults > 0 => Verdict::OtherTensors,
        None if !untouched.differ.is_empty() => Verdict::OthersDiffer,
        None => {
            let verdict = tensors.iter().map(|tensor| tensor.verdict).max().unwrap_or(Verdict::Merged);
            let says = match verdict {
                Verdict::Merged => "merged: every value is correctly rounded",
                Verdict::RoundingLost => "merged; rounding lost part of the update",
                Verdict::MergedLowerPrecision => "merged, in a lower precision",
                _ => "merged, with other rounding",
            };
            return (verdict, says.to_owned());
        }
        Some(first) if wrong.len() == tensors.len() && wrong.iter().all(|tensor| tensor.verdict == first.verdict) => {
            parts.push(match wrong.len() {
                1 => first.says.clone(),
                _ => format!("in all of {all}: {}", words(first.verdict)),
            });
            first.verdict
        }
        Some(first) => {
            let one = wrong.iter().all(|tensor| tensor.verdict == first.verdict);
            let what = if one { words(first.verdict) } else { "not what a merge gives" };
            parts.push(format!("{} of {all}: {what}", count(wrong.len() as u64)));
            if one { first.verdict } else { Verdict::Mixed }
        }
    };
    if !untouched.differ.is_empty() {
        let differ = untouched.differ.len() as u64;
        parts.push(format!("{} that no adapter changes {} not the base's", plural(differ, "tensor"), are(differ)));
    }
    if faults > 0 {
        parts.push(format!("{} {} missing, new or of another form", plural(faults, "tensor"), are(faults)));
    }
    (verdict, parts.join("; "))
}

fn are(n: u64) -> &'static str {
    if n == 1 { "is" } else { "are" }
}

/// A verdict without its figures.
fn words(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::NotMerged => "not merged, the base's",
        Verdict::MergedTwice => "merged twice",
        Verdict::Subtracted => "subtracted",
        Verdict::ScaleIgnored => "the scale was ignored",
        Verdict::AlphaNotDivided => "alpha was taken for the scale",
        Verdict::WeightIgnored => "the weight was ignored",
        Verdict::RsloraMissing => "the rsLoRA scale is missing",
        Verdict::RsloraApplied => "the rsLoRA scale was applied",
        Verdict::OtherScale => "merged with another scale",
        Verdict::Transposed => "merged transposed",
        Verdict::AdapterMissing => "an adapter is missing",
        Verdict::OtherTensor => "another tensor's update was added",
        _ => "not what a merge gives",
    }
}

/// The warning that rounding lost part of the update.
pub(super) fn lost(tensors: &[VerifiedTensor]) -> Option<Diagnostic> {
    let lost: Vec<&VerifiedTensor> = tensors.iter().filter(|tensor| tensor.verdict == Verdict::RoundingLost).collect();
    let first = lost.first()?;
    let message = format!(
        "rounding loses part of the update in {} (the first is {:?}, of which {:.1} % survives)",
        plural(lost.len() as u64, "tensor"),
        first.tensor,
        100.0 * first.gain_expected.unwrap_or(0.0)
    );
    let help = "the update is smaller than the steps of the dtype; merge into a base of a wider dtype";
    Some(Diagnostic::new(rules::UPDATE_SURVIVES, message).help(help))
}

//! `verify`: is this checkpoint that base with those adapters merged in? Answered from the weights alone, by what a plan of the merge
//! says of every tensor. Nothing is written.

use std::collections::{HashMap, HashSet};

use rayon::prelude::*;

use super::account::check_repeats;
use super::digests::verify_stated;
use super::identity;
use super::judge::{Judge, named};
use super::overall::{lost, overall};
use super::recorded::unlike_recorded;
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Error, Result};
use crate::exec::{Comparison, ExecOptions, Progress, on_threads};
use crate::limits::Limits;
use crate::plan::{BindOptions, Plan, Weighted};
use crate::report::{AdapterUse, DifferingTensor, Note, StructureFinding, Untouched, VerifiedTensor, VerifyReport};
use crate::rules;
use crate::tensor::{Dtype, TensorInfo, TensorSource, is_plain_float};

/// How to verify. `Default` reads everything, on all cores.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct VerifyOptions {
    /// What may be relaxed in binding; as in the merge.
    pub bind: BindOptions,
    /// Threads.
    pub exec: ExecOptions,
    /// The share of every tensor to read, over 0 and up to 1. Default none: all of it.
    pub sample: Option<f64>,
    /// Accept the same adapter more than once. Default false: two adapters of equal content are refused.
    pub allow_repeat: bool,
    /// Bounds on input.
    pub limits: Limits,
}

/// Says whether `merged` is `base` with `adapters` merged in, and if not, what it is instead.
///
/// A "no" is an answer and not an error: see [`VerifyReport::is_merged`]. Where `merged` records digests of its tensors, those that are no
/// longer right are among the warnings.
///
/// # Errors
/// Everything that [`Plan::new`] finds; `U-001` for a share that is none; `A-027`, `A-032` and `C-037` as in a merge; `A-008`, `E-001`
/// and `E-004` while reading; `E-006` if `progress` cancels.
pub fn verify(
    merged: &Checkpoint,
    base: &Checkpoint,
    adapters: &[Weighted<'_>],
    options: &VerifyOptions,
    progress: &dyn Progress,
) -> Result<VerifyReport> {
    let share = options.sample.unwrap_or(1.0);
    if !(share > 0.0 && share <= 1.0) {
        let error = Error::new(rules::ARGUMENT, format!("the sample {share} is not a share"));
        return Err(error.help("give a number over 0 and up to 1, such as 0.05"));
    }
    if adapters.is_empty() {
        return Err(Error::new(rules::ARGUMENT, "no adapter is given"));
    }
    let plan = Plan::new(base, adapters, &options.bind, &options.limits)?;
    if !options.allow_repeat {
        check_repeats(adapters)?;
    }
    let (uses, mut warnings) = uses(base, &plan, adapters, options)?;
    warnings.extend(unlike_recorded(merged, options, &())?);
    let structure = structure(&plan, merged);
    let comparison = Comparison { plan: &plan, merged, share, progress };
    let untouched = untouched_names(&plan, merged);
    let (tensors, differences) = on_threads(&options.exec, || {
        let tensors = Judge::new(&comparison, adapters).all()?;
        let differences: Result<Vec<_>> = untouched.par_iter().map(|name| comparison.difference(name)).collect();
        Ok::<_, Error>((tensors, differences?))
    })?;
    let mut bytes_compared = tensors.iter().map(|(_, figures)| figures.bytes).sum();
    let mut others = Untouched { tensors: untouched.len() as u64, ..Default::default() };
    for (name, difference) in untouched.iter().zip(differences) {
        bytes_compared += difference.compared;
        match (difference.first, merged.info(name)) {
            (Some(offset), Some(info)) => others.differ.push(DifferingTensor {
                tensor: (*name).to_owned(),
                offset,
                index: index(info, offset),
                differing: difference.count,
            }),
            _ => others.same += 1,
        }
    }
    let ulps = tensors.iter().fold([0; 6], |mut sum: [u64; 6], (_, figures)| {
        sum.iter_mut().zip(figures.ulps).for_each(|(x, y)| *x += y);
        sum
    });
    let tensors: Vec<VerifiedTensor> = tensors.into_iter().map(|(tensor, _)| tensor).collect();
    let (verdict, says) = overall(&tensors, &others, &structure);
    let mut report = VerifyReport {
        merged: merged.path().display().to_string(),
        base: base.path().display().to_string(),
        adapters: uses,
        verdict,
        is_merged: verdict.is_merged(),
        says,
        values: tensors.iter().map(|tensor| tensor.values).sum(),
        correct: ulps[0],
        ulps: named(ulps),
        tensors,
        untouched: others,
        structure,
        sample: options.sample.filter(|&share| share < 1.0),
        bytes: merged.names().filter_map(|name| merged.info(name)).map(TensorInfo::bytes).sum(),
        bytes_compared,
        warnings: warnings.iter().map(Note::from).collect(),
    };
    report.warnings.extend(lost(&report.tensors).iter().map(Note::from));
    Ok(report)
}

/// What is known of the adapters, as in a merge.
fn uses(
    base: &Checkpoint,
    plan: &Plan<'_>,
    adapters: &[Weighted<'_>],
    options: &VerifyOptions,
) -> Result<(Vec<AdapterUse>, Vec<Diagnostic>)> {
    let (mut uses, mut warnings) = (Vec::new(), base.warnings().to_vec());
    for (weighted, renaming) in adapters.iter().zip(plan.renamings()) {
        verify_stated(weighted.adapter)?;
        warnings.extend(weighted.adapter.warnings().iter().cloned());
        let (identity, warning) = identity::check(base, weighted.adapter, &options.bind, &options.limits)?;
        warnings.extend(warning);
        uses.push(AdapterUse {
            path: weighted.adapter.label().to_owned(),
            dialect: weighted.adapter.dialect(),
            weight: weighted.weight,
            renaming: Some(renaming).filter(|r| !r.is_identity()).cloned(),
            base_identity: identity.name(),
        });
    }
    warnings.extend(plan.warnings().iter().cloned());
    Ok((uses, warnings))
}

/// What a merge holds by name, and what is there.
fn structure(plan: &Plan<'_>, merged: &Checkpoint) -> Vec<StructureFinding> {
    // What changes its dtype on request is planned as the base has it; what is new, or has another shape, as the plan says.
    let planned: HashMap<&str, &TensorInfo> = plan
        .changes()
        .filter(|change| change.added || change.moves(plan.base()))
        .map(|change| (change.name.as_str(), &change.info))
        .collect();
    let planned = |name: &str| planned.get(name).copied().or_else(|| plan.base().info(name));
    let describe = |info: &TensorInfo| format!("{} {}", info.dtype, info.shape);
    let added = plan.added().map(|change| change.name.as_str());
    let mut findings = Vec::new();
    let mut known: HashSet<&str> = HashSet::new();
    for name in plan.base().names().chain(added) {
        known.insert(name);
        let Some(expected) = planned(name) else { continue };
        let (finding, found, fault) = match merged.info(name) {
            None => ("missing", None, true),
            Some(found) if found.shape != expected.shape => ("shape", Some(found), true),
            Some(found) if found.dtype != expected.dtype => ("dtype", Some(found), !convertible(expected.dtype, found.dtype)),
            Some(_) => continue,
        };
        let (expected, found) = (Some(describe(expected)), found.map(describe));
        findings.push(StructureFinding { tensor: name.to_owned(), finding, expected, found, fault });
    }
    for name in merged.names().filter(|name| !known.contains(name)) {
        let found = merged.info(name).map(describe);
        findings.push(StructureFinding { tensor: name.to_owned(), finding: "extra", expected: None, found, fault: true });
    }
    findings
}

fn convertible(expected: Dtype, found: Dtype) -> bool {
    is_plain_float(expected) && is_plain_float(found)
}

/// Tensors that no adapter changes and that both checkpoints hold in one shape, in comparable dtypes.
fn untouched_names<'p>(plan: &Plan<'p>, merged: &Checkpoint) -> Vec<&'p str> {
    let changed: HashSet<&str> = plan.changes().map(|change| change.name.as_str()).collect();
    let same = |name: &&str| match (plan.base().info(name), merged.info(name)) {
        (Some(x), Some(y)) => x.shape == y.shape && (x.dtype == y.dtype || convertible(x.dtype, y.dtype)),
        _ => false,
    };
    plan.base().names().filter(|name| !changed.contains(name)).filter(same).collect()
}

/// The indices of the value that holds a byte.
fn index(info: &TensorInfo, offset: u64) -> Vec<u64> {
    let bits = info.dtype.bitsize() as u64;
    let mut rest = offset.saturating_mul(8) / bits.max(1);
    let mut at = Vec::new();
    for &dim in info.shape.dims().iter().rev() {
        at.push(rest % dim.max(1));
        rest /= dim.max(1);
    }
    at.reverse();
    at
}

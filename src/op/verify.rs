//! `verify`: is this checkpoint that base with those adapters merged in? Answered from the weights alone, by what a plan of the merge
//! says of every tensor. Nothing is written.

use std::collections::{HashMap, HashSet};

use rayon::prelude::*;

use super::digests::verify_stated;
use super::identity;
use super::merge::check_repeats;
use super::verdict::{Applied, Gains, Judgement, explains, judge, scaled, times};
use crate::adapter::Scaling;
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Error, Result};
use crate::exec::{Alternative, Comparison, ExecOptions, Figures, Lay, Progress, float_of, on_threads};
use crate::limits::Limits;
use crate::plan::{BindOptions, Change, Panel, Plan, Weighted};
use crate::report::text::{count, plural};
use crate::report::{
    AdapterUse, DifferingTensor, Note, StructureFinding, Ulps, Untouched, Verdict, VerifiedTensor, VerifyReport,
};
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
/// A "no" is an answer and not an error: see [`VerifyReport::is_merged`].
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
    let (uses, warnings) = uses(base, &plan, adapters, options)?;
    let structure = structure(&plan, merged);
    let comparison = Comparison { plan: &plan, merged, share, progress };
    let untouched = untouched_names(&plan, merged);
    let (tensors, differences) = on_threads(&options.exec, || {
        let tensors = Judge { comparison: &comparison, scalings: scalings(adapters), adapters }.all()?;
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

/// The scaling of every factor by adapter and name.
type Scalings<'a> = HashMap<(usize, &'a str), Scaling>;

fn scalings<'a>(adapters: &[Weighted<'a>]) -> Scalings<'a> {
    let mut found = HashMap::new();
    for (i, weighted) in adapters.iter().enumerate() {
        for target in weighted.adapter.targets() {
            let factors = [Some(&target.a), Some(&target.b), target.bias.as_ref().map(|bias| &bias.delta)];
            found.extend(factors.into_iter().flatten().map(|factor| ((i, factor.name()), target.scaling)));
        }
    }
    found
}

struct Judge<'p, 'a> {
    comparison: &'p Comparison<'p, 'a>,
    scalings: Scalings<'a>,
    adapters: &'p [Weighted<'a>],
}

impl Judge<'_, '_> {
    /// Every changed tensor that can be compared: there, in its shape, and a plain float.
    fn all(&self) -> Result<Vec<(VerifiedTensor, Figures)>> {
        let changes: Vec<&Change<'_>> = self.comparison.plan.changes().collect();
        let comparable: Vec<(&Change<'_>, &TensorInfo)> = changes
            .iter()
            .filter_map(|change| {
                let info = self.comparison.merged.info(&change.name)?;
                (info.shape == change.info.shape && is_plain_float(info.dtype)).then_some((*change, info))
            })
            .collect();
        comparable.par_iter().map(|(change, info)| self.one(change, info, &changes)).collect()
    }

    fn one(&self, change: &Change<'_>, info: &TensorInfo, all: &[&Change<'_>]) -> Result<(VerifiedTensor, Figures)> {
        let stored = float_of(info.dtype).unwrap_or_else(|| unreachable!("only plain floats are compared"));
        let figures = self.comparison.figures(change, stored)?;
        let gains = Gains::of(&figures);
        let rounding = gains.map_or(0.0, |gains| gains.rounding);
        let (said, other) = match judge(&figures, change.contributions.len(), self.applied(change)) {
            Judgement::Settled(said) => (said, None),
            Judgement::Scaled(gain, names) => {
                let again = Alternative { update: change, lay: Lay::AsIs, factor: 2.0 };
                let probes = self.comparison.probe(change, stored, &[again])?;
                let (in_two, at_once) = probes.first().map_or((0, 0), |probe| (probe.in_two, probe.at_once));
                (scaled(gain, names, in_two, at_once), None)
            }
            Judgement::Search(said) => {
                let candidates = candidates(change, all);
                let probes = self.comparison.probe(change, stored, &candidates)?;
                let fits = candidates.iter().zip(&probes).filter_map(|(candidate, probe)| {
                    let (gain, residual) = probe.gain()?;
                    explains(gain, residual, rounding).then_some((candidate, gain, residual))
                });
                match fits.min_by(|x, y| x.2.total_cmp(&y.2)) {
                    None => (said, None),
                    Some((found, gain, _)) if found.lay == Lay::Transposed => {
                        ((Verdict::Transposed, format!("the update was added transposed{}", times(gain))), None)
                    }
                    Some((found, gain, _)) => {
                        let name = &found.update.name;
                        let says = format!("the update of {name:?} was added instead{}", times(gain));
                        ((Verdict::OtherTensor, says), Some(name.clone()))
                    }
                }
            }
        };
        let ratio = |x: f64, y: f64| (y > 0.0).then(|| (x / y).sqrt());
        let tensor = VerifiedTensor {
            tensor: change.name.clone(),
            dtype: info.dtype.to_string(),
            shape: info.shape.dims().to_vec(),
            verdict: said.0,
            says: said.1,
            other,
            values: figures.values,
            relative_norm: ratio(figures.delta, figures.base).filter(|_| gains.is_some()),
            gain: gains.map(|gains| gains.gain),
            gain_error: gains.map(|gains| gains.error),
            gain_expected: gains.map(|gains| gains.expected),
            residual: gains.and_then(|gains| ratio(gains.left, figures.base)),
            residual_of_update: gains.map(|gains| gains.residual),
            ulps: named(figures.ulps),
            nonfinite: figures.nonfinite,
        };
        Ok((tensor, figures))
    }

    /// How a tensor with one contribution is scaled; several have no scale in common.
    fn applied(&self, change: &Change<'_>) -> Option<Applied> {
        let [contribution] = &change.contributions[..] else { return None };
        let (Panel::Direct(factor) | Panel::Transposed(factor)) = &contribution.right else { return None };
        let scaling = *self.scalings.get(&(contribution.adapter, factor.name()))?;
        Some(Applied { scaling, weight: self.adapters.get(contribution.adapter)?.weight })
    }
}

/// What may have been added instead: the update transposed, or that of any other tensor of the same shape.
fn candidates<'p, 'a>(change: &Change<'_>, all: &[&'p Change<'a>]) -> Vec<Alternative<'p, 'a>> {
    let square = change.info.shape.matrix().is_some_and(|(rows, cols)| rows == cols);
    let fits = |other: &&&Change<'_>| !other.contributions.is_empty() && other.info.shape == change.info.shape;
    all.iter()
        .filter(fits)
        .filter_map(|other| {
            let lay = if other.name == change.name { Lay::Transposed } else { Lay::AsIs };
            (lay == Lay::AsIs || square).then_some(Alternative { update: other, lay, factor: 1.0 })
        })
        .collect()
}

/// What a merge holds by name, and what is there.
fn structure(plan: &Plan<'_>, merged: &Checkpoint) -> Vec<StructureFinding> {
    let planned = |name: &str| {
        let added = plan.shards.iter().flat_map(|shard| &shard.added).find(|(added, _)| added == name);
        plan.base().info(name).or(added.map(|(_, info)| info))
    };
    let describe = |info: &TensorInfo| format!("{} {}", info.dtype, info.shape);
    let added = plan.shards.iter().flat_map(|shard| shard.added.iter().map(|(name, _)| name.as_str()));
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

fn named(ulps: [u64; 6]) -> Ulps {
    let [none, one, two, to_4, to_16, more] = ulps;
    Ulps { none, one, two, to_4, to_16, more }
}

/// The answer for the whole checkpoint.
fn overall(tensors: &[VerifiedTensor], untouched: &Untouched, structure: &[StructureFinding]) -> (Verdict, String) {
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
        Verdict::OtherTensor => "another tensor's update was added",
        _ => "not what a merge gives",
    }
}

/// The warning that rounding lost part of the update.
fn lost(tensors: &[VerifiedTensor]) -> Option<Diagnostic> {
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

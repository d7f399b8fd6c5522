//! `extract`: the adapter that is closest to the difference of two checkpoints. The difference is read in sweeps and never held; its largest
//! singular components are found by block Krylov iteration, with a certificate of what is left; what has no low rank is listed, stored or
//! refused. Memory depends on the largest weight and the number of threads, not on the checkpoints.

mod decompose;
mod layer;
mod metric;
mod options;
mod rest;
mod stats;

use std::path::Path;
use std::sync::Arc;

use regex::Regex;
use serde_json::json;

use super::ConvertTo;
use super::crew;
use super::rank::{RankRule, Share, divide, is_over};
use super::spool::{Spool, Spooled};
use super::write;
use crate::adapter::{Adapter, AdapterParts, BaseIdentity, Factor, Lineage, Replacement, Scaling, ScalingRule, Target};
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Error, Result};
use crate::exec::{self, Progress};
use crate::io::check_output;
use crate::limits::Limits;
use crate::plan::{Choice, Layer, Pairs, Whole, in_memory};
use crate::report::text::plural;
use crate::report::{ExtractReport, ExtractedTarget, Note, OmittedTarget, RestTensor};
use crate::rules;
use crate::tensor::{TensorInfo, TensorSource, pieces};

pub(super) use decompose::{Decomposed, Task, decompose, share};
pub(super) use layer::bytes;
use layer::{Fate, Outcome, Site};
pub use options::{ExtractOptions, Method, RestPolicy, Split};
use rest::Changed;
pub use stats::ActStats;

/// Sweeps of a weight that an extraction mostly takes: what progress is counted by.
const SWEEPS: u64 = 4;
/// Why a change is left out that the statistics of the inputs do not see.
const NO_INPUT: &str = "no input reaches it";
/// A budget is divided among the components up to this multiple of the mean rank.
const SPREAD: u64 = 4;

/// Writes the adapter whose update is closest to `tuned - base`, target by target, or to the weights of `tuned` themselves without a base.
/// `progress` counts the bytes that are read.
///
/// The same inputs, options and seed give the same bytes on every number of threads, and on machines with the same instruction set.
///
/// # Errors
/// `U-001` for options that contradict themselves; `U-008` if nothing changed, or nothing that can be extracted; `U-009` if what would be left
/// out is too much; `A-020`, `A-025` if the checkpoints do not fit; `A-030` if a value is not finite, `A-031` if a factor leaves the range of
/// its dtype; `E-012` if a decomposition does not converge; `U-002`, `U-003`, `E-002` for the output; `E-001`, `E-004`, `E-006`. On any error
/// the output is what it was before.
pub fn extract(
    base: Option<&Checkpoint>,
    tuned: &Checkpoint,
    output: &Path,
    options: &ExtractOptions,
    progress: &dyn Progress,
) -> Result<ExtractReport> {
    options.check()?;
    if base.is_none() && options.rest != RestPolicy::SkipSmall {
        let message = "without a base nothing is a change that has no factors";
        return Err(Error::new(rules::ARGUMENT, message).file(tuned.path()).help("leave --rest out, or give --base"));
    }
    let mut inputs: Vec<&Path> = base.into_iter().chain([tuned]).map(Checkpoint::path).collect();
    inputs.extend(options.act_stats.as_ref().map(ActStats::label));
    check_output(output, write::kind(options.to).0, &inputs, options.overwrite)?;
    let pairs = pair(base, tuned, options)?;
    let mut warnings: Vec<Diagnostic> = base.into_iter().chain([tuned]).flat_map(|c| c.warnings().to_vec()).collect();
    if let Some(stats) = &options.act_stats {
        warnings.extend(stats.check(&pairs.layers)?);
    }
    progress.expect(expected(&pairs.layers, tuned, options));
    let site = Site { base, tuned, options, progress };
    let spool = Spool::new(output)?;
    let (outcomes, changed, same) = exec::on_threads(&options.exec, || -> Result<_> {
        let (changed, same) = rest::changed(&pairs.rest, base, tuned, progress)?;
        rest::check(&changed, options.rest).map_err(|error| error.file(tuned.path()))?;
        Ok((outcomes(&site, &pairs.layers, &spool)?, changed, same))
    })?;

    let total: f64 =
        outcomes.iter().map(|outcome| outcome.norm_squared).chain(changed.iter().filter_map(|one| one.squared)).sum();
    let rest = rest::settle(&changed, total, options.rest, &mut warnings).map_err(|error| error.file(tuned.path()))?;
    store(&changed, &rest, tuned, &spool)?;
    let sums = Sums::of(&outcomes, &changed, &rest, total);
    let mut unchanged = same;
    let (mut targets, mut omitted, mut layers) = (Vec::new(), Vec::new(), Vec::new());
    for (outcome, layer) in outcomes.into_iter().zip(&pairs.layers) {
        match outcome.fate {
            Fate::Unchanged => unchanged += 1,
            Fate::Omitted(omission) => omitted.push(omission),
            Fate::Extracted(target) => {
                targets.push(target);
                layers.push(layer);
            }
        }
    }
    if targets.is_empty() && rest.iter().all(|one| !one.stored) {
        return Err(nothing(tuned, unchanged, &omitted, &changed));
    }
    clamped(&targets, options, &mut warnings);
    warnings.extend(missed(&targets, options));
    warnings.extend(unreached(&targets, options));
    warnings.extend(replaced(&targets));
    if let Some(first) = pairs.only_in_base.first() {
        let count = plural(pairs.only_in_base.len() as u64, "tensor");
        let message =
            format!("the tuned checkpoint lacks {count} of the base, the first {first:?}; no adapter takes a tensor out");
        warnings.push(Diagnostic::new(rules::EVERY_TARGET, message).file(tuned.path()));
    }
    let identity = BaseIdentity {
        name: base.map(|base| options.base_name.clone().unwrap_or_else(|| base.path().display().to_string())),
        structure: base.map(Checkpoint::structure_root),
        targets: None,
    };
    let model_type = base.unwrap_or(tuned).config().model_type.as_deref();
    // PEFT names modules, and a container tensors of a file.
    let name = |tensor: &str| match (options.to, model_type) {
        (ConvertTo::Peft, Some(model_type)) => in_memory(model_type, tensor),
        _ => tensor.to_owned(),
    };
    let adapter = adapter(spool.finish(), &layers, &targets, &rest, identity.clone(), &options.limits, &name)?;
    warnings.extend(adapter.warnings().iter().cloned());
    let step = Lineage {
        op: "extract".to_owned(),
        tool: format!("loratool {}", env!("CARGO_PKG_VERSION")),
        inputs: Vec::new(),
        parameters: parameters(options),
    };
    let unchanged_inputs = || {
        base.into_iter().chain([tuned]).try_for_each(TensorSource::unchanged)?;
        options.act_stats.as_ref().map_or(Ok(()), ActStats::unchanged)
    };
    let written = write::write(&adapter, &identity, step, (output, options.to, options.overwrite), unchanged_inputs, progress)?;
    Ok(ExtractReport {
        base: base.map(|base| base.path().display().to_string()),
        tuned: tuned.path().display().to_string(),
        output: output.display().to_string(),
        to: write::kind(options.to).1,
        dtype: options.dtype.to_string(),
        seed: options.seed,
        parameters: adapter.targets().iter().flat_map(Target::factors).map(|factor| factor.info().shape.elements()).sum(),
        targets,
        omitted,
        unchanged,
        rest,
        only_in_base: pairs.only_in_base,
        renamed: (!pairs.renaming.is_identity()).then(|| (pairs.renaming.from.clone(), pairs.renaming.to.clone())),
        change: total.sqrt(),
        error: sums.error,
        excess: sums.excess,
        lost: sums.lost,
        bytes: written.bytes,
        content: written.content,
        losses: written.losses.iter().map(Note::from).collect(),
        warnings: warnings.iter().map(Note::from).collect(),
    })
}

fn pair(base: Option<&Checkpoint>, tuned: &Checkpoint, options: &ExtractOptions) -> Result<Pairs> {
    let compiled = |pattern: &Option<String>| -> Result<Option<Regex>> {
        let bad = |text: &str, e: regex::Error| {
            // Its last line says why; those before draw an arrow.
            let e = e.to_string();
            let why = e.lines().last().unwrap_or_default().trim_start_matches("error: ");
            Error::new(rules::ARGUMENT, format!("{text:?} is no regular expression: {why}"))
                .help("a dot is \\. and any text is .*")
        };
        pattern.as_ref().map(|text| Regex::new(text).map_err(|e| bad(text, e))).transpose()
    };
    let (targets, exclude) = (compiled(&options.targets)?, compiled(&options.exclude)?);
    let is_target = targets.as_ref().map(|targets| |name: &str| targets.is_match(name));
    let excluded = |name: &str| exclude.as_ref().is_some_and(|exclude| exclude.is_match(name));
    let choice = Choice { targets: is_target.as_ref().map(|f| f as &dyn Fn(&str) -> bool), excluded: &excluded };
    let pairs = Pairs::new(base, tuned, &choice)?;
    if let (true, Some(text)) = (pairs.layers.is_empty(), &options.targets) {
        let message = format!("--targets {text:?} matches no weight that can have factors");
        return Err(Error::new(rules::ARGUMENT, message).file(tuned.path()).help("loratool inspect --tensors lists the names"));
    }
    Ok(pairs)
}

/// Bytes that will be read, by the usual number of sweeps.
fn expected(layers: &[Layer], tuned: &Checkpoint, options: &ExtractOptions) -> u64 {
    let of = |layer: &Layer| tuned.info(&layer.tuned).map_or(0, TensorInfo::bytes);
    let twice = if matches!(options.rank, RankRule::Parameters(_) | RankRule::Bytes(_)) { 2 } else { 1 };
    layers.iter().map(of).fold(0, u64::saturating_add).saturating_mul(2 * SWEEPS * twice)
}

/// Every layer by its rule. A budget is divided by the singular values of all layers, which takes a run of its own.
fn outcomes(site: &Site<'_>, layers: &[Layer], spool: &Spool) -> Result<Vec<Outcome>> {
    let sizes: Vec<u64> = layers.iter().map(|layer| layer.slices * layer.rows * layer.cols).collect();
    let cost = |layer: &Layer| layer.slices * (layer.rows + layer.cols);
    let budget = match site.options.rank {
        RankRule::Parameters(budget) => budget,
        RankRule::Bytes(bytes) => bytes / exec::float_of(site.options.dtype).map_or(4, |float| float.size() as u64),
        rule => return crew::each(&sizes, |i| site.extract(&layers[i], rule, spool)),
    };
    let all: u64 = layers.iter().map(cost).sum();
    let cap = (budget.saturating_mul(SPREAD) / all.max(1)).max(16).min(site.options.max_rank);
    let values = crew::each(&sizes, |i| site.values(&layers[i], cap))?;
    let shares: Vec<Share<'_>> =
        values.iter().zip(layers).map(|(values, layer)| Share { values, cost: cost(layer), least: 0 }).collect();
    let ranks = divide(&shares, budget);
    if ranks.iter().all(|rank| *rank == 0) && values.iter().any(|values| !values.is_empty()) {
        let least = layers.iter().map(cost).min().unwrap_or(0);
        let message = format!("the budget of {budget} values has no room for one component, which takes at least {least}");
        return Err(Error::new(rules::ARGUMENT, message).help("give a larger budget"));
    }
    crew::each(&sizes, |i| match ranks[i] {
        0 => site.without(&layers[i]),
        rank => site.extract(&layers[i], RankRule::Fixed(rank), spool),
    })
}

/// Copies the tensors that are stored whole.
fn store(changed: &[Changed], rest: &[RestTensor], tuned: &Checkpoint, spool: &Spool) -> Result<()> {
    for (one, _) in changed.iter().zip(rest).filter(|(_, report)| report.stored) {
        let Some(info) = tuned.info(&one.rest.tuned) else { continue };
        let place = spool.reserve(&one.rest.tensor, info.clone());
        pieces(info.bytes(), |offset, piece| {
            tuned.read(&one.rest.tuned, offset, piece)?;
            spool.put(place, offset, piece)
        })?;
    }
    Ok(())
}

/// The figures over everything.
struct Sums {
    error: f64,
    excess: f64,
    lost: f64,
}

impl Sums {
    fn of(outcomes: &[Outcome], changed: &[Changed], rest: &[RestTensor], total: f64) -> Sums {
        let extracted = |outcome: &&Outcome| matches!(outcome.fate, Fate::Extracted(_));
        let over = |of: &dyn Fn(&Outcome) -> f64| outcomes.iter().filter(extracted).map(of).sum::<f64>();
        let (norm, error) = (over(&|o| o.norm_squared), over(&|o| o.error_squared));
        // (1 + excess)² is the ratio of the squares of the errors.
        let optimal = over(&|o| match &o.fate {
            Fate::Extracted(target) => o.error_squared / (1.0 + target.excess).powi(2),
            _ => 0.0,
        });
        let left_out: f64 = outcomes.iter().map(|o| o.error_squared).sum::<f64>()
            + changed.iter().zip(rest).filter(|(_, r)| !r.stored).filter_map(|(one, _)| one.squared).sum::<f64>();
        Sums {
            error: if norm > 0.0 { (error / norm).sqrt() } else { 0.0 },
            excess: if optimal > 0.0 { (error / optimal).sqrt() - 1.0 } else { 0.0 },
            lost: if total > 0.0 { left_out / total } else { 0.0 },
        }
    }
}

/// The error if there is nothing to write.
fn nothing(tuned: &Checkpoint, unchanged: u64, omitted: &[OmittedTarget], changed: &[Changed]) -> Error {
    let (message, help) = match (omitted.first(), changed.is_empty()) {
        (None, true) => (
            format!("the checkpoints are the same in {}", plural(unchanged, "tensor")),
            "give the tuned checkpoint with --tuned and the one that it comes from with --base",
        ),
        (None, false) => (
            format!("only tensors changed that have no factors: {}", plural(changed.len() as u64, "tensor")),
            "--rest store keeps them whole",
        ),
        (Some(first), _) if omitted.iter().all(|one| one.why == "unrecoverable") => (
            format!(
                "unrecoverable: rounding has destroyed the change, of which about {:.0} % is left in {:?}",
                100.0 * first.survived.unwrap_or(0.0),
                first.tensor
            ),
            "extract from a checkpoint that was saved in a wider dtype, or give --rank to take what there is",
        ),
        (Some(first), _) if omitted.iter().all(|one| one.why == NO_INPUT) => (
            format!("no change is seen by any input of --act-stats, the first {:?}", first.tensor),
            "check that the statistics are those of this model",
        ),
        (Some(_), _) => (
            format!("no component stands out of the noise of rounding in {}", plural(omitted.len() as u64, "changed weight")),
            "extract from a checkpoint that was saved in a wider dtype, or give --rank to take what there is",
        ),
    };
    Error::new(rules::SOME_CHANGE, message).file(tuned.path()).help(help)
}

/// Weights that changed by more than they were: they are new ones rather than tuned ones, and no low rank says much of them.
fn replaced(targets: &[ExtractedTarget]) -> Option<Diagnostic> {
    let new: Vec<&ExtractedTarget> =
        targets.iter().filter(|target| target.relative.is_some_and(|relative| relative > 1.0)).collect();
    let first = new.first()?;
    let message = format!(
        "{} changed by more than they were, the first {:?} by {:.1} times, and {:.0} % of that is lost at rank {}",
        plural(new.len() as u64, "weight"),
        first.tensor,
        first.relative.unwrap_or(0.0),
        100.0 * first.error,
        first.rank
    );
    let help = "they were trained anew rather than tuned: keep them whole in a checkpoint, or leave them out with --exclude";
    Some(Diagnostic::new(rules::LITTLE_LEFT_OUT, message).tensor(&first.tensor).help(help))
}

/// Says where a promise of the rule was not kept: by the highest rank that is allowed, or by the rounding of the factors.
fn missed(targets: &[ExtractedTarget], options: &ExtractOptions) -> Option<Diagnostic> {
    let allowed = options.rank.allowed()?;
    let over = |target: &&ExtractedTarget| is_over(target.weighted_error.unwrap_or(target.error), allowed);
    let worse: Vec<&ExtractedTarget> = targets.iter().filter(over).collect();
    let first = worse.first()?;
    let (by, help) = match first.rank == options.max_rank {
        true => ("the highest rank that is allowed", "raise --max-rank"),
        false => ("the rounding of the factors", "store them with --dtype f32, or ask for less"),
    };
    let message = format!(
        "more than {allowed} is lost of {} because of {by}, the first {:?} with {:.4} at rank {}",
        plural(worse.len() as u64, "target"),
        first.tensor,
        first.weighted_error.unwrap_or(first.error),
        first.rank
    );
    Some(Diagnostic::new(rules::RANK_LIMIT, message).tensor(&first.tensor).help(help))
}

/// Says where the iteration was given up before the tolerance, because the matrix is too large for an exact decomposition unasked.
fn unreached(targets: &[ExtractedTarget], options: &ExtractOptions) -> Option<Diagnostic> {
    let above: Vec<&ExtractedTarget> = targets.iter().filter(|target| target.excess > options.tolerance).collect();
    let first = above.first()?;
    let message = format!(
        "the tolerance of {} was not reached for {}, the first {:?} with an excess of about {:.4}",
        options.tolerance,
        plural(above.len() as u64, "target"),
        first.tensor,
        first.excess
    );
    Some(Diagnostic::new(rules::DECOMPOSED, message).tensor(&first.tensor).help("--method exact takes it apart whole, in f64"))
}

/// Says where the rank is less than what was asked for.
fn clamped(targets: &[ExtractedTarget], options: &ExtractOptions, warnings: &mut Vec<Diagnostic>) {
    let RankRule::Fixed(rank) = options.rank else { return };
    let less: Vec<&ExtractedTarget> = targets.iter().filter(|target| target.rank < rank).collect();
    let Some(first) = less.first() else { return };
    let message = format!(
        "the rank of {} is lower than {rank}, which is all that there is ({:?} has {})",
        plural(less.len() as u64, "target"),
        first.tensor,
        first.rank
    );
    warnings.push(Diagnostic::new(rules::RANK_LIMIT, message).tensor(&first.tensor));
}

fn adapter(
    spooled: Spooled,
    layers: &[&Layer],
    targets: &[ExtractedTarget],
    rest: &[RestTensor],
    base: BaseIdentity,
    limits: &Limits,
    name: &dyn Fn(&str) -> String,
) -> Result<Adapter> {
    let source: Arc<dyn TensorSource> = Arc::new(spooled);
    let factor = |name: &str| {
        Factor::new(&source, name).ok_or_else(|| Error::new(rules::READ, "a computed factor is missing").tensor(name))
    };
    let mut made = Vec::with_capacity(layers.len());
    for (layer, target) in layers.iter().zip(targets) {
        let [a, b] = layer::names(layer);
        let scaling = Scaling { rank: target.rank, alpha: target.rank as f64, rule: ScalingRule::Standard };
        let (a, b) = (factor(&a)?, factor(&b)?);
        let values = &target.singular_values;
        made.push(Target {
            tensor: name(&layer.tensor),
            kind: layer.kind,
            a,
            b,
            scaling,
            bias: None,
            magnitude: None,
            singular_values: (!values.is_empty()).then(|| values.clone()),
        });
    }
    let mut replacements = Vec::new();
    for one in rest.iter().filter(|one| one.stored) {
        let shared = one.why == Whole::Tied.name();
        replacements.push(Replacement { tensor: name(&one.tensor), with: factor(&one.tensor)?, shared });
    }
    let label = source.label().display().to_string();
    let parts = AdapterParts { label, dialect: "memory", targets: made, replacements, base, ..Default::default() };
    Adapter::new(parts, limits)
}

/// What decides the result, for the lineage.
fn parameters(options: &ExtractOptions) -> String {
    let (method, rest) = (options.method.name(), options.rest.name());
    json!({
        "dtype": options.dtype.to_string(), "exclude": options.exclude, "max_rank": options.max_rank, "method": method,
        "rank": options.rank.described(), "rest": rest, "seed": options.seed, "split": options.split.name(), "targets": options.targets,
        "tolerance": options.tolerance, "weighted": options.act_stats.is_some(),
    })
    .to_string()
}

//! `merge`: base and adapters in, a checkpoint that every loader reads out.

use std::fs;
use std::path::{Path, PathBuf};

use super::digests::verify_stated;
use crate::checkpoint::Checkpoint;
use crate::codec::safetensors::{SafetensorsFile, Strictness};
use crate::error::{Diagnostic, Error, Result};
use crate::exec::{self, ExecOptions, Outcome, Progress};
use crate::io::{OutputKind, Overwrite, ReadMode, Staging, check_output, free_space, write_error};
use crate::kernel::Sums;
use crate::limits::Limits;
use crate::plan::{BindOptions, Binding, Change, Origin, Plan, Weighted};
use crate::report::{AdapterUse, Balance, ContributionReport, IgnoredReport, MergeReport, Narrowed, Note, TensorReport};
use crate::rules;
use crate::tensor::{Dtype, TensorInfo, TensorSource};

/// How to merge. `Default` is strict and uses all cores.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct MergeOptions {
    /// What may be relaxed in binding.
    pub bind: BindOptions,
    /// Threads and tiles.
    pub exec: ExecOptions,
    /// What to do if the output exists. Default: refuse.
    pub overwrite: Overwrite,
    /// Bounds on input.
    pub limits: Limits,
}

/// Below this share of the update, the report warns that rounding has eaten into it.
const GAIN_WARNING: f64 = 0.9;

/// Merges `adapters` into `base` and writes the result to `output`: a folder if the base is one, otherwise a file.
///
/// The output appears whole or not at all. Every weight is `round(W + Σ weight · scale · B·A)`, summed in f64 in the order of
/// `adapters` and rounded once (`spec/adapter-model.md`, A-034); every other byte is the base's.
///
/// # Errors
/// Everything that [`Plan::new`] finds; `A-027` and `C-037` if stated digests do not match; `U-002`, `U-003`, `E-002`, `E-003` for
/// the output; what the executor finds while reading values (`A-008`, `A-030`, `A-031`, `E-001`, `E-004`); `E-006` if `progress`
/// cancels. On any error the output is what it was before.
pub fn merge(
    base: &Checkpoint,
    adapters: &[Weighted<'_>],
    output: &Path,
    options: &MergeOptions,
    progress: &dyn Progress,
) -> Result<MergeReport> {
    let (plan, mut report) = prepare(base, adapters, output, options)?;
    let kind = output_kind(base);
    let staging = Staging::new(output, kind)?;
    let outcome = exec::run(&plan, &options.exec, progress, |name| Ok((staging.create(name)?, staging.path_of(name))))?;
    if kind == OutputKind::Folder {
        write_companions(&plan, &staging)?;
    }
    reread(&plan, &staging, options)?;
    if progress.cancelled() {
        return Err(Error::new(rules::INTERRUPTED, "interrupted; nothing was published").help("run the command again"));
    }
    staging.publish()?;
    fill_in(&mut report, &plan, &outcome);
    Ok(report)
}

/// Everything that [`merge`] checks before it writes, and the report of what it would do.
///
/// # Errors
/// As [`merge`], but for what only the values can tell.
pub fn dry_run(base: &Checkpoint, adapters: &[Weighted<'_>], output: &Path, options: &MergeOptions) -> Result<MergeReport> {
    let (_, mut report) = prepare(base, adapters, output, options)?;
    report.dry_run = true;
    Ok(report)
}

fn output_kind(base: &Checkpoint) -> OutputKind {
    if base.is_folder() { OutputKind::Folder } else { OutputKind::File }
}

fn prepare<'a>(
    base: &'a Checkpoint,
    adapters: &[Weighted<'a>],
    output: &Path,
    options: &MergeOptions,
) -> Result<(Plan<'a>, MergeReport)> {
    if adapters.is_empty() {
        return Err(Error::new(rules::ARGUMENT, "no adapter is given"));
    }
    for weighted in adapters {
        if !weighted.weight.is_finite() {
            return Err(Error::new(
                rules::ARGUMENT,
                format!("the weight {} of {:?} is not finite", weighted.weight, weighted.adapter.label()),
            ));
        }
    }
    let mut inputs: Vec<PathBuf> = vec![base.path().to_owned()];
    inputs.extend(adapters.iter().map(|w| PathBuf::from(w.adapter.label())));
    let inputs: Vec<&Path> = inputs.iter().map(PathBuf::as_path).collect();
    check_output(output, output_kind(base), &inputs, options.overwrite)?;
    let plan = Plan::new(base, adapters, &options.bind, &options.limits)?;
    let needed = plan.bytes();
    if let Some(free) = free_space(output).filter(|&free| free < needed) {
        return Err(Error::new(rules::SPACE, format!("the output needs {needed} bytes but {free} are free"))
            .file(output)
            .help("free some space, or write elsewhere"));
    }
    let mut uses = Vec::new();
    let mut warnings: Vec<Diagnostic> = base.warnings().to_vec();
    for (index, weighted) in adapters.iter().enumerate() {
        verify_stated(weighted.adapter)?;
        warnings.extend(weighted.adapter.warnings().iter().cloned());
        uses.push(adapter_use(base, &plan, index, *weighted, options, &mut warnings)?);
    }
    warnings.extend(plan.warnings().iter().cloned());
    let mut report = MergeReport {
        base: base.path().display().to_string(),
        output: output.display().to_string(),
        dry_run: false,
        adapters: uses,
        balance: balance(&plan, adapters),
        tensors: Vec::new(),
        ignored: plan.ignored().iter().map(|i| IgnoredReport { tensor: i.tensor.clone(), flag: i.flag.to_owned() }).collect(),
        files_copied: Vec::new(),
        files_left: Vec::new(),
        bytes: plan.bytes(),
        memory: exec::memory(&plan, &options.exec),
        untied: plan.untied,
        warnings: warnings.iter().map(Note::from).collect(),
    };
    for shard in &plan.shards {
        report.tensors.extend(shard.changes.iter().map(|change| tensor_report(change, &shard.file_name)));
    }
    for companion in base.companions() {
        let name = companion.relative.display().to_string();
        match companion.copy {
            true => report.files_copied.push(name),
            false => report.files_left.push((name, companion.why.to_owned())),
        }
    }
    Ok((plan, report))
}

/// Holds the base against what the adapter says of it: the digests of the very tensors that it changes.
fn adapter_use(
    base: &Checkpoint,
    plan: &Plan<'_>,
    index: usize,
    weighted: Weighted<'_>,
    options: &MergeOptions,
    warnings: &mut Vec<Diagnostic>,
) -> Result<AdapterUse> {
    let stated = weighted.adapter.base();
    let mut base_identity = "unverified";
    if let Some(wanted) = &stated.targets {
        let binding = Binding::new(base, weighted, index, &options.bind, &options.limits)?;
        let names: Vec<&str> = binding.tensors().filter(|name| base.info(name).is_some()).collect();
        base_identity = "verified";
        if base.content_root(&names)? != *wanted {
            let message = "different base: the tensors that the adapter changes are not the ones that it was made for";
            let diagnostic = Diagnostic::new(rules::BASE_IDENTITY, message)
                .file(base.path())
                .help("use the base that the adapter was made for, or pass --allow-base-mismatch");
            if !options.bind.allow_base_mismatch {
                return Err(diagnostic.into());
            }
            warnings.push(diagnostic);
            base_identity = "mismatch";
        }
    }
    let renaming = plan.renamings().get(index).filter(|r| !r.is_identity()).map(|r| (r.from.clone(), r.to.clone()));
    Ok(AdapterUse {
        path: weighted.adapter.label().to_owned(),
        dialect: weighted.adapter.dialect(),
        weight: weighted.weight,
        renaming,
        base_identity,
    })
}

/// The balance law: what goes in comes out, counted from both ends.
fn balance(plan: &Plan<'_>, adapters: &[Weighted<'_>]) -> Balance {
    let adapter_tensors: u64 = adapters.iter().map(|w| w.adapter.factors().count() as u64).sum();
    let silent: u64 = adapters
        .iter()
        .filter(|w| w.weight == 0.0)
        .map(|w| w.adapter.factors().count() as u64 - w.adapter.replacements().len() as u64)
        .sum();
    let ignored = plan.ignored().len() as u64 + silent;
    let base_tensors = plan.base().names().count() as u64;
    let added = plan.changes().filter(|c| c.added).count() as u64;
    let modified = plan.changes().filter(|c| !c.added).count() as u64;
    Balance {
        adapter_tensors,
        applied: adapter_tensors - ignored,
        ignored,
        base_tensors,
        copied: base_tensors - modified,
        modified,
        added,
    }
}

fn tensor_report(change: &Change<'_>, file: &str) -> TensorReport {
    let replaced = matches!(change.origin, Origin::Adapter(_));
    let action = match (replaced, change.contributions.is_empty()) {
        (false, false) => "update",
        (true, true) => "replace",
        (true, false) => "replace+update",
        (false, true) => "untie",
    };
    TensorReport {
        tensor: change.name.clone(),
        file: file.to_owned(),
        dtype: change.info.dtype.to_string(),
        shape: change.info.shape.dims().to_vec(),
        action,
        added: change.added,
        contributions: change
            .contributions
            .iter()
            .map(|c| ContributionReport { adapter: c.adapter, rank: c.rank, scale: c.scale })
            .collect(),
        relative_norm: None,
        gain: None,
        changed: None,
        changed_if_narrowed: None,
        elements: change.info.shape.elements(),
    }
}

/// Adds what only the values could tell.
fn fill_in(report: &mut MergeReport, plan: &Plan<'_>, outcome: &Outcome) {
    let mut faint = Vec::new();
    for ((tensor, sums), change) in report.tensors.iter_mut().zip(&outcome.sums).zip(plan.changes()) {
        tensor.changed = Some(sums.changed);
        let wide = matches!(change.info.dtype, Dtype::F32 | Dtype::F64) && !change.contributions.is_empty();
        tensor.changed_if_narrowed = wide.then_some(Narrowed { bf16: sums.changed_in.bf16, f16: sums.changed_in.f16 });
        tensor.relative_norm = ratio(sums.delta.sqrt(), sums.base.sqrt());
        tensor.gain = if change.contributions.is_empty() { None } else { ratio(sums.applied, sums.delta) };
        if tensor.gain.is_some_and(|gain| gain < GAIN_WARNING) {
            faint.push((tensor.tensor.clone(), tensor.gain.unwrap_or(0.0)));
        }
    }
    let still = report.tensors.iter().zip(&outcome.sums).filter(|(t, s)| !t.contributions.is_empty() && s.delta == 0.0);
    let still: Vec<String> = still.map(|(t, _)| t.tensor.clone()).collect();
    if let Some(first) = still.first() {
        let message =
            format!("{} of {} updates are zero (the first is {first:?}): they have no effect", still.len(), report.tensors.len());
        let help = "a factor of zeros is what an untrained adapter has";
        report.warnings.push(Note::from(&Diagnostic::new(rules::UPDATE_SURVIVES, message).help(help)));
    }
    if let Some((first, gain)) = faint.first() {
        let all: Sums = outcome.sums.iter().fold(Sums::default(), |mut all, sums| {
            all.add(sums);
            all
        });
        let message = format!(
            "rounding loses part of the update in {} tensors (the first is {first:?}, of which {:.1} % survives); over all of them {:.1} % survives",
            faint.len(),
            100.0 * gain,
            100.0 * all.applied / all.delta
        );
        let help = "the update is smaller than the steps of the base's dtype; merge into a base of a wider dtype";
        report.warnings.push(Note::from(&Diagnostic::new(rules::UPDATE_SURVIVES, message).help(help)));
    }
}

fn ratio(x: f64, y: f64) -> Option<f64> {
    (y > 0.0).then(|| x / y)
}

/// The small files: copied as they are, but for the index and the config where the plan changes what they say.
fn write_companions(plan: &Plan<'_>, staging: &Staging) -> Result<()> {
    let base = plan.base;
    for companion in base.companions().iter().filter(|c| c.copy) {
        let from = base.path().join(&companion.relative);
        let name = companion.relative.to_string_lossy();
        let to = staging.path_of(&name);
        drop(staging.create(&name)?);
        fs::copy(&from, &to).map_err(|e| write_error(&to, e))?;
    }
    let write = |name: &str, text: String| {
        let path = staging.path_of(name);
        fs::write(&path, text).map_err(|e| write_error(&path, e))
    };
    if let Some(index) = base.index() {
        let added = plan.shards.iter().flat_map(|s| s.added.iter().map(move |(name, info)| (name, &s.file_name, info)));
        let mut map = index.weight_map().to_vec();
        let mut total: u64 = base.names().filter_map(|name| base.info(name)).map(TensorInfo::bytes).sum();
        for (name, file, info) in added {
            map.push((name.clone(), file.clone()));
            total += info.bytes();
        }
        write(index.file_name(), index.render(&map, total))?;
    }
    if plan.untied {
        match base.config().untied() {
            Some(text) => write("config.json", text)?,
            None => {
                let message = "there is no config.json that could say that the embeddings are no longer tied";
                return Err(Error::new(rules::TIED_WEIGHTS, message).file(base.path()));
            }
        }
    }
    Ok(())
}

/// Reads back what was written: every header parses, and holds the planned tensors.
fn reread(plan: &Plan<'_>, staging: &Staging, options: &MergeOptions) -> Result<()> {
    for shard in &plan.shards {
        let path = staging.path_of(&shard.file_name);
        let file = SafetensorsFile::open(&path, ReadMode::Read, Strictness::Lenient, &options.limits)?;
        let base = &plan.base.shards()[shard.shard].file;
        let planned = base
            .names()
            .filter_map(|name| Some((name, base.info(name)?)))
            .chain(shard.added.iter().map(|(n, i)| (n.as_str(), i)));
        for (name, info) in planned {
            if file.info(name) != Some(info) {
                return Err(Error::new(rules::REREAD, format!("{name:?} did not read back as written"))
                    .file(&path)
                    .help("check the disk"));
            }
        }
    }
    Ok(())
}

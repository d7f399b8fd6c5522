//! `merge`: base and adapters in, a checkpoint that every loader reads out.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::digests::verify_stated;
use super::identity;
use super::lineage::{self, Merged, RECORD, Record};
use crate::checkpoint::Checkpoint;
use crate::codec::safetensors::{SafetensorsFile, Strictness};
use crate::error::{Diagnostic, Error, Result};
use crate::exec::{self, ExecOptions, Outcome, Progress};
use crate::io::{Durability, OutputKind, Overwrite, ReadMode, Staging, check_output, free_space};
use crate::kernel::Sums;
use crate::limits::Limits;
use crate::plan::{BindOptions, Change, Origin, Panel, Plan, Weighted};
use crate::report::text::{count, plural};
use crate::report::{
    AdapterUse, Balance, ContributionReport, FileLeft, IgnoredReport, MergeReport, Narrowed, Note, TensorReport,
};
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
    /// Apply the same adapter more than once. Default false: two adapters of equal content are refused.
    pub allow_repeat: bool,
    /// What to do if the output exists. Default: refuse.
    pub overwrite: Overwrite,
    /// Whether the result is forced to disk before it is published. Default: it is.
    pub durability: Durability,
    /// Bounds on input.
    pub limits: Limits,
}

const CONFIG: &str = "config.json";

/// Below this share of the update, the report warns that rounding has eaten into it.
const GAIN_WARNING: f64 = 0.9;

/// Merges `adapters` into `base` and writes the result to `output`: a folder if the base is one, otherwise a file.
///
/// The output appears whole or not at all. Every weight is `round(W + Σ weight · scale · B·A)`, summed in f64 in the order of
/// `adapters` and rounded once (`spec/adapter-model.md`, A-034); every other byte is the base's.
///
/// # Errors
/// Everything that [`Plan::new`] finds; `A-027` and `C-037` if stated digests do not match; `U-002`, `U-003`, `E-002`, `E-003` for
/// the output; `E-008` if the buffers do not fit into the memory that is allowed; what the executor finds while reading values (`A-008`, `A-030`, `A-031`, `E-001`, `E-004`); `E-006` if `progress`
/// cancels. On any error the output is what it was before.
pub fn merge(
    base: &Checkpoint,
    adapters: &[Weighted<'_>],
    output: &Path,
    options: &MergeOptions,
    progress: &dyn Progress,
) -> Result<MergeReport> {
    merge_as(base, adapters, None, output, options, progress)
}

/// [`merge`], recorded as `entries` if they are given.
pub(super) fn merge_as(
    base: &Checkpoint,
    adapters: &[Weighted<'_>],
    entries: Option<Vec<Merged>>,
    output: &Path,
    options: &MergeOptions,
    progress: &dyn Progress,
) -> Result<MergeReport> {
    let (plan, mut report, record) = prepare(base, adapters, entries, output, options)?;
    let exec = exec::fitted(&plan, &options.exec, 0)?;
    let kind = output_kind(base);
    let staging = Staging::new(output, kind, options.overwrite)?;
    let outcome =
        exec::run(&plan, &exec, options.durability, progress, |name| Ok((staging.create(name)?, staging.target_of(name))))?;
    if kind == OutputKind::Folder {
        write_companions(&plan, &staging)?;
        if !record.is_empty() {
            staging.write(RECORD, record.as_bytes())?;
        }
    }
    if options.durability == Durability::Synced {
        staging.sync()?;
    }
    reread(&plan, &staging, options)?;
    if progress.cancelled() {
        return Err(exec::interrupted());
    }
    staging.publish(options.durability)?;
    fill_in(&mut report, &plan, &outcome);
    Ok(report)
}

/// Everything that [`merge`] checks before it writes, and the report of what it would do.
///
/// # Errors
/// As [`merge`], but for what only the values can tell.
pub fn dry_run(base: &Checkpoint, adapters: &[Weighted<'_>], output: &Path, options: &MergeOptions) -> Result<MergeReport> {
    let (_, mut report, _) = prepare(base, adapters, None, output, options)?;
    report.dry_run = true;
    Ok(report)
}

fn output_kind(base: &Checkpoint) -> OutputKind {
    if base.is_folder() { OutputKind::Folder } else { OutputKind::File }
}

fn prepare<'a>(
    base: &'a Checkpoint,
    adapters: &[Weighted<'a>],
    entries: Option<Vec<Merged>>,
    output: &Path,
    options: &MergeOptions,
) -> Result<(Plan<'a>, MergeReport, String)> {
    let mut inputs: Vec<PathBuf> = vec![base.path().to_owned()];
    inputs.extend(adapters.iter().map(|w| PathBuf::from(w.adapter.label())));
    let inputs: Vec<&Path> = inputs.iter().map(PathBuf::as_path).collect();
    check_output(output, output_kind(base), &inputs, options.overwrite)?;
    let (plan, mut report, record) = understand(base, adapters, entries, output, options)?;
    let needed = plan.bytes();
    if let Some(free) = free_space(output).filter(|&free| free < needed) {
        let message = format!("the output needs {} but {} are free", plural(needed, "byte"), count(free));
        return Err(Error::new(rules::SPACE, message).file(output).help("free some space, or write elsewhere"));
    }
    report.memory = exec::memory(&plan, &exec::fitted(&plan, &options.exec, 0)?, 0);
    Ok((plan, report, record))
}

/// What a merge will do, wherever it goes, the report of it, and the record that a folder gets: all checks but those of the output.
/// What is done is recorded as `entries` if they are given, and otherwise as the merge of the adapters.
pub(super) fn understand<'a>(
    base: &'a Checkpoint,
    adapters: &[Weighted<'a>],
    entries: Option<Vec<Merged>>,
    output: &Path,
    options: &MergeOptions,
) -> Result<(Plan<'a>, MergeReport, String)> {
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
    let plan = Plan::new(base, adapters, &options.bind, &options.limits)?;
    let record = Record::of(base)?;
    let entries = match entries {
        Some(entries) => entries,
        None => {
            let entries = lineage::entries(adapters)?;
            if !options.allow_repeat {
                refuse_repeats(adapters, &entries)?;
                record.refuse_again(base, adapters, &entries)?;
            }
            entries
        }
    };
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
        in_place: false,
        undo_log: None,
        adapters: uses,
        balance: balance(&plan, adapters)?,
        tensors: Vec::new(),
        ignored: plan.ignored().iter().map(|i| IgnoredReport { tensor: i.tensor.clone(), flag: i.flag.to_owned() }).collect(),
        files_copied: Vec::new(),
        files_left: Vec::new(),
        bytes: plan.bytes(),
        memory: 0,
        survived: None,
        untied: plan.untied,
        warnings: warnings.iter().map(Note::from).collect(),
    };
    for shard in &plan.shards {
        report.tensors.extend(shard.changes.iter().map(|change| tensor_report(change, &shard.file_name)));
    }
    for companion in base.companions().iter().filter(|companion| companion.relative != Path::new(RECORD)) {
        let name = companion.relative.display().to_string();
        match companion.copy {
            true => report.files_copied.push(name),
            false => report.files_left.push(FileLeft { file: name, reason: companion.why.to_owned() }),
        }
    }
    let record = if base.is_folder() { record.with(&entries) } else { String::new() };
    Ok((plan, report, record))
}

/// Two adapters with the same tensors are one adapter under two names.
pub(super) fn check_repeats(adapters: &[Weighted<'_>]) -> Result<()> {
    if adapters.len() < 2 { Ok(()) } else { refuse_repeats(adapters, &lineage::entries(adapters)?) }
}

fn refuse_repeats(adapters: &[Weighted<'_>], entries: &[Merged]) -> Result<()> {
    let mut seen: HashMap<&str, &str> = HashMap::new();
    for (weighted, entry) in adapters.iter().zip(entries) {
        let label = weighted.adapter.label();
        if let Some(first) = seen.insert(&entry.content, label) {
            let message = format!("the adapter is the same as {first:?}, by its content");
            let help = "to apply it twice, pass --allow-repeat; to apply more of it, give it a weight";
            return Err(Error::new(rules::ADAPTER_ONCE, message).file(label).help(help));
        }
    }
    Ok(())
}

fn adapter_use(
    base: &Checkpoint,
    plan: &Plan<'_>,
    index: usize,
    weighted: Weighted<'_>,
    options: &MergeOptions,
    warnings: &mut Vec<Diagnostic>,
) -> Result<AdapterUse> {
    let (identity, warning) = identity::check(base, weighted.adapter, &options.bind, &options.limits)?;
    warnings.extend(warning);
    Ok(AdapterUse {
        path: weighted.adapter.label().to_owned(),
        dialect: weighted.adapter.dialect(),
        weight: weighted.weight,
        renaming: plan.renamings().get(index).filter(|r| !r.is_identity()).cloned(),
        base_identity: identity.name(),
    })
}

/// The balance law: what goes in comes out. Both sides are counted by themselves, from the files and from the plan.
///
/// # Errors
/// `E-009` if they differ, which is a mistake of this program.
fn balance(plan: &Plan<'_>, adapters: &[Weighted<'_>]) -> Result<Balance> {
    let of_panel = |panel: &Panel<'_>| u64::from(!matches!(panel, Panel::One));
    let of_change = |change: &Change<'_>| {
        let factors: u64 = change.contributions.iter().map(|c| of_panel(&c.left) + of_panel(&c.right)).sum();
        factors + u64::from(matches!(change.origin, Origin::Adapter(_)))
    };
    let balance = Balance {
        adapter_tensors: adapters.iter().map(|w| w.adapter.factors().count() as u64).sum(),
        applied: plan.changes().map(of_change).sum(),
        ignored: plan.ignored().len() as u64,
        base_tensors: plan.base().names().count() as u64,
        copied: plan.shards.iter().map(|shard| shard.copied).sum(),
        modified: plan.changes().filter(|c| !c.added).count() as u64,
        added: plan.changes().filter(|c| c.added).count() as u64,
    };
    let even =
        balance.applied + balance.ignored == balance.adapter_tensors && balance.copied + balance.modified == balance.base_tensors;
    if even {
        Ok(balance)
    } else {
        Err(Error::new(rules::BALANCE, format!("the counts do not balance: {balance:?}")).help("please report this"))
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
pub(super) fn fill_in(report: &mut MergeReport, plan: &Plan<'_>, outcome: &Outcome) {
    let (mut faint, mut whole) = (Vec::new(), Sums::default());
    for ((tensor, sums), change) in report.tensors.iter_mut().zip(&outcome.sums).zip(plan.changes()) {
        // What only takes another's place was not compared with what was there.
        tensor.changed = (!change.contributions.is_empty()).then_some(sums.changed);
        let wide = matches!(change.info.dtype, Dtype::F32 | Dtype::F64) && !change.contributions.is_empty();
        tensor.changed_if_narrowed = wide.then_some(Narrowed { bf16: sums.changed_in.bf16, f16: sums.changed_in.f16 });
        tensor.relative_norm = ratio(sums.delta.sqrt(), sums.base.sqrt());
        if change.contributions.is_empty() {
            continue;
        }
        whole.add(sums);
        tensor.gain = ratio(sums.applied, sums.delta);
        if tensor.gain.is_some_and(|gain| gain < GAIN_WARNING) {
            faint.push((tensor.tensor.clone(), tensor.gain.unwrap_or(0.0)));
        }
    }
    report.survived = ratio(whole.applied, whole.delta);
    let updates: Vec<_> = report.tensors.iter().zip(&outcome.sums).filter(|(t, _)| !t.contributions.is_empty()).collect();
    let still: Vec<&str> = updates.iter().filter(|(_, sums)| sums.delta == 0.0).map(|(t, _)| t.tensor.as_str()).collect();
    if let Some(first) = still.first() {
        let (zero, all) = (count(still.len() as u64), count(updates.len() as u64));
        let message = format!("{zero} of {all} updates are zero (the first is {first:?}): they have no effect");
        let help = "a factor of zeros is what an untrained adapter has";
        report.warnings.push(Note::from(&Diagnostic::new(rules::UPDATE_SURVIVES, message).help(help)));
    }
    let kept: u64 = outcome.sums.iter().map(|sums| sums.kept).sum();
    if kept > 0 {
        let message = format!("{} that are not finite were left as they are", plural(kept, "base value"));
        report.warnings.push(Note::from(&Diagnostic::new(rules::BASE_FINITE, message).file(plan.base.path())));
    }
    if let (Some((first, gain)), Some(survived)) = (faint.first(), report.survived) {
        let message = format!(
            "rounding loses part of the update in {} (the first is {first:?}, of which {:.1} % survives); of the whole update {:.1} % survives",
            plural(faint.len() as u64, "tensor"),
            100.0 * gain,
            100.0 * survived
        );
        let help = "the update is smaller than the steps of the base's dtype; merge into a base of a wider dtype";
        report.warnings.push(Note::from(&Diagnostic::new(rules::UPDATE_SURVIVES, message).help(help)));
    }
}

/// To six digits: more are not the same on every machine, since the sums behind them may be taken in f32.
fn ratio(x: f64, y: f64) -> Option<f64> {
    (y > 0.0).then(|| x / y).map(|ratio| format!("{ratio:.5e}").parse().unwrap_or(ratio))
}

/// The small files: copied as they are, but for the index and the config where the plan changes what they say.
fn write_companions(plan: &Plan<'_>, staging: &Staging) -> Result<()> {
    let base = plan.base;
    let is_rewritten = |name: &Path| name == Path::new(RECORD) || plan.untied && name == Path::new(CONFIG);
    for companion in base.companions().iter().filter(|c| c.copy && !is_rewritten(&c.relative)) {
        staging.copy(&base.path().join(&companion.relative), &companion.relative)?;
    }
    if let Some(index) = base.index() {
        let added = plan.shards.iter().flat_map(|s| s.added.iter().map(move |(name, info)| (name, &s.file_name, info)));
        let mut map = index.weight_map().to_vec();
        let mut total: u64 = base.names().filter_map(|name| base.info(name)).map(TensorInfo::bytes).sum();
        for (name, file, info) in added {
            map.push((name.clone(), file.clone()));
            total += info.bytes();
        }
        staging.write(index.file_name(), index.render(&map, total).as_bytes())?;
    }
    // The plan made sure that there is one.
    if let Some(text) = base.config().untied().filter(|_| plan.untied) {
        staging.write(CONFIG, text.as_bytes())?;
    }
    Ok(())
}

/// Reads back what was written: every header parses, and holds the planned tensors.
fn reread(plan: &Plan<'_>, staging: &Staging, options: &MergeOptions) -> Result<()> {
    for shard in &plan.shards {
        let target = staging.target_of(&shard.file_name);
        let opened =
            SafetensorsFile::open(&staging.path_of(&shard.file_name), ReadMode::Read, Strictness::Lenient, &options.limits);
        let file = opened.map_err(|e| e.file(&target))?;
        let base = &plan.base.shards()[shard.shard].file;
        let planned = base
            .names()
            .filter_map(|name| Some((name, base.info(name)?)))
            .chain(shard.added.iter().map(|(n, i)| (n.as_str(), i)));
        for (name, info) in planned {
            if file.info(name) != Some(info) {
                return Err(Error::new(rules::REREAD, format!("{name:?} did not read back as written"))
                    .file(&target)
                    .help("check the disk"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::ffi::OsStrExt;
    use std::sync::Arc;

    use super::*;
    use crate::adapter::{Adapter, AdapterParts, Factor, Kind, Orientation, Replacement, Scaling, ScalingRule, Target};
    use crate::tensor::{MemorySource, Shape};

    fn fixture(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
    }

    fn run(base: &Path, adapters: &[Weighted<'_>]) -> Result<(tempfile::TempDir, MergeReport)> {
        let folder = tempfile::tempdir().unwrap();
        let base = crate::open_checkpoint(base)?;
        let report = merge(&base, adapters, &folder.path().join("out"), &MergeOptions::default(), &())?;
        Ok((folder, report))
    }

    /// An update of one query projection by B = (b, b, …), and a norm put in place.
    fn adapter(b: f32) -> Adapter {
        let mut source = MemorySource::new();
        for (name, dims, value) in [("a", vec![1, 64], 1.0), ("b", vec![64, 1], b), ("norm", vec![64], 2.0f32)] {
            let info = TensorInfo { dtype: Dtype::F32, shape: Shape::new(dims).unwrap() };
            source.insert(name, info, [value; 64].iter().flat_map(|x| x.to_le_bytes()).collect()).unwrap();
        }
        let source: Arc<dyn TensorSource> = Arc::new(source);
        let factor = |name: &str| Factor::new(&source, name).unwrap();
        let target = Target {
            tensor: "model.layers.0.self_attn.q_proj.weight".to_owned(),
            kind: Kind::Linear(Orientation::OutIn),
            a: factor("a"),
            b: factor("b"),
            scaling: Scaling { rank: 1, alpha: 1.0, rule: ScalingRule::Standard },
            bias: None,
        };
        let replacement = Replacement { tensor: "model.norm.weight".to_owned(), with: factor("norm") };
        let parts = AdapterParts { targets: vec![target], replacements: vec![replacement], ..Default::default() };
        Adapter::new(parts, &Limits::default()).unwrap()
    }

    #[test]
    fn zero_updates_are_counted_among_updates() {
        let adapter = adapter(0.0);
        let (_folder, report) = run(&fixture("models/llama-tiny"), &[Weighted::full(&adapter)]).unwrap();
        assert_eq!((report.tensors.len(), report.survived), (2, None));
        assert!(report.warnings[0].message.starts_with("1 of 1 updates are zero"), "{:?}", report.warnings);
    }

    #[test]
    fn what_survives_is_said_of_the_whole_update() {
        let faint = adapter(1e-4);
        let strong = crate::open_adapter(fixture("adapters/llama-qv-r8")).unwrap();
        let (_folder, report) = run(&fixture("models/llama-tiny"), &[Weighted::full(&faint)]).unwrap();
        let survived = report.survived.unwrap();
        assert_eq!(Some(survived), report.tensors.iter().find_map(|t| t.gain));
        let said = format!("of the whole update {:.1} % survives", 100.0 * survived);
        assert!(survived < 0.9 && report.warnings.iter().any(|w| w.message.ends_with(&said)), "{survived} {:?}", report.warnings);

        let (_folder, report) = run(&fixture("models/llama-tiny"), &[Weighted::full(&strong)]).unwrap();
        let gains: Vec<f64> = report.tensors.iter().filter_map(|t| t.gain).collect();
        let (low, high) = (gains.iter().copied().fold(f64::MAX, f64::min), gains.iter().copied().fold(f64::MIN, f64::max));
        assert!(low < report.survived.unwrap() && report.survived.unwrap() < high);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn small_files_are_copied_whatever_their_names() {
        let base = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(fixture("models/llama-tiny")).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), base.path().join(entry.file_name())).unwrap();
        }
        let names =
            [&b"caf\xe9.json"[..], b"caf\xe8.json", b"f\xf6lder/notes.txt"].map(|n| Path::new(std::ffi::OsStr::from_bytes(n)));
        for name in names {
            fs::create_dir_all(base.path().join(name).parent().unwrap()).unwrap();
            fs::write(base.path().join(name), name.as_os_str().as_bytes()).unwrap();
        }
        let adapter = adapter(1.0);
        let (folder, report) = run(base.path(), &[Weighted::full(&adapter)]).unwrap();
        for name in names {
            assert_eq!(fs::read(folder.path().join("out").join(name)).unwrap(), name.as_os_str().as_bytes());
        }
        assert_eq!(report.files_copied.iter().filter(|name| name.contains('\u{fffd}')).count(), 3);
    }
}

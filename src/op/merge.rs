//! `merge`: base and adapters in, a checkpoint that every loader reads out.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::slice::from_ref;

use super::account::{Understood, fill_in, understand};
use super::combine::CombineMethod;
use super::companions::{reread, write_companions};
use super::lineage::{Digests, Merged, RECORD};
use super::mixed;
use super::resume::{self, Work, fingerprint};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::exec::{self, ExecOptions, Keeping, Needs, Outcome, Output, Progress};
use crate::io::{Durability, OutputKind, Overwrite, check_output, free_space};
use crate::limits::Limits;
use crate::plan::{BindOptions, OutputOptions, Plan, Weighted};
use crate::report::text::{count, plural};
use crate::report::{MergeEachReport, MergeReport};
use crate::rules;

/// How to merge. `Default` is strict and uses all cores.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct MergeOptions {
    /// What may be relaxed in binding.
    pub bind: BindOptions,
    /// What the output is like. Default: like the base, rounded to the nearest.
    pub output: OutputOptions,
    /// Threads and tiles.
    pub exec: ExecOptions,
    /// How several adapters become one update. Default: their sum. Methods that work on single values go straight into the base, without a
    /// rank; the others are combined first.
    pub method: CombineMethod,
    /// Apply the same adapter more than once. Default false: two adapters of equal content are refused.
    pub allow_repeat: bool,
    /// What to do if the output exists. Default: refuse.
    pub overwrite: Overwrite,
    /// Whether the result is forced to disk before it is published. Default: it is.
    pub durability: Durability,
    /// Compute the digest of every tensor of the output, and record them in a folder's `loratool.merge.json`. Default false: it costs about
    /// as much as the merge.
    pub digests: bool,
    /// Go on with what an interrupted run of the same merge has completed, and keep what this one completes if it is interrupted. Default
    /// false. Files are what is kept, so an output of a single file begins anew.
    pub resume: bool,
    /// Bounds on input.
    pub limits: Limits,
}

/// Merges `adapters` into `base` and writes the result to `output`: a folder if the base is one, otherwise a file.
///
/// The output appears whole or not at all. Every weight is `round(W + Σ weight · scale · B·A)`, summed in f64 in the order of
/// `adapters` and rounded once (`spec/adapter-model.md`, A-034) unless the options ask for another rounding; every other byte is the base's.
///
/// # Errors
/// Everything that [`Plan::with_output`] finds; `A-027` and `C-037` if stated digests do not match; `U-001` if the options contradict each
/// other; `U-002`, `U-003`, `E-002`, `E-003` for the output; `E-008` if the buffers do not fit into the memory that is allowed; `E-011` if
/// another run is writing what is to be resumed; what the executor finds while reading values (`A-008`, `A-030`, `A-031`, `E-001`,
/// `E-004`); `E-006` if `progress` cancels. On any error the output is what it was before.
pub fn merge(
    base: &Checkpoint,
    adapters: &[Weighted<'_>],
    output: &Path,
    options: &MergeOptions,
    progress: &dyn Progress,
) -> Result<MergeReport> {
    if options.method == CombineMethod::Linear {
        return merge_as(base, adapters, None, output, options, progress);
    }
    let mixed = mixed::prepare(base, adapters, output, options, progress)?;
    merge_as(base, &mixed.adapters(adapters), Some(mixed.entries()), output, &mixed.options, progress)
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
    let job = prepare(base, adapters, entries, output, options)?;
    let mut reports = write(output, output_kind(base), vec![job], options, progress)?;
    reports.pop().ok_or_else(|| Error::new(rules::ARGUMENT, "nothing is given"))
}

/// Merges each of `adapters` by itself into `base`, which is read once for all of them. `output` becomes a folder that holds one checkpoint
/// for each adapter, under the adapter's name; it appears whole or not at all.
///
/// # Errors
/// As [`merge`](fn@merge), and `U-001` if two adapters have one name.
pub fn merge_each(
    base: &Checkpoint,
    adapters: &[Weighted<'_>],
    output: &Path,
    options: &MergeOptions,
    progress: &dyn Progress,
) -> Result<MergeEachReport> {
    let jobs = prepare_each(base, adapters, output, options)?;
    let merges = write(output, OutputKind::Folder, jobs, options, progress)?;
    Ok(MergeEachReport { output: output.display().to_string(), dry_run: false, merges })
}

/// Everything that [`merge`](fn@merge) checks before it writes, and the report of what it would do.
///
/// # Errors
/// As [`merge`](fn@merge), but for what only the values can tell.
pub fn dry_run(base: &Checkpoint, adapters: &[Weighted<'_>], output: &Path, options: &MergeOptions) -> Result<MergeReport> {
    let mut report = if options.method == CombineMethod::Linear {
        prepare(base, adapters, None, output, options)?.understood.report
    } else {
        let mixed = mixed::prepare(base, adapters, output, options, &())?;
        prepare(base, &mixed.adapters(adapters), Some(mixed.entries()), output, &mixed.options)?.understood.report
    };
    report.dry_run = true;
    Ok(report)
}

/// Everything that [`merge_each`] checks before it writes, and the report of what it would do.
///
/// # Errors
/// As [`merge_each`], but for what only the values can tell.
pub fn dry_run_each(
    base: &Checkpoint,
    adapters: &[Weighted<'_>],
    output: &Path,
    options: &MergeOptions,
) -> Result<MergeEachReport> {
    let mut merges: Vec<_> =
        prepare_each(base, adapters, output, options)?.into_iter().map(|job| job.understood.report).collect();
    merges.iter_mut().for_each(|report| report.dry_run = true);
    Ok(MergeEachReport { output: output.display().to_string(), dry_run: true, merges })
}

/// One checkpoint to be written.
struct Job<'a> {
    understood: Understood<'a>,
    /// The folder inside the output that it goes to; empty for the output itself.
    within: PathBuf,
}

pub(super) fn output_kind(base: &Checkpoint) -> OutputKind {
    if base.is_folder() { OutputKind::Folder } else { OutputKind::File }
}

fn prepare<'a>(
    base: &'a Checkpoint,
    adapters: &[Weighted<'a>],
    entries: Option<Vec<Merged>>,
    output: &Path,
    options: &MergeOptions,
) -> Result<Job<'a>> {
    check(base, adapters, output, output_kind(base), options)?;
    let understood = understand(base, adapters, entries, output, options)?;
    let mut jobs = vec![Job { understood, within: PathBuf::new() }];
    measure(&mut jobs, output, options)?;
    jobs.pop().ok_or_else(|| Error::new(rules::ARGUMENT, "nothing is given"))
}

fn prepare_each<'a>(
    base: &'a Checkpoint,
    adapters: &[Weighted<'a>],
    output: &Path,
    options: &MergeOptions,
) -> Result<Vec<Job<'a>>> {
    check(base, adapters, output, OutputKind::Folder, options)?;
    if options.method != CombineMethod::Linear {
        let message = format!("each adapter is merged by itself, and {} makes one of several", options.method.name());
        return Err(Error::new(rules::ARGUMENT, message).help("leave out --method or --each"));
    }
    let (mut jobs, mut names) = (Vec::new(), HashSet::new());
    for weighted in adapters {
        let label = Path::new(weighted.adapter.label());
        let full = super::lineage::name(label);
        let name = full.strip_suffix(".safetensors").filter(|name| !name.is_empty()).unwrap_or(&full).to_owned();
        if !names.insert(name.clone()) {
            let message = format!("two adapters are called {name:?}, and each needs a folder of that name in the output");
            return Err(Error::new(rules::ARGUMENT, message).file(label).help("rename one of them, or merge it by itself"));
        }
        let understood = understand(base, from_ref(weighted), None, &output.join(&name), options)?;
        jobs.push(Job { understood, within: PathBuf::from(name) });
    }
    if jobs.is_empty() {
        return Err(Error::new(rules::ARGUMENT, "no adapter is given"));
    }
    measure(&mut jobs, output, options)?;
    Ok(jobs)
}

/// What can be said of the output before the inputs are understood.
fn check(base: &Checkpoint, adapters: &[Weighted<'_>], output: &Path, kind: OutputKind, options: &MergeOptions) -> Result<()> {
    let mut inputs: Vec<PathBuf> = vec![base.path().to_owned()];
    inputs.extend(adapters.iter().map(|w| PathBuf::from(w.adapter.label())));
    let inputs: Vec<&Path> = inputs.iter().map(PathBuf::as_path).collect();
    check_output(output, kind, &inputs, options.overwrite)?;
    if options.resume && options.durability == Durability::Fast {
        let message = "what is not forced to disk cannot be gone on with";
        return Err(Error::new(rules::ARGUMENT, message).help("leave out --no-sync or --resume"));
    }
    Ok(())
}

/// The space on the disk, and the memory.
fn measure(jobs: &mut [Job<'_>], output: &Path, options: &MergeOptions) -> Result<()> {
    let of = |job: &Job<'_>| job.understood.plan.bytes().saturating_add(beside(job.understood.plan.base));
    let needed = jobs.iter().map(of).fold(0, u64::saturating_add);
    // What an interrupted run has reserved is there to be used.
    let kept = if options.resume { resume::reserved(output) } else { 0 };
    if let Some(free) = free_space(output).filter(|&free| free.saturating_add(kept) < needed) {
        let message = format!("the output needs {} but {} are free", plural(needed, "byte"), count(free));
        return Err(Error::new(rules::SPACE, message).file(output).help("free some space, or write elsewhere"));
    }
    let plans: Vec<&Plan<'_>> = jobs.iter().map(|job| &job.understood.plan).collect();
    let memory = exec::memory(&plans, &exec::fitted(&plans, &options.exec, needs(options))?, needs(options));
    jobs.iter_mut().for_each(|job| job.understood.report.memory = memory);
    Ok(())
}

/// Bytes of the files that are copied with the weights.
fn beside(base: &Checkpoint) -> u64 {
    let copied = base.companions().iter().filter(|companion| companion.copy);
    copied.filter_map(|c| Some(base.path().join(&c.relative).metadata().ok()?.len())).fold(0, u64::saturating_add)
}

fn needs(options: &MergeOptions) -> Needs {
    Needs { held: 0, whole_rows: options.digests }
}

/// Writes all jobs into one staging, and gives that its name.
fn write(
    output: &Path,
    kind: OutputKind,
    mut jobs: Vec<Job<'_>>,
    options: &MergeOptions,
    progress: &dyn Progress,
) -> Result<Vec<MergeReport>> {
    let merges = jobs.iter().map(|job| (job.within.as_path(), &job.understood.plan, &job.understood.step));
    let mark = fingerprint(output, merges, options)?;
    let shards = |job: &Job<'_>| -> Vec<PathBuf> {
        job.understood.plan.shards.iter().map(|shard| job.within.join(&shard.file_name)).collect()
    };
    let bytes = jobs.iter().map(|job| job.understood.plan.bytes()).fold(0, u64::saturating_add);
    let work = Work::start(output, kind, jobs.iter().flat_map(shards).collect(), bytes, &mark, options)?;
    let outcomes = match write_into(&work, &jobs, options, progress) {
        Ok(outcomes) => outcomes,
        Err(error) => return Err(work.fail(error, options)),
    };
    for (job, outcome) in jobs.iter_mut().zip(&outcomes) {
        let Understood { plan, report, .. } = &mut job.understood;
        fill_in(report, plan, &outcome.sums);
        report.content = digests(outcome).map(|digests| digests.content);
        let resumed = |name: &&PathBuf| name.parent() == Some(&job.within);
        report.resumed =
            work.done.keys().filter(resumed).filter_map(|name| Some(name.file_name()?.to_string_lossy().into())).collect();
        report.resumed.sort_unstable();
    }
    work.publish(options)?;
    Ok(jobs.into_iter().map(|job| job.understood.report).collect())
}

/// Everything but the name.
fn write_into(work: &Work, jobs: &[Job<'_>], options: &MergeOptions, progress: &dyn Progress) -> Result<Vec<Outcome>> {
    let staging = &work.staging;
    let plans: Vec<&Plan<'_>> = jobs.iter().map(|job| &job.understood.plan).collect();
    let mut outputs = Vec::new();
    for (plan, job) in jobs.iter().enumerate() {
        for shard in &job.understood.plan.shards {
            let name = job.within.join(&shard.file_name);
            let done = work.done.get(&name).cloned();
            let file = if done.is_some() { staging.reopen(&name)? } else { staging.create(&name)? };
            let file = staging.shelve(file, &name, options.durability)?;
            outputs.push(Output { plan, shard, file, path: staging.target_of(&name), done });
        }
    }
    let exec = exec::fitted(&plans, &options.exec, needs(options))?;
    let keeping = Keeping { durability: options.durability, digests: options.digests, ledger: work.ledger() };
    let outcomes = exec::run(&plans, &outputs, &exec, keeping, progress)?;
    drop(outputs);
    for (job, outcome) in jobs.iter().zip(&outcomes).filter(|(job, _)| job.understood.plan.base.is_folder()) {
        write_companions(&job.understood.plan, staging, &job.within)?;
        let record = job.understood.record(digests(outcome));
        if !record.is_empty() {
            staging.write(job.within.join(RECORD), record.as_bytes())?;
        }
    }
    if options.durability == Durability::Synced {
        staging.sync()?;
    }
    jobs.iter().try_for_each(|job| reread(&job.understood.plan, staging, &job.within, &options.limits))?;
    plans.iter().try_for_each(|plan| plan.unchanged())?;
    if progress.cancelled() {
        return Err(exec::interrupted());
    }
    Ok(outcomes)
}

fn digests(outcome: &Outcome) -> Option<Digests> {
    (!outcome.digests.is_empty()).then(|| Digests::of(outcome.digests.clone()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::ffi::OsStrExt;
    use std::sync::Arc;

    use super::*;
    use crate::adapter::{Adapter, AdapterParts, Factor, Kind, Orientation, Replacement, Scaling, ScalingRule, Target};
    use crate::plan::Weighted;
    use crate::tensor::{Dtype, TensorInfo, TensorSource};
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
            magnitude: None,
            singular_values: None,
        };
        let replacement = Replacement { tensor: "model.norm.weight".to_owned(), with: factor("norm"), shared: false };
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

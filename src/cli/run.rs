//! Carries out a job: opens the files, calls the library, hands back what it found. Nothing is printed here but progress.

use std::path::{Path, PathBuf};

use super::finish::{Compared, Finished, Fit, Found, Inspected, Style, Verified};
use super::job::{
    BakeJob, CombineJob, CompareJob, ConvertJob, ExtractJob, InspectJob, Job, MergeJob, RecoverJob, ResizeJob, UnmergeJob,
    ValidateJob, VerifyJob,
};
use super::output;
use super::progress::Watch;
use super::render::{self, plot, plot_compare};
use super::run_model::{run_eval, run_predict};
use super::signals::Signals;
use super::sniff::{self, Kind};
use crate::report::{
    BakeReport, CombineReport, CombinedAdapter, ConvertReport, DigestReport, ExtractReport, InspectReport, MergeEachReport,
    MergeReport, Note, RecoverReport, ResizeReport, SpectrumReport, UnmergeReport, ValidateReport, VerifyReport,
};
use crate::{
    Adapter, BindOptions, Binding, Checkpoint, Combination, ConvertOptions, Error, ExecOptions, OpenOptions, Plan, Recipe,
    RecipeAdapter, Result, StagedRecipe, TensorSource, Weighted, bake, check_loaders, compare, convert, dry_run, dry_run_each,
    dry_run_in_place, extract, inspect_adapter, inspect_checkpoint, merge, merge_each, merge_in_place, open_adapter_with,
    open_checkpoint_with, recompute_residual, recover, resize, rules, spectrum, unmerge_by_log, unmerge_by_subtraction,
    validate_adapter, validate_checkpoint, verify, verify_digests,
};

/// Carries out `job`.
pub(super) fn run(job: &Job, signals: &Signals, style: Style) -> Finished {
    let show_progress = style.shows_progress();
    let found = match job {
        Job::Inspect(job) => return run_inspect(job, signals, show_progress),
        Job::Validate(job) => return run_validate(job),
        Job::Verify(job) => return run_verify(job, signals, show_progress),
        Job::Merge(job) if job.each => run_each(job, signals, show_progress).map(Found::MergeEach),
        Job::Merge(job) => run_merge(job, signals, show_progress).map(Found::Merge),
        Job::Unmerge(job) => run_unmerge(job, signals, show_progress).map(Found::Unmerge),
        Job::Recover(job) => run_recover(job, signals, show_progress).map(Found::Recover),
        Job::Bake(job) => run_bake(job, signals, show_progress).map(Found::Bake),
        Job::Extract(job) => run_extract(job, signals, show_progress).map(Found::Extract),
        Job::Resize(job) => run_resize(job, signals, show_progress).map(Found::Resize),
        Job::Compare(job) => run_compare(job, signals, show_progress).map(Found::Compare),
        Job::Eval(job) => run_eval(job, signals, show_progress).map(Found::Eval),
        Job::Predict(job) => run_predict(job, signals, show_progress).map(Found::Predict),
        Job::Combine(job) => run_combine(job, signals, style).map(Found::Combine),
        Job::Convert(job) => run_convert(job, signals, show_progress).map(Found::Convert),
    };
    found.map_or_else(Finished::failed, Finished::found)
}

/// An adapter that does not fit is still an adapter: what it is is shown with what is wrong.
fn run_inspect(job: &InspectJob, signals: &Signals, show_progress: bool) -> Finished {
    let checkpoint = sniff::kind(&job.path, &job.open.limits) == Kind::Checkpoint;
    let inspected = if checkpoint { checkpoint_report(job) } else { adapter_report(job, signals, show_progress) };
    let (report, spectrum, fit) = match inspected {
        Ok(inspected) => inspected,
        Err(error) => return Finished::failed(error),
    };
    let (fit, error) = match fit.transpose() {
        Ok(fit) => (fit, None),
        Err(error) => (None, Some(error)),
    };
    let found = Found::Inspect(Inspected { report, fit, spectrum, every_target: job.options.listing });
    Finished { found: Some(found), error }
}

/// What was found, its spectrum if it was asked for, and how it fits a base if one was given.
type Inspection = Result<(InspectReport, Option<SpectrumReport>, Option<Result<Fit>>)>;

fn checkpoint_report(job: &InspectJob) -> Inspection {
    refuse_base(&job.base)?;
    let base = open_checkpoint_with(&job.path, &job.open)?;
    if job.spectrum {
        let message = "--spectrum is about adapters, and this is a checkpoint";
        let help = "give an adapter; loratool extract --tuned CHECKPOINT factorises weights";
        return Err(Error::new(rules::ARGUMENT, message).file(&job.path).help(help));
    }
    Ok((InspectReport::Checkpoint(inspect_checkpoint(&base, &job.options)), None, None))
}

fn adapter_report(job: &InspectJob, signals: &Signals, show_progress: bool) -> Inspection {
    let adapter = open_adapter_with(&job.path, &job.open)?;
    let report = InspectReport::Adapter(inspect_adapter(&adapter, &job.options)?);
    let fit = job.base.is_some().then(|| fit(job, &adapter));
    if !job.spectrum {
        return Ok((report, None, fit));
    }
    // An adapter that does not fit has a spectrum all the same, and the misfit is told with it.
    let fits = fit.as_ref().is_some_and(Result::is_ok);
    let base = job.base.as_ref().filter(|_| fits).map(|path| open_checkpoint_with(path, &job.open)).transpose()?;
    let base = base.repeated(adapter.replication())?;
    let watch = Watch::start(signals, "reading", 0, show_progress);
    let exec = ExecOptions::default();
    let spectrum = spectrum(&adapter, base.as_ref(), &job.bind, &job.open.limits, &exec, &watch)?;
    if let Some(path) = &job.plot {
        plot::draw(&spectrum, adapter.label(), path)?;
    }
    Ok((report, Some(spectrum), fit))
}

fn fit(job: &InspectJob, adapter: &Adapter) -> Result<Fit> {
    let base = open_checkpoint_with(job.base.as_deref().unwrap_or(&job.path), &job.open)?;
    let weighted = Weighted::full(adapter);
    let plan = Plan::new(&base, &[weighted], &job.bind, &job.open.limits)?;
    let binding = Binding::new(&base, weighted, 0, &job.bind, &job.open.limits)?;
    let renaming = plan.renamings().first().filter(|renaming| !renaming.is_identity()).cloned();
    Ok(Fit {
        base: base.path().display().to_string(),
        model_type: base.config().model_type.clone(),
        tensors: binding.tensors().count() as u64,
        ignored: plan.ignored().len() as u64,
        renaming,
        structure: if adapter.base().structure.is_some() { "verified" } else { "unverified" },
        warnings: plan.warnings().iter().map(Note::from).collect(),
    })
}

/// What a loader makes of an adapter is shown even where it is not what the adapter says.
fn run_validate(job: &ValidateJob) -> Finished {
    let report = match validated(job) {
        Ok(report) => report,
        Err(error) => return Finished::failed(error),
    };
    let wrong: Vec<&str> = report.loaders.iter().filter(|loader| !loader.reads_it).map(|loader| loader.title).collect();
    let error = (!wrong.is_empty()).then(|| {
        let message = format!("the adapter is not read as it is by {}", wrong.join(", "));
        Error::new(rules::LOADER_READS, message).file(&report.path).help("the report names the way out of each finding")
    });
    Finished { found: Some(Found::Validate(report)), error }
}

fn validated(job: &ValidateJob) -> Result<ValidateReport> {
    if sniff::kind(&job.path, &job.open.limits) == Kind::Checkpoint {
        refuse_base(&job.base)?;
        if !job.loaders.is_empty() {
            let message = "--for is about adapters, and this is a checkpoint";
            return Err(Error::new(rules::ARGUMENT, message).file(&job.path).help("give an adapter, or leave out --for"));
        }
        return validate_checkpoint(&open_checkpoint_with(&job.path, &job.open)?, job.values);
    }
    let adapter = open_adapter_with(&job.path, &job.open);
    match &job.base {
        None => validate_for(job, &adapter?, None),
        Some(path) => {
            let (base, adapters) = opened(open_checkpoint_with(path, &job.open), vec![adapter])?;
            let adapters = recomputed(adapters, job.recompute.then_some(&base), &job.bind, &job.open)?;
            let adapter = adapters.first().ok_or_else(|| Error::new(rules::ARGUMENT, "no adapter is given"))?;
            validate_for(job, adapter, Some(&base))
        }
    }
}

fn validate_for(job: &ValidateJob, adapter: &Adapter, base: Option<&Checkpoint>) -> Result<ValidateReport> {
    let mut report = validate_adapter(adapter, base.map(|base| (base, &job.bind)), &job.open.limits)?;
    report.loaders = check_loaders(adapter, &job.loaders, &job.open.limits)?;
    Ok(report)
}

fn refuse_base(base: &Option<PathBuf>) -> Result<()> {
    match base {
        None => Ok(()),
        Some(base) => Err(Error::new(rules::ARGUMENT, "a base is given, but the path is a checkpoint itself")
            .file(base)
            .help("give an adapter with --base, or a checkpoint without")),
    }
}

fn run_merge(job: &MergeJob, signals: &Signals, show_progress: bool) -> Result<MergeReport> {
    let adapters = job.adapters.iter().map(|(path, _)| open_adapter_with(path, &job.open)).collect();
    let (base, adapters) = opened(open_checkpoint_with(&job.base, &job.open), adapters)?;
    let adapters = recomputed(adapters, job.recompute.then_some(&base), &job.options.bind, &job.open)?;
    let weighted = weighted(&adapters, &job.adapters);
    if job.dry_run {
        return match &job.output {
            Some(output) => dry_run(&base, &weighted, output, &job.options),
            None => dry_run_in_place(&base, &weighted, &job.options),
        };
    }
    let total = base.names().filter_map(|name| base.info(name)).map(|info| info.bytes()).fold(0, u64::saturating_add);
    let watch = Watch::start(signals, "merging", total, show_progress);
    match &job.output {
        Some(output) => merge(&base, &weighted, output, &job.options, &watch),
        None => merge_in_place(&base, &weighted, job.undo_log.as_deref(), &job.options, &watch),
    }
}

fn run_each(job: &MergeJob, signals: &Signals, show_progress: bool) -> Result<MergeEachReport> {
    let adapters = job.adapters.iter().map(|(path, _)| open_adapter_with(path, &job.open)).collect();
    let (base, adapters) = opened(open_checkpoint_with(&job.base, &job.open), adapters)?;
    let adapters = recomputed(adapters, job.recompute.then_some(&base), &job.options.bind, &job.open)?;
    let weighted = weighted(&adapters, &job.adapters);
    let output = job.output.as_deref().unwrap_or(&job.base);
    if job.dry_run {
        return dry_run_each(&base, &weighted, output, &job.options);
    }
    merge_each(&base, &weighted, output, &job.options, &Watch::start(signals, "merging", 0, show_progress))
}

fn run_unmerge(job: &UnmergeJob, signals: &Signals, show_progress: bool) -> Result<UnmergeReport> {
    let adapters = job.adapters.iter().map(|(path, _)| open_adapter_with(path, &job.open)).collect();
    let (merged, adapters) = opened(open_checkpoint_with(&job.merged, &job.open).map(AsIs), adapters)?;
    let AsIs(merged) = merged;
    let weighted = weighted(&adapters, &job.adapters);
    let total = merged.names().filter_map(|name| merged.info(name)).map(|info| info.bytes()).fold(0, u64::saturating_add);
    let watch = Watch::start(signals, "unmerging", total, show_progress);
    let output = job.output.as_deref();
    match &job.undo_log {
        Some(log) => unmerge_by_log(&merged, log, output, &job.options, &watch),
        None => unmerge_by_subtraction(&merged, &weighted, output, &job.options, &watch),
    }
}

fn run_recover(job: &RecoverJob, signals: &Signals, show_progress: bool) -> Result<RecoverReport> {
    recover(&job.path, &job.options, &Watch::start(signals, "merging", 0, show_progress))
}

/// A "no" has its reasons: the report is shown with it.
fn run_verify(job: &VerifyJob, signals: &Signals, show_progress: bool) -> Finished {
    let Some(base) = &job.base else {
        let checked = run_digests(job, signals, show_progress).map(Found::Digests);
        return checked.map_or_else(Finished::failed, Finished::found);
    };
    let report = match verify_report(job, base, signals, show_progress) {
        Ok(report) => report,
        Err(error) => return Finished::failed(error),
    };
    let error = (!report.is_merged).then(|| {
        let message = format!("this is not the merge that it is said to be: {}", report.says);
        Error::new(rules::IS_MERGE, message).file(&job.merged)
    });
    let found = Found::Verify(Verified { report, every_tensor: job.all });
    Finished { found: Some(found), error }
}

fn run_digests(job: &VerifyJob, signals: &Signals, show_progress: bool) -> Result<DigestReport> {
    let merged = open_checkpoint_with(&job.merged, &job.open)?;
    let bytes = merged.names().filter_map(|name| merged.info(name)).map(|info| info.bytes()).fold(0, u64::saturating_add);
    verify_digests(&merged, &job.options, &Watch::start(signals, "checking", bytes + 1, show_progress))
}

fn verify_report(job: &VerifyJob, base: &Path, signals: &Signals, show_progress: bool) -> Result<VerifyReport> {
    let adapters = job.adapters.iter().map(|(path, _)| open_adapter_with(path, &job.open)).collect();
    let base = open_checkpoint_with(base, &job.open);
    let merged = open_checkpoint_with(&job.merged, &job.open);
    let both = match (merged, base) {
        (Ok(merged), Ok(base)) => Ok((merged, base)),
        (Err(error), Ok(_)) | (Ok(_), Err(error)) => Err(error),
        (Err(first), Err(second)) => Err(joined(vec![first, second])),
    };
    let ((merged, base), adapters) = opened(both, adapters)?;
    let adapters = recomputed(adapters, job.recompute.then_some(&base), &job.options.bind, &job.open)?;
    let weighted = weighted(&adapters, &job.adapters);
    let bytes: u64 = merged.names().filter_map(|name| merged.info(name)).map(|info| info.bytes()).fold(0, u64::saturating_add);
    let share = job.options.sample.unwrap_or(1.0);
    // One more than all, because there is nothing to sync at the end.
    let watch = Watch::start(signals, "checking", (bytes as f64 * share) as u64 + 1, show_progress);
    verify(&merged, &base, &weighted, &job.options, &watch)
}

fn run_convert(job: &ConvertJob, signals: &Signals, show_progress: bool) -> Result<ConvertReport> {
    let adapter = open_adapter_with(&job.source, &job.open);
    let base = job.base.as_ref().map(|path| open_checkpoint_with(path, &job.open)).transpose();
    let (base, adapters) = opened(base, vec![adapter])?;
    let adapters = recomputed(adapters, base.as_ref().filter(|_| job.recompute), &job.bind, &job.open)?;
    let adapter = adapters.first().ok_or_else(|| Error::new(rules::ARGUMENT, "no adapter is given"))?;
    let options = ConvertOptions {
        to: job.to,
        base: base.as_ref(),
        bind: job.bind.clone(),
        overwrite: job.overwrite,
        limits: job.open.limits.clone(),
    };
    let total = adapter.factors().map(|factor| factor.info().bytes()).fold(0, u64::saturating_add);
    let watch = Watch::start(signals, "writing", total, show_progress);
    convert(adapter, &job.output, &options, &watch)
}

fn run_bake(job: &BakeJob, signals: &Signals, show_progress: bool) -> Result<BakeReport> {
    let adapter = open_adapter_with(&job.source, &job.open)?;
    bake(&adapter, &job.output, &job.options, &Watch::start(signals, "writing", 0, show_progress))
}

fn run_extract(job: &ExtractJob, signals: &Signals, show_progress: bool) -> Result<ExtractReport> {
    let opened = |path: &Path| open_checkpoint_with(path, &job.open);
    let (base, tuned) = match (job.base.as_deref().map(opened).transpose(), opened(&job.tuned)) {
        (Ok(base), Ok(tuned)) => (base, tuned),
        (Err(error), Ok(_)) | (Ok(_), Err(error)) => return Err(error),
        (Err(first), Err(second)) => return Err(joined(vec![first, second])),
    };
    let watch = Watch::start(signals, "reading", 0, show_progress);
    extract(base.as_ref(), &tuned, &job.output, &job.options, &watch)
}

fn run_resize(job: &ResizeJob, signals: &Signals, show_progress: bool) -> Result<ResizeReport> {
    let adapter = open_adapter_with(&job.source, &job.open)?;
    resize(&adapter, &job.output, &job.options, &Watch::start(signals, "resizing", 0, show_progress))
}

/// What the result is off by is said before it is written.
fn run_combine(job: &CombineJob, signals: &Signals, style: Style) -> Result<CombineReport> {
    let (_, adapters) =
        opened(Ok(None::<Checkpoint>), job.adapters.iter().map(|(path, _)| open_adapter_with(path, &job.open)).collect())?;
    let adapters = weighted(&adapters, &job.adapters);
    let show_progress = style.shows_progress();
    let beside = job.output.as_deref().unwrap_or(Path::new("combination"));
    let options = &job.options;
    let paths: Vec<&Path> = job.adapters.iter().map(|(path, _)| path.as_path()).collect();
    job.save_recipe.as_ref().map(|path| Recipe::check_output(path, &paths, beside, options.overwrite)).transpose()?;
    job.output.as_ref().map(|output| Combination::check_output(&adapters, output, options)).transpose()?;
    let watch = Watch::start(signals, "summing", 0, show_progress);
    let combination = Combination::new(&adapters, beside, options, &watch)?;
    drop(watch);
    let Some(output) = &job.output else { return Ok(combination.report().clone()) };
    if !style.json && !style.quiet && combination.report().error > 0.0 {
        output::eprint(&render::before_writing(combination.report()));
    }
    // Whatever can fail of the recipe has to fail before the output is there.
    let recipe = job.save_recipe.as_ref().map(|path| recipe(job, combination.report()).stage(path, options.overwrite));
    let recipe = recipe.transpose()?;
    let watch = Watch::start(signals, "writing", 0, show_progress);
    let report = combination.write(output, options.to, options.overwrite, &watch)?;
    recipe.map(StagedRecipe::publish).transpose()?;
    Ok(report)
}

/// What was combined, as it can be done again.
fn recipe(job: &CombineJob, report: &CombineReport) -> Recipe {
    let kept = |(combined, (path, weight)): (&CombinedAdapter, &(PathBuf, f64))| {
        // From where the recipe lies the path is found again only if it is whole.
        let path = path.canonicalize().unwrap_or_else(|_| path.clone());
        let (content, scaling) = (Some(combined.content.clone()), Some(combined.scaling.clone()));
        RecipeAdapter { path, weight: *weight, content, scaling }
    };
    Recipe { adapters: report.adapters.iter().zip(&job.adapters).map(kept).collect(), options: job.options.clone() }
}

fn run_compare(job: &CompareJob, signals: &Signals, show_progress: bool) -> Result<Compared> {
    let base = job.base.as_ref().map(|base| open_checkpoint_with(base, &job.open));
    let adapters = job.adapters.iter().map(|path| open_adapter_with(path, &job.open)).collect();
    let (base, adapters) = opened(base.transpose(), adapters)?;
    let [one, other] = &adapters[..] else { return Err(Error::new(rules::ARGUMENT, "two adapters are compared")) };
    let watch = Watch::start(signals, "reading", 0, show_progress);
    let report = compare([one, other], base.as_ref(), &job.options, &watch)?;
    drop(watch);
    job.plot.as_ref().map(|path| plot_compare::draw(&report, path)).transpose()?;
    Ok(Compared { report, every_target: job.every_target })
}

pub(super) fn weighted<'a>(adapters: &'a [Adapter], typed: &[(PathBuf, f64)]) -> Vec<Weighted<'a>> {
    adapters.iter().zip(typed).map(|(adapter, (_, weight))| Weighted { adapter, weight: *weight }).collect()
}

/// The inputs of a command, or everything that is wrong with any of them.
pub(super) fn opened<B: Repeated>(base: Result<B>, adapters: Vec<Result<Adapter>>) -> Result<(B, Vec<Adapter>)> {
    let (mut good, mut errors) = (Vec::new(), Vec::new());
    let base = base.map_err(|error| errors.push(error)).ok();
    for adapter in adapters {
        match adapter {
            Ok(adapter) => good.push(adapter),
            Err(error) => errors.push(error),
        }
    }
    match (base, errors.len()) {
        (Some(base), 0) => {
            let ranges = good.first().map(|adapter: &Adapter| adapter.replication().to_vec()).unwrap_or_default();
            Ok((base.repeated(&ranges)?, good))
        }
        _ => Err(joined(errors)),
    }
}

/// A base whose layers may have to be repeated before an adapter fits it.
pub(super) trait Repeated: Sized {
    fn repeated(self, ranges: &[(u64, u64)]) -> Result<Self>;
}

impl Repeated for Checkpoint {
    fn repeated(self, ranges: &[(u64, u64)]) -> Result<Self> {
        self.replicated(ranges)
    }
}

impl Repeated for Option<Checkpoint> {
    fn repeated(self, ranges: &[(u64, u64)]) -> Result<Self> {
        self.map(|base| base.replicated(ranges)).transpose()
    }
}

/// A merged checkpoint, whose layers are what they are.
struct AsIs(Checkpoint);

impl Repeated for AsIs {
    fn repeated(self, _: &[(u64, u64)]) -> Result<Self> {
        Ok(self)
    }
}

/// A merged checkpoint, which is as it is, and its base.
impl Repeated for (Checkpoint, Checkpoint) {
    fn repeated(self, ranges: &[(u64, u64)]) -> Result<Self> {
        Ok((self.0, self.1.replicated(ranges)?))
    }
}

/// The adapters with what their initialisation took out of `base`, if there is one to take it out of.
fn recomputed(adapters: Vec<Adapter>, base: Option<&Checkpoint>, bind: &BindOptions, open: &OpenOptions) -> Result<Vec<Adapter>> {
    let Some(base) = base else { return Ok(adapters) };
    adapters.into_iter().map(|adapter| recompute_residual(adapter, base, bind, &open.limits)).collect()
}

/// One error of all; the class is that of the first, and a single one keeps its cause.
fn joined(mut errors: Vec<Error>) -> Error {
    if errors.len() == 1 {
        return errors.remove(0);
    }
    let class = errors.first().map(Error::class);
    let diagnostics = errors.into_iter().flat_map(Error::into_diagnostics).collect();
    match (Error::check(diagnostics), class) {
        (Err(error), Some(class)) => error.class_of(class),
        _ => Error::new(rules::ARGUMENT, "nothing is given"),
    }
}

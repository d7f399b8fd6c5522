//! `merge` into the base's own files. Everything that can be wrong is found before the first of their bytes changes, a journal says how
//! to go on from there, and only then are they changed: interrupted anywhere, a file is what it was, or closed to readers until
//! [`recover`] has completed it. `spec/journal.md` has the order of the steps and the reasons.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::account::{Understood, fill_in, understand};
use super::combine::CombineMethod;
use super::lineage::{self, Merged, RECORD};
use super::merge::MergeOptions;
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Error, Result};
use crate::exec::{self, Draft, ExecOptions, FileRecord, Journal, Needs, Progress, Rolled, Site, Start, UndoDraft};
use crate::io::{
    Durability, Exclusive, OutputKind, Overwrite, Staging, check_output, disk, free_space, journal_of, parent_of, write_error,
};
use crate::limits::Limits;
use crate::plan::{Change, OutShard, OutputOptions, Plan, Weighted};
use crate::report::text::{count, plural};
use crate::report::{MergeReport, RecoverReport};
use crate::rules;

/// Each thread holds a window.
const NEEDS: Needs = Needs { held: exec::WINDOW, whole_rows: false };

/// Merges `adapters` into the files of `base`. The bytes are those that [`merge`](super::merge()) would write elsewhere; only those of
/// changed tensors are written. `base` is not to be used afterwards: its files are no longer what it read.
///
/// With `undo_log`, the tensors as they were, and what was added, are written to that new file first, for
/// [`unmerge_by_log`](super::unmerge_by_log).
///
/// Disk: a journal beside the files, of the size of the adapters and about 1/64 of the changed bytes, gone in the end; the undo log.
///
/// # Errors
/// As [`merge`](super::merge()), and `U-005` if the merge needs more than new values in old places, or if the files are links or have
/// other names; `E-011` if another merge into them is going on. Until the journal is written, nothing has changed; after an error from
/// then on (`E-001`, `E-002`, `E-006`), which says so, [`recover`] completes the merge.
pub fn merge_in_place(
    base: &Checkpoint,
    adapters: &[Weighted<'_>],
    undo_log: Option<&Path>,
    options: &MergeOptions,
    progress: &dyn Progress,
) -> Result<MergeReport> {
    merge_in_place_as(base, adapters, None, undo_log, options, progress)
}

/// [`merge_in_place`], recorded as `entries` if they are given.
pub(super) fn merge_in_place_as(
    base: &Checkpoint,
    adapters: &[Weighted<'_>],
    entries: Option<Vec<Merged>>,
    undo_log: Option<&Path>,
    options: &MergeOptions,
    progress: &dyn Progress,
) -> Result<MergeReport> {
    let (understood, record) = prepare(base, adapters, entries, options)?;
    let Understood { plan, mut report, .. } = understood;
    if let Some(log) = undo_log {
        check_output(log, OutputKind::File, &[base.path()], Overwrite::Refuse)?;
        report.undo_log = Some(log.display().to_string());
    }
    let limited = exec::fitted(&[&plan], &options.exec, NEEDS)?;
    let files = open(&plan)?;
    let numbered = |shards: bool| -> Vec<(usize, &Change<'_>)> {
        touched(&plan)
            .enumerate()
            .flat_map(|(file, (index, shard))| shard.changes.iter().map(move |c| (if shards { index } else { file }, c)))
            .collect()
    };
    let old = exec::prove(&plan, &numbered(true), &limited, progress)?;
    let records = records(&plan, &files)?;
    let journal = journal_of(base.path());
    let draft = Draft::new(&records, &numbered(false), &old, plan.keep_nonfinite, base.is_folder().then_some(record))?;
    if let Some(log) = undo_log {
        let undo = UndoDraft::new(
            &plan,
            &old,
            lineage::entries(adapters)?.into_iter().map(|m| (m.adapter, m.content, m.weight)).collect(),
        )?;
        write_new(log, undo.len(), options.durability, progress, |file| undo.write(file, log, progress))?;
    }
    write_new(&journal, draft.len, options.durability, progress, |file| draft.write(file, &journal)).map_err(|error| {
        // Nothing is changed. A log of a merge that was not begun would only mislead.
        if let Some(log) = undo_log {
            let _ = disk::remove_file(log);
        }
        match journal.symlink_metadata() {
            Ok(_) if error.diagnostics().iter().all(|d| d.rule() != rules::OUTPUT_EXISTS) => {
                incomplete(error, &journal, base.path())
            }
            _ => error,
        }
    })?;
    let rolled = carry_out(&journal, base.path(), files, Start::Proven, &limited, options, progress)?;
    fill_in(&mut report, &plan, &rolled.sums);
    Ok(report)
}

/// Everything that [`merge_in_place`] checks before it computes, and the report of what it would do.
///
/// # Errors
/// As [`merge_in_place`], but for what only the values can tell.
pub fn dry_run_in_place(base: &Checkpoint, adapters: &[Weighted<'_>], options: &MergeOptions) -> Result<MergeReport> {
    let (Understood { plan, mut report, .. }, _) = prepare(base, adapters, None, options)?;
    open(&plan)?;
    report.dry_run = true;
    Ok(report)
}

/// How to recover.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct RecoverOptions {
    /// Threads and tiles.
    pub exec: ExecOptions,
    /// Bounds on input.
    pub limits: Limits,
}

/// Completes a merge in place that was interrupted: `path` is the checkpoint, a file or a folder. The files then hold what they would
/// without the interruption. Where none is pending nothing is done, so that it may be called as often as one likes.
///
/// # Errors
/// `E-010` if the journal is damaged, or is not that of the files; `E-011` if the merge is still going on, or if a file waits for a journal
/// that is gone; `E-001`, `E-002`, `E-006`, after which it can be called again.
pub fn recover(path: &Path, options: &RecoverOptions, progress: &dyn Progress) -> Result<RecoverReport> {
    let Some(journal) = find_journal(path) else {
        Checkpoint::open(path, Default::default(), &options.limits).map_err(|e| match e.diagnostics().first() {
            Some(d) if d.rule() == rules::HEADER_LIMIT => e.help("its journal is gone; get the checkpoint again"),
            _ => e,
        })?;
        return Ok(RecoverReport { path: path.display().to_string(), journal: None, files: Vec::new(), tensors: 0, bytes: 0 });
    };
    let opened = Journal::open(&journal, &options.limits)?;
    let folder = parent_of(&journal);
    let files = opened.files().iter().map(|record| Exclusive::open(&folder.join(&record.name))).collect::<Result<Vec<_>>>()?;
    let names = opened.files().iter().map(|record| record.name.clone()).collect();
    let tensors = opened.changes().len() as u64;
    drop(opened);
    let merge = MergeOptions { limits: options.limits.clone(), ..Default::default() };
    let rolled = carry_out(&journal, path, files, Start::Found, &options.exec, &merge, progress)?;
    let (path, journal) = (path.display().to_string(), Some(journal.display().to_string()));
    Ok(RecoverReport { path, journal, files: names, tensors, bytes: rolled.written })
}

fn prepare<'a>(
    base: &'a Checkpoint,
    adapters: &[Weighted<'a>],
    entries: Option<Vec<Merged>>,
    options: &MergeOptions,
) -> Result<(Understood<'a>, String)> {
    if options.output != OutputOptions::default() || options.digests || options.resume {
        let message = "in place, dtype, files and rounding stay as they are, and no digests are taken";
        return Err(Error::new(rules::IN_PLACE, message).file(base.path()).help("merge into a new folder with -o instead"));
    }
    if options.method != CombineMethod::Linear {
        let message = format!("in place adapters are added, and not merged by {}", options.method.name());
        return Err(Error::new(rules::IN_PLACE, message).file(base.path()).help("merge into a new folder with -o instead"));
    }
    let mut understood = understand(base, adapters, entries, base.path(), options)?;
    if !base.is_folder() && understood.is_merged_already() {
        let message = format!("the file lies beside a {RECORD}, which would no longer be right");
        return Err(Error::new(rules::IN_PLACE, message).file(base.path()).help("give the folder as the base"));
    }
    let record = understood.record(None);
    let Understood { plan, report, .. } = &mut understood;
    let plan: &Plan<'_> = plan;
    refuse_moves(plan)?;
    report.in_place = true;
    report.files_copied.clear();
    report.files_left.clear();
    report.bytes = plan.changes().map(|change| change.info.bytes()).sum();
    report.memory = exec::memory(&[plan], &exec::fitted(&[plan], &options.exec, NEEDS)?, NEEDS);
    Ok((understood, record))
}

/// In place, every tensor keeps its place, and no other file changes.
fn refuse_moves(plan: &Plan<'_>) -> Result<()> {
    let elsewhere = "merge into a new folder with -o instead";
    let mut problems = Vec::new();
    if !plan.base.replication().is_empty() {
        let message = "the layers of the base are to be repeated, and a file that is changed in place keeps its tensors";
        problems.push(Diagnostic::new(rules::IN_PLACE, message).file(plan.base.path()).help(elsewhere));
    }
    for name in plan.added().map(|change| &change.name) {
        let message = format!("{name:?} is new, and a file that is changed in place keeps its tensors");
        problems.push(Diagnostic::new(rules::IN_PLACE, message).tensor(name).file(plan.base.path()).help(elsewhere));
    }
    for change in plan.changes() {
        if change.is_scaled() || !change.patches.is_empty() || change.moves(plan.base) {
            let message = format!(
                "{:?} is multiplied, resized or has rows replaced: what a value becomes does not follow from the value alone",
                change.name
            );
            problems.push(Diagnostic::new(rules::IN_PLACE, message).tensor(&change.name).file(plan.base.path()).help(elsewhere));
        }
        if change.quantised.is_some() {
            let message =
                format!("{:?} is quantised: what a code becomes depends on all of its block, and on the scale", change.name);
            problems.push(Diagnostic::new(rules::IN_PLACE, message).tensor(&change.name).file(plan.base.path()).help(elsewhere));
        }
        let size = change.info.bytes().checked_div(change.info.shape.elements()).unwrap_or(1).max(1);
        if !change.begin.is_multiple_of(size) {
            let message = format!("{:?} is not aligned to its values, so that a power cut could tear one of them", change.name);
            problems.push(Diagnostic::new(rules::IN_PLACE, message).file(plan.base.path()).offset(change.begin).help(elsewhere));
        }
    }
    Error::check(problems)
}

/// The files that change, with their places among the base's, which are those of the output.
fn touched<'p, 'a>(plan: &'p Plan<'a>) -> impl Iterator<Item = (usize, &'p OutShard<'a>)> {
    plan.shards.iter().enumerate().filter(|(_, shard)| !shard.changes.is_empty())
}

/// Opens the files that change, to be changed, and makes sure that they are those that the plan is about.
fn open(plan: &Plan<'_>) -> Result<Vec<Exclusive>> {
    let journal = journal_of(plan.base.path());
    if journal.symlink_metadata().is_ok() {
        return Err(crate::io::pending(&journal));
    }
    let mut files = Vec::new();
    for (index, _) in touched(plan) {
        let source = &plan.base.shards()[index].file;
        let file = Exclusive::open(source.path())?;
        if source.identity() != file.identity() || file.len() != source.file_len() {
            let message = "the file was replaced while it was read";
            return Err(Error::new(rules::CHANGED, message).file(source.path()).help("run the command again"));
        }
        files.push(file);
    }
    Ok(files)
}

fn records(plan: &Plan<'_>, files: &[Exclusive]) -> Result<Vec<FileRecord>> {
    let record = |((index, _), file): ((usize, &OutShard<'_>), &Exclusive)| {
        let header_len = plan.base.shards()[index].file.header().data_start - 8;
        let mut header = vec![0; usize::try_from(header_len).unwrap_or(usize::MAX)];
        file.read(8, &mut header)?;
        let name = file.path().file_name().unwrap_or_default().to_str().map(str::to_owned);
        let name = name.ok_or_else(|| {
            Error::new(rules::IN_PLACE, "the file's name is not UTF-8, and the journal has to name it").file(file.path())
        })?;
        Ok(FileRecord { name, len: file.len(), header_len, header: exec::sha256(&header) })
    };
    touched(plan).zip(files).map(record).collect()
}

/// Writes a file beside the weights, which gets its name once it is complete and on disk. After an error it is not there, unless it
/// cannot be removed either.
fn write_new(
    path: &Path,
    len: u64,
    durability: Durability,
    progress: &dyn Progress,
    write: impl FnOnce(&File) -> Result<()>,
) -> Result<()> {
    if let Some(free) = free_space(path).filter(|&free| free < len) {
        let message = format!("the file needs {} but {} are free", plural(len, "byte"), count(free));
        return Err(Error::new(rules::SPACE, message).file(path).help("free some space, or merge into a new folder elsewhere"));
    }
    let staging = Staging::new(path, OutputKind::File, Overwrite::Refuse)?;
    let file = staging.create("")?;
    write(&file)?;
    if durability == Durability::Synced {
        staging.sync()?;
    }
    if progress.cancelled() {
        return Err(exec::interrupted());
    }
    // Nothing is changed yet: a file that is ours, but whose name may not be on disk, would only be in the way.
    staging.publish(durability).inspect_err(|_| {
        if is_same(&file, path) {
            let _ = disk::remove_file(path);
        }
    })
}

fn is_same(file: &File, path: &Path) -> bool {
    let identity = |meta: std::io::Result<Metadata>| meta.map(|meta| (meta.dev(), meta.ino())).ok();
    identity(file.metadata()).is_some_and(|ours| identity(path.symlink_metadata()) == Some(ours))
}

/// From a journal to complete files, and no journal.
fn carry_out(
    path: &Path,
    checkpoint: &Path,
    files: Vec<Exclusive>,
    start: Start,
    exec: &ExecOptions,
    options: &MergeOptions,
    progress: &dyn Progress,
) -> Result<Rolled> {
    let roll = || {
        let journal = Journal::open(path, &options.limits)?;
        let site = Site::new(&journal, checkpoint, files)?;
        let rolled = exec::roll_forward(&journal, &site, start, exec, options.durability, progress)?;
        if let Some(record) = journal.record() {
            write_record(&parent_of(path).join(RECORD), record, options.durability)?;
        }
        disk::remove_file(path).map_err(|e| write_error(path, e))?;
        if options.durability == Durability::Synced {
            disk::sync_dir(parent_of(path)).map_err(|e| write_error(path, e))?;
        }
        Ok(rolled)
    };
    roll().map_err(|error| incomplete(error, path, checkpoint))
}

/// The record of a folder's merges: as the journal says, however often.
fn write_record(path: &Path, text: &str, durability: Durability) -> Result<()> {
    if text.is_empty() {
        return match path.symlink_metadata() {
            Ok(_) => disk::remove_file(path).map_err(|e| write_error(path, e)),
            Err(_) => Ok(()),
        };
    }
    let staging = Staging::new(path, OutputKind::File, Overwrite::Replace)?;
    disk::write_at(&staging.create("")?, text.as_bytes(), 0).map_err(|e| write_error(path, e))?;
    if durability == Durability::Synced {
        staging.sync()?;
    }
    staging.publish(durability)
}

/// An error that leaves a journal, and says what to do with it.
fn incomplete(error: Error, journal: &Path, checkpoint: &Path) -> Error {
    let (class, mut all) = (error.class(), error.into_diagnostics());
    let message = "the merge is not complete; its journal is kept, and the files are closed to readers";
    let help = format!("complete it: loratool recover {}", checkpoint.display());
    all.push(Diagnostic::new(rules::PENDING, message).file(journal).help(help));
    Error::check(all).err().unwrap_or_else(exec::interrupted).class_of(class)
}

/// The journal that a path is about.
fn find_journal(path: &Path) -> Option<PathBuf> {
    let mut candidates = vec![journal_of(path)];
    if !path.is_dir() {
        candidates.push(path.to_owned());
        candidates.push(journal_of(parent_of(path)));
    }
    let is_journal = |p: &PathBuf| p.extension().is_some_and(|x| x == "journal") && p.symlink_metadata().is_ok();
    candidates.into_iter().find(is_journal)
}

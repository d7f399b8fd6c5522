//! What a merge needs to be gone on with after an interruption. Beside its staging folder lies a ledger: which merge it is, and which files
//! are complete and on disk, with what was found out while they were written. A later run of the same merge takes the folder over, keeps
//! those files and writes the others. Sameness is a fingerprint over all that the output depends on.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::lineage::Step;
use super::merge::MergeOptions;
use crate::error::{Class, Error, Result};
use crate::exec::{Finished, Ledger, sha256};
use crate::io::{OutputKind, Staging, disk, parent_of, write_error};
use crate::kernel::{Narrower, Sums};
use crate::plan::{Change, Contribution, Origin, Panel, Plan};
use crate::rules;

const VERSION: u32 = 1;
/// Bytes of a ledger that is read: thousands of files.
const LIMIT: u64 = 64 << 20;
/// Below these bytes of output, a run that was not asked to be resumable keeps no ledger: it is quickly done again.
const WORTH: u64 = 128 << 20;

/// When a file was last changed, in seconds and nanoseconds: its content, and anything of it, which nobody can set back; and its inode.
type State = (i64, i64, i64, i64, u64);

fn state(meta: &Metadata) -> State {
    // The images of a disk that the fault loops make are new files.
    let (ctime, ctime_nsec, inode) =
        if cfg!(feature = "faults") { (0, 0, 0) } else { (meta.ctime(), meta.ctime_nsec(), meta.ino()) };
    (meta.mtime(), meta.mtime_nsec(), ctime, ctime_nsec, inode)
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    version: u32,
    merge: String,
}

/// A file that is complete and on disk.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    file: PathBuf,
    len: u64,
    state: State,
    /// By change: the bits of the sums.
    sums: Vec<[u64; 10]>,
    digests: BTreeMap<String, String>,
}

/// All that the bytes of the output depend on, as a digest: inputs by content or by header, length and time of change; options; names.
///
/// # Errors
/// `E-001` if a file of the base cannot be looked at.
pub(super) fn fingerprint<'m, 'a: 'm>(
    output: &Path,
    merges: impl Iterator<Item = (&'m Path, &'m Plan<'a>, &'m Step)>,
    options: &MergeOptions,
) -> Result<String> {
    let mut text = format!("{:?}\n{:?}\n{:?}\n", output.file_name(), options.bind, options.output);
    text.push_str(&format!("{} {}\n", options.digests, options.allow_repeat));
    for (within, plan, step) in merges {
        text.push_str(&format!("{within:?}\n{}\n", serde_json::to_string(step).unwrap_or_default()));
        for shard in plan.base.shards() {
            let path = shard.file.path();
            let meta = fs::metadata(path).map_err(|e| crate::io::read_error(path, e))?;
            text.push_str(&format!("{:?} {} {:?}\n", shard.file_name, meta.len(), state(&meta)));
        }
        for shard in &plan.shards {
            text.push_str(&format!("{:?} {}\n", shard.file_name, shard.len));
            shard.changes.iter().for_each(|change| text.push_str(&told(change)));
        }
    }
    Ok(sha256(text.as_bytes()))
}

/// All that a change depends on beside the bytes of base and adapters: what an adapter's config says is in here.
fn told(change: &Change<'_>) -> String {
    let panel = |panel: &Panel| match panel {
        Panel::One => "1".to_owned(),
        Panel::Direct(factor) => factor.name().to_owned(),
        Panel::Transposed(factor) => format!("{} transposed", factor.name()),
    };
    let origin = match &change.origin {
        Origin::Base { shard, begin, info } => format!("{shard} {begin} {info:?}"),
        Origin::Adapter(factor) => factor.name().to_owned(),
    };
    let mut text = format!("{:?} {:?} {} {origin:?}\n", change.name, change.info, change.begin);
    for Contribution { adapter, tensors: _, left, right, rank, scale, lead, gain, rounded_apart } in &change.contributions {
        let (left, right) = (panel(left), panel(right));
        let gain = gain.as_ref().map(|gain| (gain.by.name(), gain.along, gain.over));
        text.push_str(&format!("{adapter} {left:?} {right:?} {rank} {} {lead} {gain:?} {rounded_apart}\n", scale.to_bits()));
    }
    if let Some(how) = &change.quantised {
        let role = if change.is_of_scales() { "scales" } else { "codes" };
        text.push_str(&format!("{role} {:?} {:?} {} {} {:?}\n", how.block, how.scales, how.shard, how.begin, how.info));
    }
    for patch in &change.patches {
        text.push_str(&format!("{} {:?} {}\n", patch.row, patch.with.name(), patch.index));
    }
    text
}

/// Bytes that interrupted runs have reserved beside `output`.
pub(super) fn reserved(output: &Path) -> u64 {
    let entries = fs::read_dir(parent_of(output)).into_iter().flatten().flatten();
    entries.filter(is_ledger).map(|entry| blocks(&entry.path().with_extension("tmp"))).sum()
}

fn is_ledger(entry: &fs::DirEntry) -> bool {
    entry.file_name().to_str().is_some_and(|name| name.starts_with(".loratool-") && name.ends_with(".resume"))
}

/// Bytes on disk of all files in a folder.
fn blocks(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => blocks(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    };
    entries.map(size).sum()
}

/// A staging, and what is known of the files in it.
pub(super) struct Work {
    pub(super) staging: Staging,
    /// By name inside the staging: files that an earlier run has completed.
    pub(super) done: HashMap<PathBuf, Finished>,
    ledger: Option<LedgerFile>,
}

impl Work {
    /// A staging for outputs of these names and of `bytes` in all: that of an interrupted run, if it is to be resumed and there is one.
    ///
    /// # Errors
    /// `E-002`; `E-011` if another run is writing the same merge.
    pub(super) fn start(
        output: &Path,
        kind: OutputKind,
        names: Vec<PathBuf>,
        bytes: u64,
        merge: &str,
        options: &MergeOptions,
    ) -> Result<Work> {
        let keeps = kind == OutputKind::Folder && names.len() > 1 && options.durability == crate::io::Durability::Synced;
        if !keeps || !(options.resume || bytes > WORTH) {
            let staging = Staging::new(output, kind, options.overwrite)?;
            return Ok(Work { staging, done: HashMap::new(), ledger: None });
        }
        if let Some((folder, mut ledger, done)) = options.resume.then(|| find(output, merge)).transpose()?.flatten() {
            let staging = Staging::adopt(output, folder, options.overwrite);
            let done = still_there(&staging, done);
            ledger.names = names;
            let work = Work { staging, done, ledger: Some(ledger) };
            return match clear(&work.staging.path_of(""), Path::new(""), &work.done) {
                Ok(()) => Ok(work),
                Err(error) => Err(work.fail(write_error(output, error), options)),
            };
        }
        let staging = Staging::new(output, kind, options.overwrite)?;
        let ledger = LedgerFile::create(&staging.path_of("").with_extension("resume"), names, merge)?;
        Ok(Work { staging, done: HashMap::new(), ledger: Some(ledger) })
    }

    pub(super) fn ledger(&self) -> Option<&dyn Ledger> {
        self.ledger.as_ref().map(|ledger| ledger as &dyn Ledger)
    }

    /// The end of a run that failed: what is complete stays if that was asked for, and if the next run may get further.
    pub(super) fn fail(mut self, error: Error, options: &MergeOptions) -> Error {
        let is_changed = error.diagnostics().iter().any(|d| d.rule() == rules::CHANGED);
        let passes = matches!(error.class(), Class::Interrupted | Class::Io | Class::Limit | Class::Busy) && !is_changed;
        match self.ledger.as_mut().filter(|_| options.resume && passes) {
            None => error,
            Some(ledger) => {
                ledger.keep = true;
                self.staging.keep();
                error.help("what is complete is kept: run the same command again, with --resume")
            }
        }
    }

    /// The end of a run that has done everything.
    ///
    /// # Errors
    /// As [`Staging::publish`].
    pub(super) fn publish(mut self, options: &MergeOptions) -> Result<()> {
        let staged = self.staging.path_of("");
        if let Some(ledger) = self.ledger.as_mut().filter(|_| options.resume) {
            // A name that cannot be had now may be had later.
            ledger.keep = true;
            self.staging.keep();
        }
        let published = self.staging.publish(options.durability);
        if let Some(ledger) = &mut self.ledger {
            ledger.keep &= published.is_err() && staged.is_dir();
        }
        published
    }
}

/// An open ledger, locked by this run. Dropped, it is removed, unless it is to be kept.
struct LedgerFile {
    path: PathBuf,
    /// With the length of what is written.
    file: Mutex<(File, u64)>,
    names: Vec<PathBuf>,
    keep: bool,
}

impl LedgerFile {
    fn create(path: &Path, names: Vec<PathBuf>, merge: &str) -> Result<LedgerFile> {
        let failed = |e| write_error(path, e);
        // The name goes with the staging's, which is new: a ledger of that name belongs to nothing.
        if path.symlink_metadata().is_ok() {
            disk::remove_file(path).map_err(failed)?;
        }
        let file = disk::create_new(path).map_err(failed)?;
        let ledger = LedgerFile { path: path.to_owned(), file: Mutex::new((file, 0)), names, keep: false };
        if !ledger.lock() {
            return Err(busy(path));
        }
        ledger.append(&Head { version: VERSION, merge: merge.to_owned() })?;
        Ok(ledger)
    }

    fn lock(&self) -> bool {
        let held = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // Where the file system has no locks, nobody can be told from anybody.
        !matches!(rustix::fs::flock(&held.0, FlockOperation::NonBlockingLockExclusive), Err(rustix::io::Errno::WOULDBLOCK))
    }

    fn append(&self, line: &impl Serialize) -> Result<()> {
        let failed = |e| write_error(&self.path, e);
        let text = serde_json::to_string(line).map_err(|e| failed(e.into()))? + "\n";
        let mut held = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        disk::write_at(&held.0, text.as_bytes(), held.1).map_err(failed)?;
        held.1 += text.len() as u64;
        disk::sync(&held.0).map_err(failed)
    }
}

impl Ledger for LedgerFile {
    fn finished(&self, output: usize, finished: &Finished) -> Result<()> {
        let Some(name) = self.names.get(output) else { return Ok(()) };
        let path = self.path.with_extension("tmp").join(name);
        let meta = fs::metadata(&path).map_err(|e| write_error(&path, e))?;
        self.append(&Line {
            file: name.clone(),
            len: meta.len(),
            state: state(&meta),
            sums: finished.sums.iter().map(to_words).collect(),
            digests: finished.digests.clone(),
        })
    }
}

impl Drop for LedgerFile {
    fn drop(&mut self) {
        if !self.keep {
            // Nothing is left to report to; without its staging a ledger means nothing.
            let _ = disk::remove_file(&self.path);
        }
    }
}

fn busy(path: &Path) -> Error {
    Error::new(rules::PENDING, "another run is writing the same merge").file(path).help("wait for it to end")
}

type Found = (PathBuf, LedgerFile, Vec<Line>);

/// The staging of an interrupted run of `merge` beside `output`, its ledger, and what that says.
fn find(output: &Path, merge: &str) -> Result<Option<Found>> {
    let parent = parent_of(output);
    let Ok(entries) = fs::read_dir(parent) else { return Ok(None) };
    for entry in entries.flatten().filter(is_ledger) {
        let path = parent.join(entry.file_name());
        let folder = path.with_extension("tmp");
        // In a folder for everybody, anybody can lay something down under these names.
        let is_ours = |path: &Path| path.symlink_metadata().is_ok_and(|meta| meta.uid() == rustix::process::geteuid().as_raw());
        let is_folder = folder.symlink_metadata().is_ok_and(|meta| meta.is_dir());
        if !is_folder || !is_ours(&path) || !is_ours(&folder) {
            continue;
        }
        let Some(found) = open(&path, &folder, merge)? else { continue };
        return Ok(Some(found));
    }
    Ok(None)
}

/// Opens a ledger, if it is that of `merge`. A last line that was not written whole counts for nothing.
fn open(path: &Path, folder: &Path, merge: &str) -> Result<Option<Found>> {
    let Ok(file) = disk::open_write(path) else { return Ok(None) };
    let len = file.metadata().map_or(u64::MAX, |meta| meta.len());
    if len > LIMIT {
        return Ok(None);
    }
    let mut bytes = vec![0; len as usize];
    if disk::read_at(&file, &mut bytes, 0).is_err() {
        return Ok(None);
    }
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    let mut lines = bytes[..whole].split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    let head = lines.next().and_then(|line| serde_json::from_slice::<Head>(line).ok());
    if head.is_none_or(|head| head.version != VERSION || head.merge != merge) {
        return Ok(None);
    }
    let lines = lines.map_while(|line| serde_json::from_slice::<Line>(line).ok()).collect();
    let file = Mutex::new((file, whole as u64));
    // Kept as long as it may be another run's.
    let mut ledger = LedgerFile { path: path.to_owned(), file, names: Vec::new(), keep: true };
    if !ledger.lock() {
        return Err(busy(path));
    }
    ledger.keep = false;
    Ok(Some((folder.to_owned(), ledger, lines)))
}

/// Of the files that a ledger names those that are as it says.
fn still_there(staging: &Staging, lines: Vec<Line>) -> HashMap<PathBuf, Finished> {
    let same = |line: &Line| {
        let meta = staging.path_of(&line.file).symlink_metadata();
        meta.is_ok_and(|meta| meta.is_file() && meta.len() == line.len && state(&meta) == line.state)
    };
    let finished = |line: Line| (line.file, Finished { sums: line.sums.iter().map(from_words).collect(), digests: line.digests });
    lines.into_iter().filter(same).map(finished).collect()
}

/// Removes everything in a staging but the files that are done.
fn clear(root: &Path, within: &Path, done: &HashMap<PathBuf, Finished>) -> std::io::Result<()> {
    for entry in fs::read_dir(root.join(within))? {
        let entry = entry?;
        let name = within.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            clear(root, &name, done)?;
        } else if !done.contains_key(&name) {
            disk::remove_file(&root.join(&name))?;
        }
    }
    Ok(())
}

fn to_words(sums: &Sums) -> [u64; 10] {
    let Sums { base, delta, applied, changed, changed_in, nonfinite, kept, lost, flushed } = *sums;
    let [base, delta, applied, lost] = [base, delta, applied, lost].map(f64::to_bits);
    [base, delta, applied, changed, changed_in.bf16, changed_in.f16, nonfinite, kept, lost, flushed]
}

fn from_words(words: &[u64; 10]) -> Sums {
    let [base, delta, applied, changed, bf16, f16, nonfinite, kept, lost, flushed] = *words;
    let [base, delta, applied, lost] = [base, delta, applied, lost].map(f64::from_bits);
    Sums { base, delta, applied, changed, changed_in: Narrower { bf16, f16 }, nonfinite, kept, lost, flushed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_come_back_bit_for_bit() {
        let words = std::array::from_fn(|i| (1.5f64 + i as f64).to_bits());
        assert_eq!(to_words(&from_words(&words)), words);
    }
}

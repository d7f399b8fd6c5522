//! The undo log of a merge in place, as `spec/journal.md` defines it: the tensors as they were, and what was added to them. From both
//! it can be told, before anything is put back, that the checkpoint still holds what the merge wrote.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::block::{Ground, compute_values};
use super::budget::threads;
use super::pool::each;
use super::recipe::{ChangeRecord, Factors, digest_of_marks, factor_name, factors, marks, named_digests, record, sha256, table};
use super::run::{ExecOptions, Progress, interrupted};
use super::window::{WINDOW, compute_window, mark, windows};
use crate::adapter::Factor;
use crate::codec::safetensors::{Layout, SafetensorsFile, Strictness};
use crate::error::{Class, Error, Result};
use crate::io::{ReadMode, disk, write_error};
use crate::kernel::Isa;
use crate::limits::Limits;
use crate::plan::{Change, Plan};
use crate::rules;
use crate::tensor::{TensorInfo, TensorSource, pieces};

const MANIFEST: &str = "loratool.undo";
const MANIFEST_DIGEST: &str = "loratool.undo.sha256";
/// One mark per window: the bytes that the log holds.
const OLD: &str = "loratool.old";
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    version: u32,
    window: u64,
    keep_nonfinite: bool,
    /// The adapters that were merged: name, content root, weight.
    merged: Vec<(String, String, f64)>,
    /// `file` is the place in this list, and `begin` is 0.
    changes: Vec<ChangeRecord>,
    /// Digests of [`OLD`] and of the factors.
    digests: BTreeMap<String, String>,
}

/// An undo log to be written.
pub(crate) struct UndoDraft<'c, 'a> {
    plan: &'c Plan<'a>,
    changes: Vec<&'c Change<'a>>,
    factors: Vec<&'c Factor>,
    old: &'c [u64],
    layout: Layout,
}

impl<'c, 'a> UndoDraft<'c, 'a> {
    /// Of a plan that only changes tensors where they are; `old` are the marks of their windows,
    /// and `merged` names the adapters.
    ///
    /// # Errors
    /// `E-001`, `E-004` if a factor cannot be read.
    pub(crate) fn new(plan: &'c Plan<'a>, old: &'c [u64], merged: Vec<(String, String, f64)>) -> Result<Self> {
        let changes: Vec<&Change<'a>> = plan.changes().collect();
        let mut factors = Vec::new();
        let numbered: Vec<_> = changes.iter().copied().enumerate().collect();
        let mut records = record(&numbered, &mut factors);
        records.iter_mut().for_each(|record| record.begin = 0);
        let mut digests = named_digests(&factors)?;
        digests.insert(OLD.to_owned(), digest_of_marks(old));
        let keep_nonfinite = plan.keep_nonfinite;
        let manifest = Manifest { version: VERSION, window: WINDOW, keep_nonfinite, merged, changes: records, digests };
        let text = serde_json::to_string(&manifest)
            .map_err(|e| Error::new(rules::JOURNAL, format!("the undo log cannot be written: {e}")))?;
        let metadata = [(MANIFEST_DIGEST.to_owned(), sha256(text.as_bytes())), (MANIFEST.to_owned(), text)];
        let names: Vec<String> = (0..factors.len()).map(factor_name).collect();
        let old_info = table(old.len() as u64);
        let mut tensors: Vec<(&str, &TensorInfo)> = vec![(OLD, &old_info)];
        tensors.extend(changes.iter().map(|change| (change.name.as_str(), &change.info)));
        tensors.extend(names.iter().map(String::as_str).zip(factors.iter().map(|factor| factor.info())));
        let layout = Layout::new(&metadata, &tensors);
        Ok(UndoDraft { plan, changes, factors, old, layout })
    }

    /// Length of the file.
    pub(crate) fn len(&self) -> u64 {
        self.layout.file_len
    }

    /// Writes it into an empty file, which `path` is the name of in messages.
    ///
    /// # Errors
    /// `E-002`, `E-001`, `E-004`; `E-006` if `progress` cancels.
    pub(crate) fn write(&self, file: &File, path: &Path, progress: &dyn Progress) -> Result<()> {
        let put = |bytes: &[u8], at: u64| disk::write_at(file, bytes, at).map_err(|e| write_error(path, e).offset(at));
        put(&self.layout.head, 0)?;
        let marks: Vec<u8> = self.old.iter().flat_map(|mark| mark.to_le_bytes()).collect();
        put(&marks, self.layout.head.len() as u64)?;
        let mut begins = self.layout.offsets.iter().skip(1);
        for (change, begin) in self.changes.iter().zip(&mut begins) {
            pieces(change.info.bytes(), |offset, bytes| {
                if progress.cancelled() {
                    return Err(interrupted());
                }
                self.plan.base.read(&change.name, offset, bytes)?;
                put(bytes, begin + offset)
            })?;
        }
        for (factor, begin) in self.factors.iter().zip(begins) {
            pieces(factor.info().bytes(), |offset, bytes| {
                factor.read(offset, bytes)?;
                put(bytes, begin + offset)
            })?;
        }
        Ok(())
    }
}

/// An open undo log.
pub(crate) struct UndoLog {
    path: PathBuf,
    manifest: Manifest,
    factors: Factors,
    old: Vec<u64>,
}

impl UndoLog {
    /// Opens a log and checks all of it but the tensors that it puts back, which [`check`](Self::check) reads.
    ///
    /// # Errors
    /// `E-010` if it is not whole, or says what cannot be; `E-001`.
    pub(crate) fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let broken =
            |what: String| Error::new(rules::JOURNAL, what).file(path).help("check that this is the file that --undo-log wrote");
        let opened = SafetensorsFile::open(path, ReadMode::Read, Strictness::Strict, limits).map_err(|e| match e.class() {
            Class::Io => e,
            _ => broken(format!("this is no undo log: {}", e.diagnostics().first().map_or("", |d| d.message()))),
        })?;
        let text = |key: &str| opened.metadata().iter().find(|(k, _)| k == key).map(|(_, text)| text.clone());
        let manifest = text(MANIFEST).ok_or_else(|| broken("this is no undo log".to_owned()))?;
        if text(MANIFEST_DIGEST) != Some(sha256(manifest.as_bytes())) {
            return Err(broken("the undo log's manifest is not the one that its digest names".to_owned()));
        }
        let manifest: Manifest =
            serde_json::from_str(&manifest).map_err(|e| broken(format!("the undo log's manifest cannot be read: {e}")))?;
        if (manifest.version, manifest.window) != (VERSION, WINDOW) {
            let message = format!("the undo log is of version {}, and this program knows version {VERSION}", manifest.version);
            return Err(broken(message));
        }
        let damaged = |what: String| broken(format!("the undo log is damaged: {what}"));
        let factors = factors(opened, &manifest.digests)?.map_err(damaged)?;
        for (index, record) in manifest.changes.iter().enumerate() {
            let wrong = || damaged(format!("its change of {:?} says what cannot be", record.tensor));
            let (_, change) = record.change(&factors).ok_or_else(wrong)?;
            let old = factors.get(&record.tensor).filter(|old| *old.info() == change.info);
            if old.is_none() || record.file != index || record.begin != 0 || record.fits(&change).is_none() {
                return Err(wrong());
            }
        }
        let log = UndoLog { path: path.to_owned(), manifest, factors, old: Vec::new() };
        let (windows, _) = windows(log.changes().iter());
        let old = log.factors.get(OLD).filter(|old| *old.info() == table(windows.len() as u64));
        let old = marks(old.ok_or_else(|| damaged("its table does not fit its changes".to_owned()))?)?;
        Ok(UndoLog { old, ..log })
    }

    /// The tensors that it puts back.
    pub(crate) fn originals(&self) -> impl Iterator<Item = (&str, &Factor)> {
        self.manifest.changes.iter().filter_map(|record| Some((record.tensor.as_str(), self.factors.get(&record.tensor)?)))
    }

    /// The adapters that were merged: name, content root, weight.
    pub(crate) fn merged(&self) -> &[(String, String, f64)] {
        &self.manifest.merged
    }

    fn changes(&self) -> Vec<Change<'_>> {
        self.manifest.changes.iter().filter_map(|record| Some(record.change(&self.factors)?.1)).collect()
    }

    /// Makes sure that `merged` holds, in every tensor of the log, what the merge made of the bytes that the log holds.
    ///
    /// # Errors
    /// `E-010` if the log is damaged, or if `merged` holds something else; `E-001`, `E-004`, `E-006`.
    pub(crate) fn check(&self, merged: &dyn TensorSource, options: &ExecOptions, progress: &dyn Progress) -> Result<()> {
        let changes = self.changes();
        let isa = if options.portable { Isa::Portable } else { Isa::best() };
        let (windows, _) = windows(changes.iter());
        each(threads(options, windows.len()), windows.len(), |index, scratch| {
            if progress.cancelled() {
                return Err(interrupted());
            }
            let window = &windows[index];
            let change = &changes[window.change];
            let wrong = |file: &Path, what: &str, help: &str| {
                Err(Error::new(rules::JOURNAL, what.to_owned()).file(file).tensor(&change.name).help(help.to_owned()))
            };
            if merged.info(&change.name) != Some(&change.info) {
                return wrong(
                    merged.label(),
                    "the tensor is not there in the dtype and shape that the undo log has",
                    "check the paths",
                );
            }
            let mut bytes = vec![0; window.len as usize];
            self.read(window.change, window.offset, &mut bytes)?;
            let old = mark(&bytes);
            if self.old.get(index) != Some(&old) {
                return wrong(&self.path, "the undo log is damaged: a tensor is not what it was", "there is no help for it");
            }
            merged.read(&change.name, window.offset, &mut bytes)?;
            let (_, out) = compute_window(self, isa, change, window, options.tile_bytes as u64, scratch, compute_values)?;
            let as_merged = out == bytes;
            scratch.window = out;
            match as_merged {
                true => Ok(()),
                false if mark(&bytes) == old => {
                    wrong(merged.label(), "the tensor holds what it did before the merge", "there is nothing to undo")
                }
                false => wrong(
                    merged.label(),
                    "the tensor does not hold what the merge wrote",
                    "it was changed since; what was merged later is undone first",
                ),
            }
        })?;
        Ok(())
    }
}

impl Ground for UndoLog {
    fn path(&self) -> &Path {
        &self.path
    }

    fn keep_nonfinite(&self) -> bool {
        self.manifest.keep_nonfinite
    }

    fn read(&self, change: usize, offset: u64, buf: &mut [u8]) -> Result<()> {
        let name = self.manifest.changes.get(change).map(|record| &record.tensor);
        match name.and_then(|name| self.factors.get(name)) {
            Some(old) => old.read(offset, buf),
            None => unreachable!("every change of an open log has its tensor"),
        }
    }
}

//! The journal of a merge in place, as `spec/journal.md` defines it: all that is needed to carry the merge to its end without base,
//! adapter or options, and the marks that tell which units of the files have got there. It is a safetensors file. This module writes
//! and reads it; what it means for the files is in [`super::roll`].

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::load::float_of;
use super::recipe::{ChangeRecord, Factors, digest_of_marks, factor_name, factors, marks, named_digests, record, sha256, table};
use super::window::{UNIT, WINDOW, Window, windows};
use crate::adapter::Factor;
use crate::codec::safetensors::{Layout, SafetensorsFile, Strictness};
use crate::error::{Class, Error, Result};
use crate::io::{Durability, ReadMode, disk, write_error};
use crate::limits::Limits;
use crate::plan::Change;
use crate::rules;
use crate::tensor::{TensorInfo, pieces};

const MANIFEST: &str = "loratool.journal";
const MANIFEST_DIGEST: &str = "loratool.journal.sha256";
/// One mark per window: its bytes before the merge.
const OLD: &str = "old";
/// One mark per unit: its bytes after the merge, or 0 as long as they have not been computed.
const NEW: &str = "new";
const VERSION: u32 = 1;
/// Bytes, as in `C-003`.
const HEADER_LIMIT: u64 = 100_000_000;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    version: u32,
    window: u64,
    unit: u64,
    keep_nonfinite: bool,
    /// The text of the folder's record of merges afterwards, empty if it has none then; absent for a single file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    record: Option<String>,
    files: Vec<FileRecord>,
    changes: Vec<ChangeRecord>,
    /// Digests of all tensors but [`NEW`].
    digests: BTreeMap<String, String>,
}

/// A file that is merged into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileRecord {
    /// Plain name in the journal's folder.
    pub(crate) name: String,
    pub(crate) len: u64,
    /// The length field, which the file does not have while the journal is there.
    pub(crate) header_len: u64,
    /// SHA-256 of the header that follows it.
    pub(crate) header: String,
}

/// An open journal.
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    manifest: Manifest,
    factors: Factors,
    /// Marks of the windows before the merge.
    pub(super) old: Vec<u64>,
    /// Offset of the first mark of [`NEW`].
    new_at: u64,
}

/// The bytes of a journal to be written.
pub(crate) struct Draft<'c> {
    head: Vec<u8>,
    offsets: Vec<u64>,
    factors: Vec<&'c Factor>,
    old: &'c [u64],
    /// Length of the whole file.
    pub(crate) len: u64,
}

impl<'c> Draft<'c> {
    /// Describes the changes of `files` by index, and the marks `old` of their windows.
    ///
    /// # Errors
    /// `A-008`, `E-001`, `E-004` if a factor cannot be read.
    pub(crate) fn new(
        files: &[FileRecord],
        changes: &[(usize, &'c Change<'_>)],
        old: &'c [u64],
        keep_nonfinite: bool,
        record_after: Option<String>,
    ) -> Result<Self> {
        let mut factors: Vec<&'c Factor> = Vec::new();
        let records = record(changes, &mut factors);
        let units = windows(changes.iter().map(|(_, change)| *change)).1;
        let (old_info, new_info) = (table(old.len() as u64), table(units));
        let mut digests = named_digests(&factors)?;
        digests.insert(OLD.to_owned(), digest_of_marks(old));
        let manifest = Manifest {
            version: VERSION,
            window: WINDOW,
            unit: UNIT,
            keep_nonfinite,
            record: record_after,
            files: files.to_vec(),
            changes: records,
            digests,
        };
        let text = serde_json::to_string(&manifest)
            .map_err(|e| Error::new(rules::JOURNAL, format!("the journal cannot be written: {e}")))?;
        let metadata = [(MANIFEST_DIGEST.to_owned(), sha256(text.as_bytes())), (MANIFEST.to_owned(), text)];
        let names: Vec<String> = (0..factors.len()).map(factor_name).collect();
        let mut tensors: Vec<(&str, &TensorInfo)> = vec![(OLD, &old_info), (NEW, &new_info)];
        tensors.extend(names.iter().map(String::as_str).zip(factors.iter().map(|factor| factor.info())));
        let layout = Layout::new(&metadata, &tensors);
        Ok(Draft { head: layout.head, offsets: layout.offsets, factors, old, len: layout.file_len })
    }

    /// Writes the journal into an empty file, which `path` is the name of in messages.
    ///
    /// # Errors
    /// `E-002`; `E-001`, `E-004` if a factor cannot be read.
    pub(crate) fn write(&self, file: &File, path: &Path) -> Result<()> {
        let put = |bytes: &[u8], at: u64| disk::write_at(file, bytes, at).map_err(|e| write_error(path, e).offset(at));
        put(&self.head, 0)?;
        let marks: Vec<u8> = self.old.iter().flat_map(|mark| mark.to_le_bytes()).collect();
        let first = self.head.len() as u64;
        put(&marks, first)?;
        // Zeros are written, not only reserved: the marks then overwrite blocks that are there, which is quickest to force to disk.
        let new_at = first + marks.len() as u64;
        let end = self.offsets.get(2).copied().unwrap_or(self.len);
        pieces(end - new_at, |offset, zeros| put(zeros, new_at + offset))?;
        for (factor, begin) in self.factors.iter().zip(self.offsets.iter().skip(2)) {
            pieces(factor.info().bytes(), |offset, bytes| {
                factor.read(offset, bytes)?;
                put(bytes, begin + offset)
            })?;
        }
        Ok(())
    }
}

impl Journal {
    /// Opens a journal and checks all of it but the marks of the new bytes.
    ///
    /// # Errors
    /// `E-010` if it is not whole, or says what cannot be; `E-001`, `E-002` if it cannot be opened; `E-011` if it is being carried out.
    pub(crate) fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let file = disk::open_write(path).map_err(|e| write_error(path, e))?;
        let broken = |what: String| {
            Error::new(rules::JOURNAL, what).file(path).help(
                "a journal is not changed by hand; if there is no other copy of it, get the checkpoint again and remove the journal",
            )
        };
        let opened = SafetensorsFile::open(path, ReadMode::Read, Strictness::Strict, limits).map_err(|e| match e.class() {
            Class::Io => e,
            _ => broken(format!("the journal is damaged: {}", e.diagnostics().first().map_or("", |d| d.message()))),
        })?;
        let text = |key: &str| opened.metadata().iter().find(|(k, _)| k == key).map(|(_, text)| text.clone());
        let manifest = text(MANIFEST).ok_or_else(|| broken("this is not a journal".to_owned()))?;
        if text(MANIFEST_DIGEST) != Some(sha256(manifest.as_bytes())) {
            return Err(broken("the journal's manifest is not the one that its digest names".to_owned()));
        }
        let manifest: Manifest =
            serde_json::from_str(&manifest).map_err(|e| broken(format!("the journal's manifest cannot be read: {e}")))?;
        if (manifest.version, manifest.window, manifest.unit) != (VERSION, WINDOW, UNIT) {
            let message = format!("the journal is of version {}, and this program knows version {VERSION}", manifest.version);
            return Err(broken(message));
        }
        let new_at = opened.entry(NEW).map(|entry| entry.begin);
        let factors = factors(opened, &manifest.digests)?.map_err(|what| broken(format!("the journal is damaged: {what}")))?;
        let mut journal =
            Journal { path: path.to_owned(), file, manifest, factors, old: Vec::new(), new_at: new_at.unwrap_or_default() };
        journal.check().map_err(broken)?;
        let (windows, units) = journal.windows();
        let is = |name: &str, count: u64| journal.factors.get(name).filter(|factor| *factor.info() == table(count));
        let (old, new) = (is(OLD, windows.len() as u64), is(NEW, units));
        let (Some(old), Some(_)) = (old, new) else {
            return Err(broken("the journal's tables do not fit its changes".to_owned()));
        };
        journal.old = marks(old)?;
        Ok(journal)
    }

    /// The files that it is about.
    pub(crate) fn files(&self) -> &[FileRecord] {
        &self.manifest.files
    }

    /// What the record of the folder's merges is to be, if it is a folder; empty for none.
    pub(crate) fn record(&self) -> Option<&str> {
        self.manifest.record.as_deref()
    }

    /// Base values that are not finite are left as they are.
    pub(crate) fn keep_nonfinite(&self) -> bool {
        self.manifest.keep_nonfinite
    }

    /// What is changed, each with the index of its file.
    pub(crate) fn changes(&self) -> Vec<(usize, Change<'_>)> {
        self.manifest.changes.iter().filter_map(|record| record.change(&self.factors)).collect()
    }

    /// The windows of all changes, and the number of units in them.
    pub(super) fn windows(&self) -> (Vec<Window>, u64) {
        let changes = self.changes();
        windows(changes.iter().map(|(_, change)| change))
    }

    /// The marks of a window's new bytes.
    pub(super) fn marks(&self, window: &Window) -> Result<Vec<u64>> {
        let mut bytes = vec![0; window.units() as usize * 8];
        let at = self.new_at + window.first_unit * 8;
        disk::read_at(&self.file, &mut bytes, at).map_err(|e| crate::io::read_error(&self.path, e).offset(at))?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|mark| u64::from_le_bytes(*mark)).collect())
    }

    /// Writes the marks of a window's new bytes, which must be on disk before one of these bytes is.
    pub(super) fn set_marks(&self, window: &Window, marks: &[u64], durability: Durability) -> Result<()> {
        let bytes: Vec<u8> = marks.iter().flat_map(|mark| mark.to_le_bytes()).collect();
        disk::write_at(&self.file, &bytes, self.new_at + window.first_unit * 8).map_err(|e| write_error(&self.path, e))?;
        match durability {
            Durability::Synced => disk::sync_data(&self.file).map_err(|e| write_error(&self.path, e)),
            Durability::Fast => Ok(()),
        }
    }

    /// Does the manifest say what can be? The digests guard against accidents, this against everything else.
    fn check(&self) -> Result<(), String> {
        let plain = |name: &str| !name.is_empty() && !name.contains(['/', '\\', '\0']) && name != "." && name != "..";
        if let Some(file) = self.manifest.files.iter().find(|file| !plain(&file.name)) {
            return Err(format!("the journal names {:?}, which is no name in its folder", file.name));
        }
        if let Some(file) = self.manifest.files.iter().find(|f| f.header_len > HEADER_LIMIT || f.header_len + 8 > f.len) {
            return Err(format!("the journal says that the header of {:?} has {} bytes", file.name, file.header_len));
        }
        let mut ends: HashMap<usize, u64> = HashMap::new();
        for record in &self.manifest.changes {
            let wrong = |what: &str| format!("the journal's change of {:?} {what}", record.tensor);
            let file = self.manifest.files.get(record.file).ok_or_else(|| wrong("is of no file"))?;
            let (_, change) = record.change(&self.factors).ok_or_else(|| wrong("names a tensor that is not there"))?;
            let size = float_of(record.dtype).ok_or_else(|| wrong("is of no plain float"))?.size() as u64;
            let end = change.info.shape.bytes(record.dtype).and_then(|bytes| record.begin.checked_add(bytes));
            let data = file.header_len.saturating_add(8).max(ends.get(&record.file).copied().unwrap_or(0));
            let end = end.filter(|&end| record.begin >= data && end <= file.len && record.begin % size == 0);
            ends.insert(record.file, end.ok_or_else(|| wrong("does not lie in its file"))?);
            record.fits(&change).ok_or_else(|| wrong("does not fit its factors"))?;
        }
        Ok(())
    }
}

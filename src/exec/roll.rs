//! Carries a journal to its end, from wherever the files are: nothing done yet, or interrupted anywhere. A merge in place is this, on a
//! journal just written; a recovery is this, on one that was found. `spec/journal.md` says why it ends in the same bytes.

use std::path::{Path, PathBuf};

use super::block::{Ground, Scratch, compute_block, compute_values};
use super::budget::threads;
use super::journal::Journal;
use super::pool::{each_in_lanes, lanes};
use super::recipe::sha256;
use super::run::{ExecOptions, Progress};
use super::tasks::size_of_value;
use super::window::{Compute, Window, compute_window, mark};
use crate::error::{Class, Error, Result};
use crate::io::{Durability, Exclusive};
use crate::kernel::{Isa, Sums};
use crate::plan::Change;
use crate::rules;

/// What the length field of a file's header is while the file is neither what it was nor what it will be: no reader takes it.
const POISON: [u8; 8] = [0xff; 8];

/// The files of a journal, open to be changed.
pub(crate) struct Site {
    path: PathBuf,
    files: Vec<Exclusive>,
    keep_nonfinite: bool,
}

/// How far the files may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// Nothing is done, and all results are known to be finite.
    Proven,
    /// Whatever an interruption left.
    Found,
}

/// How far a window is.
enum State {
    New,
    /// None of it is written.
    Old,
    /// A part of it is; what was computed of it, and its new bytes.
    Torn(Sums, Vec<u8>),
}

/// What a run through a journal did.
#[derive(Debug)]
pub(crate) struct Rolled {
    /// By change; of what was computed in this run.
    pub(crate) sums: Vec<Sums>,
    /// Bytes of changed tensors that were written in this run.
    pub(crate) written: u64,
}

impl Site {
    /// The files that `journal` is about, in its order; `path` is the checkpoint's name in messages.
    ///
    /// # Errors
    /// `E-010` if a file is not the one that the journal is about.
    pub(crate) fn new(journal: &Journal, path: &Path, files: Vec<Exclusive>) -> Result<Self> {
        for (record, file) in journal.files().iter().zip(&files) {
            let foreign = |what: String| {
                Err(Error::new(rules::JOURNAL, what)
                    .file(file.path())
                    .help("the file was replaced or edited after the merge was interrupted; nothing was written to it"))
            };
            if file.len() != record.len {
                return foreign(format!("the journal is about a file of {} bytes, and this has {}", record.len, file.len()));
            }
            let mut header = vec![0; usize::try_from(record.header_len).unwrap_or(usize::MAX).min(record.len as usize)];
            file.read(8, &mut header[..])?;
            if sha256(&header) != record.header {
                return foreign("the header is not the one of the file that the journal is about".to_owned());
            }
        }
        Ok(Site { path: path.to_owned(), files, keep_nonfinite: journal.keep_nonfinite() })
    }

    fn force(&self, durability: Durability) -> Result<()> {
        match durability {
            Durability::Synced => self.files.iter().try_for_each(Exclusive::sync),
            Durability::Fast => Ok(()),
        }
    }
}

impl Ground for Site {
    fn path(&self) -> &Path {
        &self.path
    }

    fn keep_nonfinite(&self) -> bool {
        self.keep_nonfinite
    }

    fn read(&self, shard: usize, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.files[shard].read(offset, buf)
    }
}

/// Carries `journal` to its end in the files of `site`, which are then complete and open to readers. The journal itself is left.
///
/// # Errors
/// `E-001`, `E-002`; `E-006` if `progress` cancels; `E-010` if a file holds bytes that neither the old nor the new one has: all windows are
/// looked at before one is written. The journal is then as good as before, and so is a file that is not complete: no reader takes it.
pub(crate) fn roll_forward(
    journal: &Journal,
    site: &Site,
    start: Start,
    options: &ExecOptions,
    durability: Durability,
    progress: &dyn Progress,
) -> Result<Rolled> {
    let changes = journal.changes();
    let isa = if options.portable { Isa::Portable } else { Isa::best() };
    let (windows, _) = journal.windows();
    progress.expect(windows.iter().map(|window| window.len).sum());
    for file in &site.files {
        file.write(0, &POISON)?;
    }
    site.force(durability)?;
    let roll = Roll { journal, site, changes: &changes, start, isa, tile: options.tile_bytes as u64, durability };
    let by_file = lanes(windows.iter().map(|window| changes[window.change].0));
    let threads = threads(options, windows.len());
    let go_on = || match progress.cancelled() {
        true => Err(Error::new(rules::INTERRUPTED, "interrupted; the merge is not complete")),
        false => Ok(()),
    };
    let old = |index: usize| journal.old.get(index).copied();
    if start == Start::Found {
        each_in_lanes(threads, &by_file, |index, scratch| {
            go_on()?;
            roll.state(&windows[index], old(index), scratch).map(drop)
        })?;
    }
    let found = each_in_lanes(threads, &by_file, |index, scratch| {
        go_on()?;
        let done = roll.window(&windows[index], old(index), scratch)?;
        progress.advance(windows[index].len);
        Ok(done)
    })?;
    site.force(durability)?;
    for (file, record) in site.files.iter().zip(journal.files()) {
        file.write(0, &record.header_len.to_le_bytes())?;
    }
    site.force(durability)?;
    let mut rolled = Rolled { sums: vec![Sums::default(); changes.len()], written: 0 };
    for (window, sums) in windows.iter().zip(found) {
        if let Some(sums) = sums {
            rolled.sums[window.change].add(&sums);
            rolled.written += window.len;
        }
    }
    Ok(rolled)
}

struct Roll<'r> {
    journal: &'r Journal,
    site: &'r Site,
    changes: &'r [(usize, Change<'r>)],
    start: Start,
    isa: Isa,
    tile: u64,
    durability: Durability,
}

impl Roll<'_> {
    /// Brings one window to its new bytes; `None` if it has them already.
    fn window(&self, window: &Window, old: Option<u64>, scratch: &mut Scratch) -> Result<Option<Sums>> {
        let (sums, out) = match self.start {
            Start::Proven => self.compute(window, scratch, compute_block)?,
            Start::Found => match self.state(window, old, scratch)? {
                State::New => return Ok(None),
                State::Old => self.compute(window, scratch, compute_values)?,
                State::Torn(sums, out) => (sums, out),
            },
        };
        let marks: Vec<u64> = window.pieces().map(|piece| mark(&out[piece])).collect();
        // First the marks, then the bytes: a unit whose mark is not on disk is one that was not written.
        self.journal.set_marks(window, &marks, self.durability)?;
        self.file(window).write(window.offset, &out)?;
        scratch.window = out;
        Ok(Some(sums))
    }

    /// How far a window is that an interruption left.
    fn state(&self, window: &Window, old: Option<u64>, scratch: &mut Scratch) -> Result<State> {
        let file = self.file(window);
        let marks = self.journal.marks(window)?;
        let mut now = vec![0; window.len as usize];
        file.read(window.offset, &mut now)?;
        if marks.iter().zip(window.pieces()).all(|(&known, piece)| known == mark(&now[piece])) {
            return Ok(State::New);
        }
        // Nothing was written if the bytes are the old ones, however far their marks got. Without marks it cannot be otherwise.
        if old == Some(mark(&now)) {
            return Ok(State::Old);
        }
        if marks.iter().all(|&known| known == 0) {
            return Err(self.foreign(window, file, window.offset));
        }
        // Values that have been updated already are updated twice here, and overflow perhaps; their marks say that they stay.
        let (sums, mut out) = self.compute(window, scratch, compute_values)?;
        for (&known, piece) in marks.iter().zip(window.pieces()).filter(|(known, _)| **known != 0) {
            let size = size_of_value(&self.changes[window.change].1) as usize;
            if mark(&out[piece.clone()]) != known && !mend(&now[piece.clone()], &mut out[piece.clone()], size, known) {
                return Err(self.foreign(window, file, window.offset + piece.start as u64));
            }
        }
        Ok(State::Torn(sums, out))
    }

    fn file(&self, window: &Window) -> &Exclusive {
        &self.site.files[self.changes[window.change].0]
    }

    fn compute(&self, window: &Window, scratch: &mut Scratch, block: Compute) -> Result<(Sums, Vec<u8>)> {
        compute_window(self.site, self.isa, &self.changes[window.change].1, window, self.tile, scratch, block)
    }

    fn foreign(&self, window: &Window, file: &Exclusive, offset: u64) -> Error {
        let what = "the file holds bytes that are neither those from before the merge nor those of after it";
        Error::new(rules::JOURNAL, what)
            .class_of(Class::Integrity)
            .file(file.path())
            .tensor(&self.changes[window.change].1.name)
            .offset(offset)
            .help("another program wrote to the file after the merge was interrupted; get the checkpoint again")
    }
}

/// Finds the unit that has the mark `known`: all of `now` if it was written, otherwise a part of `now` and the rest as computed from old
/// values. Disks and kernels cut writes between units, but not all file systems do.
fn mend(now: &[u8], out: &mut [u8], size: usize, known: u64) -> bool {
    let computed = out.to_vec();
    (0..=now.len()).rev().step_by(size).any(|end| {
        out.copy_from_slice(&computed);
        out[..end].copy_from_slice(&now[..end]);
        mark(out) == known
    })
}

//! Files that are in use for long, of which a process may not have as many open as a model has shards. A file is closed when others need
//! its descriptor, and opened again, by its name, when it is read or written next; it must then be the file that it was.

use std::collections::VecDeque;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};
use std::time::SystemTime;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::disk;
use super::publish::Durability;

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Reading,
    Writing,
}

/// A file that is open, or can be opened again.
#[derive(Debug)]
pub(crate) struct Kept {
    path: PathBuf,
    purpose: Use,
    seen: Seen,
    slot: Arc<Slot>,
}

/// A file that is open, unless its descriptor was needed.
#[derive(Debug)]
struct Slot {
    /// Whoever uses it holds the lock for reading, so that it is not closed meanwhile.
    file: RwLock<Option<File>>,
    /// It is forced to disk before it is closed: the system tells of a failed write to the descriptors that are open then, and perhaps to
    /// no other.
    durable: bool,
    /// The errno of the first sync that failed. The system tells it once, and the next sync would succeed.
    failed: Mutex<Option<i32>>,
}

impl Slot {
    fn sync(&self, file: &File) -> io::Result<()> {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(errno) = *failed {
            return Err(io::Error::from_raw_os_error(errno));
        }
        disk::sync(file).inspect_err(|error| *failed = Some(error.raw_os_error().unwrap_or(Errno::IO.raw_os_error())))
    }
}

/// The slots with an open file, the one that was opened first in front.
static OPEN: Mutex<VecDeque<Weak<Slot>>> = Mutex::new(VecDeque::new());

/// What tells a file from another one, and from itself after a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    identity: (u64, u64),
    len: u64,
    modified: Option<SystemTime>,
}

impl Seen {
    fn of(meta: &Metadata) -> Self {
        Seen { identity: (meta.dev(), meta.ino()), len: meta.len(), modified: meta.modified().ok() }
    }
}

impl Kept {
    /// A file that is read. It must not change from here on.
    ///
    /// # Errors
    /// Those of `fstat(2)`.
    pub(crate) fn reading(file: File, path: &Path) -> io::Result<Self> {
        Self::new(file, path, Use::Reading, false)
    }

    /// A file of our own, that is written, and forced to disk before it is closed if it is to be durable.
    ///
    /// # Errors
    /// Those of `fstat(2)`.
    pub(crate) fn writing(file: File, path: &Path, durability: Durability) -> io::Result<Self> {
        Self::new(file, path, Use::Writing, durability == Durability::Synced)
    }

    fn new(file: File, path: &Path, purpose: Use, durable: bool) -> io::Result<Self> {
        let seen = Seen::of(&file.metadata()?);
        let kept = Kept {
            path: path.to_owned(),
            purpose,
            seen,
            slot: Arc::new(Slot { file: RwLock::new(Some(file)), durable, failed: Mutex::new(None) }),
        };
        kept.enter();
        Ok(kept)
    }

    /// Length when it was first opened.
    pub(crate) fn len(&self) -> u64 {
        self.seen.len
    }

    /// Device and inode.
    pub(crate) fn identity(&self) -> (u64, u64) {
        self.seen.identity
    }

    /// Calls `f` with the open file.
    ///
    /// # Errors
    /// Those of `f`; those of `open(2)`, and `ESTALE` if another file has the name by now, or the file has changed.
    pub(crate) fn with<T>(&self, mut f: impl FnMut(&File) -> io::Result<T>) -> io::Result<T> {
        loop {
            if let Some(file) = &*self.slot.file.read().unwrap_or_else(PoisonError::into_inner) {
                return f(file);
            }
            self.open_again()?;
        }
    }

    /// Forces what was written to disk.
    ///
    /// # Errors
    /// Those of `fsync(2)`, the first of them again and again; those of [`with`](Self::with).
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.with(|file| self.slot.sync(file))
    }

    fn open_again(&self) -> io::Result<()> {
        let mut slot = self.slot.file.write().unwrap_or_else(PoisonError::into_inner);
        if slot.is_some() {
            return Ok(());
        }
        make_room();
        let file = match self.purpose {
            Use::Reading => disk::open(&self.path),
            Use::Writing => disk::open_write(&self.path),
        }?;
        self.check(&file.metadata()?)?;
        *slot = Some(file);
        drop(slot);
        self.enter();
        Ok(())
    }

    /// Whether the file is still there, and what it was.
    ///
    /// # Errors
    /// Those of `stat(2)`, and `ESTALE`.
    pub(crate) fn unchanged(&self) -> io::Result<()> {
        self.check(&self.path.metadata()?)
    }

    fn check(&self, meta: &Metadata) -> io::Result<()> {
        let now = Seen::of(meta);
        let same = match self.purpose {
            Use::Reading => now == self.seen,
            Use::Writing => now.identity == self.seen.identity,
        };
        if same { Ok(()) } else { Err(Errno::STALE.into()) }
    }

    /// Is open from here on.
    fn enter(&self) {
        make_room();
        OPEN.lock().unwrap_or_else(PoisonError::into_inner).push_back(Arc::downgrade(&self.slot));
    }
}

/// Closes files until one more may be open. What is in use stays open, so there may be more of them for a time.
fn make_room() {
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    open.retain(|slot| slot.strong_count() > 0);
    for _ in 0..open.len() {
        if open.len() < most() {
            return;
        }
        let Some(slot) = open.pop_front() else { return };
        let Some(kept) = slot.upgrade() else { continue };
        match kept.file.try_write() {
            Ok(mut file) => {
                if let Some(file) = file.take().filter(|_| kept.durable) {
                    // A failure is kept, for whoever syncs next.
                    let _ = kept.sync(&file);
                }
            }
            Err(_) => open.push_back(slot),
        };
    }
}

/// How many files stay open: a quarter of the descriptors that the process may have, the rest being for what is opened once.
fn most() -> usize {
    static MOST: OnceLock<usize> = OnceLock::new();
    *MOST.get_or_init(|| (descriptors() / 4).max(1))
}

/// How many threads may at a time have a file open to read and one to write.
pub(crate) fn most_threads() -> usize {
    (descriptors() / 4).saturating_sub(1).max(1)
}

fn descriptors() -> usize {
    getrlimit(Resource::Nofile).current.map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn read(kept: &Kept) -> io::Result<u8> {
        let mut byte = [0];
        kept.with(|file| file.read_exact_at(&mut byte, 0))?;
        Ok(byte[0])
    }

    /// Closes a file, as if others needed its descriptor.
    fn close(kept: &Kept) {
        kept.slot.file.write().unwrap().take();
    }

    #[test]
    fn a_file_that_was_closed_is_opened_again_unless_it_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, [7]).unwrap();
        let kept = Kept::reading(File::open(&path).unwrap(), &path).unwrap();
        close(&kept);
        assert_eq!(read(&kept).unwrap(), 7);
        assert!(kept.slot.file.read().unwrap().is_some());
        std::fs::write(folder.path().join("other"), [8]).unwrap();
        std::fs::rename(folder.path().join("other"), &path).unwrap();
        // What is open is still the old one.
        assert_eq!(read(&kept).unwrap(), 7);
        assert_eq!(kept.unchanged().unwrap_err().raw_os_error(), Some(Errno::STALE.raw_os_error()));
        close(&kept);
        assert_eq!(read(&kept).unwrap_err().raw_os_error(), Some(Errno::STALE.raw_os_error()));
    }
}

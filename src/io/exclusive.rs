//! A file that is changed where it lies: opened by its own name and no other, and by one program at a time.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::disk;
use super::publish::{parent_of, write_error};
use super::source::read_error;
use crate::error::{Error, Result};
use crate::rules;

/// An open file that nobody else may change. The lock (`flock(2)`) is given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Exclusive {
    file: File,
    path: PathBuf,
    len: u64,
    identity: (u64, u64),
}

impl Exclusive {
    /// Opens a file to change it in place.
    ///
    /// # Errors
    /// `U-005` if other names lead to the same bytes, `E-011` if another program is merging into it, `E-001`, `E-002`.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let refuse = |what: &str| {
            Err(Error::new(rules::IN_PLACE, what.to_owned()).file(path).help("merge into a new folder with -o instead"))
        };
        let found = fs::symlink_metadata(path).map_err(|e| read_error(path, e))?;
        if found.file_type().is_symlink() {
            return refuse("the file is a link, and what it leads to may be shared with other models");
        }
        if !found.is_file() {
            return refuse("this is not a regular file");
        }
        if found.nlink() > 1 {
            return refuse("the file has other names (hard links), and would change under all of them");
        }
        if is_blob_name(path) {
            return refuse("the file is named by a digest of its content, which would no longer be true");
        }
        let file = disk::open_write(path).map_err(|e| write_error(path, e))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(e) if std::io::Error::from(e).kind() == ErrorKind::WouldBlock => {
                return Err(Error::new(rules::PENDING, "another program is merging into this file")
                    .file(path)
                    .help("wait for it to finish"));
            }
            // A file system without locks: the journal's name is then the only lock.
            Err(_) => {}
        }
        let meta = file.metadata().map_err(|e| read_error(path, e))?;
        Ok(Exclusive { file, path: path.to_owned(), len: meta.len(), identity: (meta.dev(), meta.ino()) })
    }

    /// Its name.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Its length when it was opened.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Device and inode.
    pub(crate) fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// `E-001`.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        disk::read_at(&self.file, buf, offset).map_err(|e| read_error(&self.path, e).offset(offset))
    }

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// `E-002`.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        disk::write_at(&self.file, bytes, offset).map_err(|e| write_error(&self.path, e).offset(offset))
    }

    /// Forces it to disk.
    ///
    /// # Errors
    /// `E-002`, which is final.
    pub(crate) fn sync(&self) -> Result<()> {
        disk::sync(&self.file).map_err(|e| write_error(&self.path, e))
    }
}

impl Drop for Exclusive {
    /// A child that another thread of this process has just forked shares the lock until it runs its program, so closing the file does
    /// not give it back at once.
    fn drop(&mut self) {
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

/// 40 or 64 hexadecimal digits: how the caches of the Hub name files.
fn is_blob_name(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    matches!(name.len(), 40 | 64) && name.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The name of the journal of a merge into a checkpoint, a folder or a file.
pub(crate) fn journal_of(checkpoint: &Path) -> PathBuf {
    if checkpoint.is_dir() {
        return checkpoint.join("loratool.journal");
    }
    let mut name = checkpoint.file_name().unwrap_or_default().to_owned();
    name.push(".journal");
    checkpoint.with_file_name(name)
}

/// Refuses a checkpoint, or a file of one, whose journal is there.
///
/// # Errors
/// `E-011`.
pub(crate) fn refuse_pending(checkpoint: &Path) -> Result<()> {
    let journal = journal_of(checkpoint);
    if journal.symlink_metadata().is_ok() { Err(pending(&journal)) } else { Ok(()) }
}

/// The error for a journal that is there.
pub(crate) fn pending(journal: &Path) -> Error {
    let checkpoint = journal.with_extension("");
    let checkpoint = match journal.file_name().and_then(|name| name.to_str()) {
        Some("loratool.journal") => parent_of(journal),
        _ => &checkpoint,
    };
    Error::new(rules::PENDING, "a merge into this checkpoint was interrupted, or is going on")
        .file(journal)
        .help(format!("if none is going on, complete it: loratool recover {}", checkpoint.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The copy of the descriptor is what a child has between `fork` and `exec`.
    #[test]
    fn a_lock_is_given_back_even_if_a_child_has_a_copy_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "").unwrap();
        let held = Exclusive::open(&path).unwrap();
        let copy = held.file.try_clone().unwrap();
        assert_eq!(Exclusive::open(&path).unwrap_err().class(), crate::error::Class::Busy);
        drop(held);
        Exclusive::open(&path).unwrap();
        drop(copy);
    }
}

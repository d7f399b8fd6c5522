//! Positioned reads of one open file. What was inspected is what is read later: the file is the same, or an error. Only regular files are
//! opened, and never blocked on: a FIFO or a device under a model's name is refused, not waited for.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::io::Errno;

use super::disk;
use super::map::Map;
use super::shelf::Kept;
use crate::error::{Error, Result};
use crate::rules;

/// How file contents are reached. The bytes are the same either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReadMode {
    /// Positioned reads into small buffers (default): steady memory, and a file that shrinks is an error.
    #[default]
    Read,
    /// A memory map. Faster for repeated random access; a file that another program truncates meanwhile kills the process
    /// with SIGBUS, so the caller vouches that nobody does.
    Map,
}

/// The bytes of one file, read by position from any thread.
#[derive(Debug)]
pub(crate) struct ByteSource {
    file: Kept,
    map: Option<Map>,
}

/// Opens a regular file.
///
/// # Errors
/// `E-001` if it cannot be opened, `E-007` if it is not a regular file.
pub(crate) fn open(path: &Path, mode: ReadMode) -> Result<ByteSource> {
    let file = open_regular(path)?;
    let len = file.metadata().map_err(|e| read_error(path, e))?.len();
    let map = match mode {
        ReadMode::Read => None,
        ReadMode::Map => Map::new(&file, len),
    };
    let file = Kept::reading(file, path).map_err(|e| read_error(path, e))?;
    Ok(ByteSource { file, map })
}

/// Reads a whole small file; `None` if it is longer than `limit` bytes.
///
/// # Errors
/// As [`open`].
pub(crate) fn read_small(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let source = open(path, ReadMode::Read)?;
    if source.len() > limit {
        return Ok(None);
    }
    let mut bytes = vec![0; source.len() as usize];
    source.read_at(path, 0, &mut bytes)?;
    Ok(Some(bytes))
}

fn open_regular(path: &Path) -> Result<File> {
    let file = disk::open(path).map_err(|e| read_error(path, e))?;
    let kind = file.metadata().map_err(|e| read_error(path, e))?.file_type();
    if kind.is_file() {
        return Ok(file);
    }
    let found = match kind {
        k if k.is_dir() => "a folder",
        k if k.is_fifo() => "a FIFO",
        k if k.is_socket() => "a socket",
        _ => "a device",
    };
    Err(Error::new(rules::NOT_REGULAR, format!("expected a file, found {found}")).file(path))
}

/// The error for a failed open or read, with what to do for the usual causes.
pub(crate) fn read_error(path: &Path, error: std::io::Error) -> Error {
    let (what, help) = match error.kind() {
        ErrorKind::NotFound => match std::fs::read_link(path) {
            Ok(target) => (format!("the link leads to {:?}, which does not exist", target), "download the model again"),
            Err(_) => ("no such file or folder".to_owned(), "check the path"),
        },
        ErrorKind::PermissionDenied => ("permission denied".to_owned(), "check the permissions of the file and its folders"),
        _ if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
            let target = std::fs::read_link(path).unwrap_or_default();
            (format!("the link leads to {target:?} and back to itself"), "remove the link and download the model again")
        }
        ErrorKind::StaleNetworkFileHandle => return changed(path).because(error),
        _ if no_descriptor(&error) => (format!("cannot read: {error}"), MORE_DESCRIPTORS),
        // What open(2) says of a socket.
        _ if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => {
            return Error::new(rules::NOT_REGULAR, "expected a file, found a socket or a device")
                .file(path)
                .help("check the path")
                .because(error);
        }
        _ => (format!("cannot read: {error}"), "check the disk and try again"),
    };
    Error::new(rules::READ, what).file(path).help(help).because(error)
}

/// The process, or the system, has no descriptor left.
pub(super) fn no_descriptor(error: &std::io::Error) -> bool {
    [Errno::MFILE, Errno::NFILE].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// What to do then.
pub(super) const MORE_DESCRIPTORS: &str = "allow more open files (ulimit -n)";

impl ByteSource {
    /// Length when the file was opened.
    pub(crate) fn len(&self) -> u64 {
        self.file.len()
    }

    /// Device and inode of the open file.
    pub(crate) fn identity(&self) -> (u64, u64) {
        self.file.identity()
    }

    /// Makes sure that the file is what it was when it was opened, as far as its length and its times tell.
    ///
    /// # Errors
    /// `E-004`.
    pub(crate) fn unchanged(&self, path: &Path) -> Result<()> {
        self.file.unchanged().map_err(|_| changed(path))
    }

    /// Fills `buf` from byte `offset` on. Loops over short reads and interruptions.
    ///
    /// # Errors
    /// `E-004` if the file ends before `offset + buf.len()`, `E-001` for any other failure. `path` is for the message.
    pub(crate) fn read_at(&self, path: &Path, offset: u64, buf: &mut [u8]) -> Result<()> {
        if let Some(map) = &self.map {
            return match map.get(offset, buf.len()) {
                Some(bytes) => {
                    buf.copy_from_slice(bytes);
                    Ok(())
                }
                None => Err(shrunk(path, offset)),
            };
        }
        self.file.with(|file| disk::read_at(file, buf, offset)).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => shrunk(path, offset),
            _ => read_error(path, e).offset(offset),
        })
    }

    /// Copies `len` bytes from `offset` on to `to_offset` of `to`, inside the system. `Ok(false)`, with nothing promised of the bytes in
    /// `to`, where the system cannot: they are then to be read and written.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at); what the system says of either file is taken as the reader's, and a failed write shows again.
    pub(crate) fn copy_to(&self, path: &Path, offset: u64, to: &File, to_offset: u64, len: u64) -> Result<bool> {
        let mut done = 0;
        while done < len {
            let part = usize::try_from(len - done).unwrap_or(usize::MAX);
            match self.file.with(|file| disk::copy_range(file, offset + done, to, to_offset + done, part)) {
                Ok(0) => return Err(shrunk(path, offset + done)),
                Ok(n) => done += n as u64,
                Err(_) => return Ok(false),
            }
        }
        Ok(true)
    }
}

fn changed(path: &Path) -> Error {
    Error::new(rules::CHANGED, "the file was changed or replaced while it was read")
        .file(path)
        .help("another program is writing to it; wait for it to finish, and run the command again")
}

fn shrunk(path: &Path, offset: u64) -> Error {
    Error::new(rules::CHANGED, "the file became shorter while it was read")
        .file(path)
        .offset(offset)
        .help("another program is writing to it; wait for it to finish")
}

//! The calls that touch weights on disk, each once: what reads, writes, syncs, names or removes their files goes through here, so that a
//! test can make any one of them fail. Thin over the operating system; interruptions and short transfers are looped over. Small files
//! (configs, tokenizers) are still copied and written by `std::fs`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, OFlags, RenameFlags};
use rustix::io::Errno;

/// Opens a file for reading; never blocks on a FIFO.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    // O_NONBLOCK: opening a FIFO returns at once; it has no effect on regular files.
    OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)
}

/// Opens an existing file for reading and writing; a link is not followed.
pub(crate) fn open_write(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32).open(path)
}

/// Makes a file that does not exist yet, for reading and writing; a link is not followed.
pub(crate) fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).custom_flags(OFlags::NOFOLLOW.bits() as i32).open(path)
}

/// Makes a folder that does not exist yet.
pub(crate) fn create_dir(path: &Path) -> io::Result<()> {
    fs::create_dir(path)
}

/// Fills `buf` from `offset` on.
pub(crate) fn read_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    file.read_exact_at(buf, offset)
}

/// Writes all of `bytes` at `offset`.
pub(crate) fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    file.write_all_at(bytes, offset)
}

/// Copies up to `len` bytes from file to file inside the system, which shares the blocks where the file system can. How many were copied:
/// 0 at the end of `from`.
pub(crate) fn copy_range(from: &File, from_offset: u64, to: &File, to_offset: u64, len: usize) -> io::Result<usize> {
    let (mut from_offset, mut to_offset) = (from_offset, to_offset);
    Ok(rustix::fs::copy_file_range(from, Some(&mut from_offset), to, Some(&mut to_offset), len)?)
}

/// Reserves `len` bytes; where the file system cannot, the file only gets its length.
pub(crate) fn allocate(file: &File, len: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, len) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => file.set_len(len),
        Err(error) => Err(error.into()),
    }
}

/// Forces a file's data and length to disk.
pub(crate) fn sync(file: &File) -> io::Result<()> {
    file.sync_all()
}

/// Forces a file's data to disk, and of its length only what is needed to read them.
pub(crate) fn sync_data(file: &File) -> io::Result<()> {
    file.sync_data()
}

/// Forces a folder's names to disk.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// `renameat2`.
pub(crate) fn rename(from: &Path, to: &Path, flags: RenameFlags) -> io::Result<()> {
    Ok(rustix::fs::renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, flags)?)
}

/// Removes a file.
pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    fs::remove_file(path)
}

/// Removes a folder with everything in it; one that is gone is no error.
pub(crate) fn remove_dir_all(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

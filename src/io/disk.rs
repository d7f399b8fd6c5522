//! The calls that change a disk or read weights from it, each once: what reads, writes, syncs, names or removes files goes through here, so
//! that a test can make any one of them fail ([`fault`]). Thin over the operating system; interruptions and short transfers are looped over.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, OFlags, RenameFlags};
use rustix::io::Errno;

use super::fault;

/// Calls again what a signal interrupted.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// Opens a file for reading; never blocks on a FIFO.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    retry(|| {
        fault::allow("open", 0)?;
        // O_NONBLOCK: opening a FIFO returns at once; it has no effect on regular files.
        OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)
    })
}

/// Opens an existing file for reading and writing; a link is not followed.
pub(crate) fn open_write(path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    retry(|| {
        fault::allow("open", 0)?;
        OpenOptions::new().read(true).write(true).custom_flags(flags.bits() as i32).open(path)
    })
}

/// Makes a file that does not exist yet, for reading and writing; a link is not followed.
pub(crate) fn create_new(path: &Path) -> io::Result<File> {
    let file = retry(|| {
        fault::allow("create", 0)?;
        OpenOptions::new().read(true).write(true).create_new(true).custom_flags(OFlags::NOFOLLOW.bits() as i32).open(path)
    })?;
    fault::made(&file, path);
    Ok(file)
}

/// Makes a folder that does not exist yet.
pub(crate) fn create_dir(path: &Path) -> io::Result<()> {
    retry(|| {
        fault::allow("mkdir", 0)?;
        fs::create_dir(path)
    })?;
    fault::name("dir", path);
    Ok(())
}

/// Makes a folder and those it lies in, unless they exist.
pub(crate) fn create_dir_all(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        create_dir_all(parent)?;
    }
    create_dir(path)
}

/// Gives a file its permissions.
pub(crate) fn set_permissions(path: &Path, permissions: Permissions) -> io::Result<()> {
    retry(|| {
        fault::allow("chmod", 0)?;
        fs::set_permissions(path, permissions.clone())
    })
}

/// Fills `buf` from `offset` on.
pub(crate) fn read_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let n = retry(|| {
            let len = fault::allow("read", rest.len())?;
            file.read_at(&mut rest[..len], offset + done as u64)
        })?;
        if n == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        done += n;
    }
    Ok(())
}

/// Writes all of `bytes` at `offset`.
pub(crate) fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
        let at = offset + done as u64;
        let n = retry(|| file.write_at(&rest[..fault::allow("write", rest.len())?], at))?;
        if n == 0 {
            return Err(ErrorKind::WriteZero.into());
        }
        fault::wrote(file, at, n);
        done += n;
    }
    Ok(())
}

/// Copies up to `len` bytes from file to file inside the system, which shares the blocks where the file system can. How many were copied:
/// 0 at the end of `from`.
pub(crate) fn copy_range(from: &File, from_offset: u64, to: &File, to_offset: u64, len: usize) -> io::Result<usize> {
    let n = retry(|| {
        let len = fault::allow("copy", len)?;
        let (mut from_offset, mut to_offset) = (from_offset, to_offset);
        Ok(rustix::fs::copy_file_range(from, Some(&mut from_offset), to, Some(&mut to_offset), len)?)
    })?;
    fault::wrote(to, to_offset, n);
    Ok(n)
}

/// Reserves `len` bytes; where the file system cannot, the file only gets its length.
pub(crate) fn allocate(file: &File, len: u64) -> io::Result<()> {
    retry(|| {
        fault::allow("allocate", 0)?;
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, len) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => file.set_len(len),
            Err(error) => Err(error.into()),
        }
    })?;
    fault::sized(file, len);
    Ok(())
}

/// Forces a file's data and length to disk.
pub(crate) fn sync(file: &File) -> io::Result<()> {
    retry(|| {
        fault::allow("sync", 0)?;
        file.sync_all()
    })?;
    fault::synced(file);
    Ok(())
}

/// Forces a file's data to disk, and of its length only what is needed to read them.
pub(crate) fn sync_data(file: &File) -> io::Result<()> {
    retry(|| {
        fault::allow("sync", 0)?;
        file.sync_data()
    })?;
    fault::synced(file);
    Ok(())
}

/// Forces a folder's names to disk.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    retry(|| {
        fault::allow("syncdir", 0)?;
        File::open(path)?.sync_all()
    })?;
    fault::name("syncdir", path);
    Ok(())
}

/// `renameat2`.
pub(crate) fn rename(from: &Path, to: &Path, flags: RenameFlags) -> io::Result<()> {
    retry(|| {
        fault::allow("rename", 0)?;
        Ok(rustix::fs::renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, flags)?)
    })?;
    fault::renamed(from, to, flags.contains(RenameFlags::EXCHANGE));
    Ok(())
}

/// Removes a file.
pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    retry(|| {
        fault::allow("remove", 0)?;
        fs::remove_file(path)
    })?;
    fault::name("gone", path);
    Ok(())
}

/// Removes a folder with everything in it; one that is gone is no error.
pub(crate) fn remove_dir_all(path: &Path) -> io::Result<()> {
    let removed = retry(|| {
        fault::allow("remove", 0)?;
        fs::remove_dir_all(path)
    });
    match removed {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        done => {
            fault::name("gone", path);
            done
        }
    }
}

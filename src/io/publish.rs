//! Output appears whole or not at all. Everything is written into a staging file or folder beside the target, forced to disk, and
//! renamed; on any error or interruption the staging is removed and the target is what it was. Never written through a link,
//! never over an input.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::RenameFlags;

use crate::error::{Class, Error, Result};
use crate::rules;

/// What to do if the output exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overwrite {
    /// Refuse (default).
    #[default]
    Refuse,
    /// Replace it, in one step, once the new one is complete.
    Replace,
}

/// What the output is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OutputKind {
    File,
    Folder,
}

/// Refuses an output that cannot or must not be written, before anything is computed.
///
/// # Errors
/// `U-002` if it exists and is not to be replaced, `U-003` if it is (inside) an input or a link, `E-002` if its folder is missing.
pub(crate) fn check_output(target: &Path, kind: OutputKind, inputs: &[&Path], overwrite: Overwrite) -> Result<()> {
    let parent = parent_of(target);
    match fs::metadata(parent) {
        Ok(m) if m.is_dir() => {}
        Ok(_) => return Err(Error::new(rules::WRITE, "the output's folder is not a folder").file(parent)),
        Err(e) => {
            return Err(Error::new(rules::WRITE, "the output's folder does not exist")
                .file(parent)
                .help("create it first")
                .because(e));
        }
    }
    if target.file_name().is_none() {
        return Err(Error::new(rules::ARGUMENT, "the output needs a name").file(target));
    }
    let found = match fs::symlink_metadata(target) {
        Ok(found) => found,
        Err(e) if e.kind() == ErrorKind::NotFound => return check_not_inside(parent, inputs, target),
        Err(e) => return Err(write_error(target, e)),
    };
    if found.file_type().is_symlink() {
        return Err(Error::new(rules::OUTPUT_IS_INPUT, "the output is a link, and is not written through")
            .file(target)
            .help("give another name, or remove the link"));
    }
    for input in inputs {
        let same = fs::metadata(input).is_ok_and(|m| m.dev() == found.dev() && m.ino() == found.ino());
        if same {
            return Err(Error::new(rules::OUTPUT_IS_INPUT, format!("the output is the input {:?}", input))
                .file(target)
                .help("give another output"));
        }
    }
    let (is, wants) = (found.is_dir(), kind == OutputKind::Folder);
    if is != wants || !(found.is_dir() || found.is_file()) {
        let what = |folder| if folder { "a folder" } else { "a file" };
        let found = if found.is_dir() || found.is_file() { what(is) } else { "a device or pipe" };
        return Err(Error::new(rules::OUTPUT_EXISTS, format!("the output is {found} but {} is to be written", what(wants)))
            .file(target)
            .help("give another output"));
    }
    if overwrite == Overwrite::Refuse {
        return Err(Error::new(rules::OUTPUT_EXISTS, "the output exists")
            .file(target)
            .help("give another name, or pass --overwrite"));
    }
    check_not_inside(parent, inputs, target)
}

/// A folder that holds an input is not replaced, and output does not go into an input folder.
fn check_not_inside(parent: &Path, inputs: &[&Path], target: &Path) -> Result<()> {
    let real = |p: &Path| fs::canonicalize(p).ok();
    let Some(parent) = real(parent) else { return Ok(()) };
    let target_real = target.file_name().map(|name| parent.join(name));
    for input in inputs.iter().filter_map(|i| real(i)) {
        let into_input = input.is_dir() && parent.starts_with(&input);
        let over_input = target_real.as_ref().is_some_and(|t| input.starts_with(t));
        if into_input || over_input {
            return Err(Error::new(
                rules::OUTPUT_IS_INPUT,
                format!("the output and the input {:?} lie within each other", input),
            )
            .file(target)
            .help("write to a folder of its own"));
        }
    }
    Ok(())
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Bytes free for this user on the file system that `target` will be on; `None` where that cannot be asked.
pub(crate) fn free_space(target: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(parent_of(target)).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

/// Output in the making. Dropped without [`publish`](Staging::publish), it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct Staging {
    target: PathBuf,
    path: PathBuf,
    kind: OutputKind,
    published: bool,
}

impl Staging {
    /// Makes an empty staging file or folder beside `target`.
    ///
    /// # Errors
    /// `E-002`.
    pub(crate) fn new(target: &Path, kind: OutputKind) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let parent = parent_of(target);
        // The name is ours, not the target's: a target of 255 bytes has no room for a suffix. create_new and mkdir refuse to follow
        // or reuse whatever somebody planted there.
        loop {
            let n = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!(".loratool-{}-{n}.tmp", std::process::id()));
            let made = match kind {
                OutputKind::File => create_new(&path).map(drop),
                OutputKind::Folder => fs::create_dir(&path),
            };
            match made {
                Ok(()) => return Ok(Staging { target: target.to_owned(), path, kind, published: false }),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(write_error(&path, e)),
            }
        }
    }

    /// Where `name` is staged; `name` is ignored for a single file.
    pub(crate) fn path_of(&self, name: &str) -> PathBuf {
        match self.kind {
            OutputKind::File => self.path.clone(),
            OutputKind::Folder => self.path.join(name),
        }
    }

    /// Opens `name` for writing by position, creating it and its folders.
    ///
    /// # Errors
    /// `E-002`.
    pub(crate) fn create(&self, name: &str) -> Result<File> {
        let path = self.path_of(name);
        let opened = match self.kind {
            OutputKind::File => OpenOptions::new().read(true).write(true).open(&path),
            OutputKind::Folder => {
                if let Some(folder) = path.parent() {
                    fs::create_dir_all(folder).map_err(|e| write_error(folder, e))?;
                }
                create_new(&path)
            }
        };
        opened.map_err(|e| write_error(&path, e))
    }

    /// Forces everything to disk and gives it its final name. The order is: files, folders inside out, rename, parent folder.
    ///
    /// # Errors
    /// `E-002`; the target is then what it was before. A failed fsync is final: the kernel may have dropped the pages.
    pub(crate) fn publish(mut self) -> Result<()> {
        sync_tree(&self.path)?;
        let replaced = fs::symlink_metadata(&self.target).ok();
        match &replaced {
            None => rename(&self.path, &self.target, RenameFlags::NOREPLACE)?,
            Some(old) if old.is_dir() => {
                rename(&self.path, &self.target, RenameFlags::EXCHANGE)?;
                // The old folder now has the staging name; dropping `self` removes it.
            }
            Some(old) => {
                fs::set_permissions(&self.path, old.permissions()).map_err(|e| write_error(&self.path, e))?;
                rename(&self.path, &self.target, RenameFlags::empty())?;
            }
        }
        self.published = !replaced.is_some_and(|old| old.is_dir());
        sync(parent_of(&self.target))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published {
            // Nothing is left to report to; a leftover has a name that says what it is.
            let _ = match self.kind {
                OutputKind::File => fs::remove_file(&self.path),
                OutputKind::Folder => fs::remove_dir_all(&self.path),
            };
        }
    }
}

fn create_new(path: &Path) -> std::io::Result<File> {
    let nofollow = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
    OpenOptions::new().read(true).write(true).create_new(true).custom_flags(nofollow).open(path)
}

fn sync_tree(path: &Path) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path).map_err(|e| write_error(path, e))? {
            sync_tree(&entry.map_err(|e| write_error(path, e))?.path())?;
        }
    }
    sync(path)
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| write_error(path, e))
}

/// `renameat2`, and plain `rename` on file systems that do not know its flags.
fn rename(from: &Path, to: &Path, flags: RenameFlags) -> Result<()> {
    let c = |p: &Path| CString::new(p.as_os_str().as_encoded_bytes()).map_err(|e| write_error(p, e.into()));
    let result = rustix::fs::renameat_with(rustix::fs::CWD, c(from)?, rustix::fs::CWD, c(to)?, flags);
    match result {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) if flags != RenameFlags::EXCHANGE => {
            fs::rename(from, to).map_err(|e| write_error(to, e))
        }
        Err(rustix::io::Errno::EXIST) => {
            Err(Error::new(rules::OUTPUT_EXISTS, "the output appeared while it was being written").file(to).class_of(Class::Busy))
        }
        Err(e) => Err(write_error(to, e.into())),
    }
}

/// The error for a failed write, with what to do for the usual causes.
pub(crate) fn write_error(path: &Path, error: std::io::Error) -> Error {
    let (what, help) = match error.kind() {
        ErrorKind::StorageFull => ("no space left on the device", "free some space, or write elsewhere"),
        ErrorKind::QuotaExceeded => ("the disk quota is used up", "free some space, or write elsewhere"),
        ErrorKind::FileTooLarge => ("the file would be larger than allowed", "raise the limit (ulimit -f), or write elsewhere"),
        ErrorKind::PermissionDenied => ("permission denied", "check the permissions of the folder"),
        ErrorKind::ReadOnlyFilesystem => ("the file system is read-only", "write elsewhere"),
        _ => ("cannot write", "check the disk and try again"),
    };
    Error::new(rules::WRITE, format!("{what}: {error}")).file(path).help(help).because(error)
}

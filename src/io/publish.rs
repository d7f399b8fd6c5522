//! Output appears whole or not at all. Everything is written into a staging file or folder beside the target, forced to disk, and
//! renamed; on any error or interruption the staging is removed and the target is what it was. Never written through a link,
//! never over an input.

use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::RenameFlags;
use rustix::io::Errno;

use super::disk;
use super::shelf::Kept;
use super::source::{self, MORE_DESCRIPTORS, ReadMode, no_descriptor, read_error};
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

/// What a finished output survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// A power cut: everything is forced to disk before it gets its name (default).
    #[default]
    Synced,
    /// The end of the program, but not a power cut: the system writes to disk when it likes, as after `cp`.
    Fast,
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
    if kind == OutputKind::File && target.as_os_str().as_bytes().ends_with(b"/") {
        return Err(Error::new(rules::WRITE, "the output is a file, and this is the name of a folder")
            .file(target)
            .help("leave out the slash at the end"));
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
    check_not_inside(parent, inputs, target)?;
    if found.is_dir() { check_replaceable(target) } else { Ok(()) }
}

/// A folder that holds an input is not replaced, and output does not go into an input folder.
fn check_not_inside(parent: &Path, inputs: &[&Path], target: &Path) -> Result<()> {
    let real = |p: &Path| fs::canonicalize(p).ok();
    let Some(parent) = real(parent) else { return Ok(()) };
    let target_real = target.file_name().map(|name| parent.join(name));
    for input in inputs {
        // An input that is a link lies both where it leads and where it is.
        let as_given = input.file_name().and_then(|name| Some(real(parent_of(input))?.join(name)));
        for form in [real(input), as_given].into_iter().flatten() {
            let into_input = form.is_dir() && parent.starts_with(&form);
            let over_input = target_real.as_ref().is_some_and(|t| form.starts_with(t));
            if into_input || over_input {
                let message = format!("the output and the input {input:?} lie within each other");
                return Err(Error::new(rules::OUTPUT_IS_INPUT, message).file(target).help("write to a folder of its own"));
            }
        }
    }
    Ok(())
}

/// Replacing a folder removes all that is in it, so only one that holds weights at its top, or nothing, is replaced.
fn check_replaceable(target: &Path) -> Result<()> {
    let entries: Vec<_> = fs::read_dir(target).map_err(|e| write_error(target, e))?.flatten().collect();
    let holds_weights = entries.iter().any(|e| Path::new(&e.file_name()).extension().is_some_and(|x| x == "safetensors"));
    if entries.is_empty() || holds_weights {
        return Ok(());
    }
    Err(Error::new(rules::OUTPUT_EXISTS, "the output is a folder without weights, which --overwrite does not remove")
        .file(target)
        .help("give another name, or remove the folder yourself"))
}

/// The folder that something lies in.
pub(crate) fn parent_of(path: &Path) -> &Path {
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
    /// Device and inode of what is to be replaced; `None` if nothing may be.
    replaces: Option<(u64, u64)>,
    /// What is left under the staging name is not ours to remove, or is gone.
    settled: bool,
}

impl Staging {
    /// Makes an empty staging file or folder beside `target`.
    ///
    /// # Errors
    /// `E-002`.
    pub(crate) fn new(target: &Path, kind: OutputKind, overwrite: Overwrite) -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let parent = parent_of(target);
        let replaces = identity(target).filter(|_| overwrite == Overwrite::Replace);
        // The name is ours, not the target's: a target of 255 bytes has no room for a suffix. create_new and mkdir refuse to follow
        // or reuse whatever somebody planted there.
        loop {
            let n = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!(".loratool-{}-{n}.tmp", std::process::id()));
            let made = match kind {
                OutputKind::File => disk::create_new(&path).map(drop),
                OutputKind::Folder => disk::create_dir(&path),
            };
            match made {
                Ok(()) => return Ok(Staging { target: target.to_owned(), path, kind, replaces, settled: false }),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(write_error(target, e)),
            }
        }
    }

    /// The staging file alone, without a name: it is gone with the process, whatever ends that.
    ///
    /// # Errors
    /// `E-002`.
    pub(crate) fn nameless(mut self) -> Result<File> {
        let file = self.create("")?;
        disk::remove_file(&self.path).map_err(|e| write_error(&self.target, e))?;
        self.settled = true;
        Ok(file)
    }

    /// Takes over a staging folder that an earlier run has left.
    pub(crate) fn adopt(target: &Path, path: PathBuf, overwrite: Overwrite) -> Self {
        let replaces = identity(target).filter(|_| overwrite == Overwrite::Replace);
        Staging { target: target.to_owned(), path, kind: OutputKind::Folder, replaces, settled: false }
    }

    /// From here on, the staging stays where it is if it is not published.
    pub(crate) fn keep(&mut self) {
        self.settled = true;
    }

    /// Where `name` is staged; `name` is ignored for a single file.
    pub(crate) fn path_of(&self, name: impl AsRef<Path>) -> PathBuf {
        self.within(&self.path, name.as_ref())
    }

    /// Where `name` will be once it is published: what messages call it, for the staging is gone when they are read.
    pub(crate) fn target_of(&self, name: impl AsRef<Path>) -> PathBuf {
        self.within(&self.target, name.as_ref())
    }

    fn within(&self, root: &Path, name: &Path) -> PathBuf {
        match self.kind {
            OutputKind::File => root.to_owned(),
            OutputKind::Folder => root.join(name),
        }
    }

    /// Opens `name` for writing by position, creating it and its folders.
    ///
    /// # Errors
    /// `E-002`.
    pub(crate) fn create(&self, name: impl AsRef<Path>) -> Result<File> {
        let (path, target) = (self.path_of(&name), self.target_of(&name));
        let opened = match self.kind {
            OutputKind::File => disk::open_write(&path),
            OutputKind::Folder => {
                if let Some(folder) = path.parent() {
                    disk::create_dir_all(folder).map_err(|e| write_error(&target, e))?;
                }
                disk::create_new(&path)
            }
        };
        opened.map_err(|e| write_error(&target, e))
    }

    /// Opens a file that is there already.
    ///
    /// # Errors
    /// `E-002`.
    pub(crate) fn reopen(&self, name: impl AsRef<Path>) -> Result<File> {
        disk::open_write(&self.path_of(&name)).map_err(|e| write_error(&self.target_of(&name), e))
    }

    /// A file that was [created](Staging::create) or [reopened](Staging::reopen), one of many that are written for long.
    ///
    /// # Errors
    /// `E-002`.
    pub(crate) fn shelve(&self, file: File, name: impl AsRef<Path>, durability: Durability) -> Result<Kept> {
        Kept::writing(file, &self.path_of(&name), durability).map_err(|e| write_error(&self.target_of(&name), e))
    }

    /// Writes a small file.
    ///
    /// # Errors
    /// `E-002`.
    pub(crate) fn write(&self, name: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
        disk::write_at(&self.create(&name)?, bytes, 0).map_err(|e| write_error(&self.target_of(name), e))
    }

    /// Copies a file with its permissions, as far as the umask leaves them.
    ///
    /// # Errors
    /// `E-002`; `E-001`, `E-004`, `E-007` if `from` cannot be read.
    pub(crate) fn copy(&self, from: &Path, name: impl AsRef<Path>) -> Result<()> {
        let (file, source) = (self.create(&name)?, source::open(from, ReadMode::Read)?);
        let failed = |e| write_error(&self.target_of(&name), e);
        let mut buffer = vec![0; source.len().min(1 << 20) as usize];
        let mut offset = 0;
        while offset < source.len() {
            let len = (source.len() - offset).min(buffer.len() as u64) as usize;
            source.read_at(from, offset, &mut buffer[..len])?;
            disk::write_at(&file, &buffer[..len], offset).map_err(failed)?;
            offset += len as u64;
        }
        let mode = fs::metadata(from).map_err(|e| read_error(from, e))?.permissions().mode();
        // The new file may be read and written as the umask says; where it may be read it may be run.
        let masked = file.metadata().map_err(failed)?.permissions().mode();
        let permissions = Permissions::from_mode(mode & (masked | (masked & 0o444) >> 2));
        disk::set_permissions(&self.path_of(&name), permissions).map_err(failed)
    }

    /// Forces everything to disk: files first, folders inside out.
    ///
    /// # Errors
    /// `E-002`. A failed fsync is final: the kernel may have dropped the pages.
    pub(crate) fn sync(&self) -> Result<()> {
        sync_tree(&self.path, &self.target)
    }

    /// Gives what was staged its final name, which [`Durability::Synced`] forces to disk too. Only what was there when the staging was
    /// made is replaced, and only if that was asked for; it is removed last.
    ///
    /// # Errors
    /// `E-002`, or `U-002` of class busy if somebody made or replaced the target meanwhile. The target is then what it was.
    pub(crate) fn publish(mut self, durability: Durability) -> Result<()> {
        let parent = parent_of(&self.target).to_owned();
        match self.replaces {
            None => rename(&self.path, &self.target, RenameFlags::NOREPLACE)?,
            Some(seen) if identity(&self.target) != Some(seen) => return Err(appeared(&self.target)),
            Some(_) => {
                let old = fs::metadata(&self.target).map_err(|e| write_error(&self.target, e))?;
                disk::set_permissions(&self.path, old.permissions()).map_err(|e| write_error(&self.target, e))?;
                if self.kind == OutputKind::Folder {
                    return self.exchange(&parent, durability);
                }
                rename(&self.path, &self.target, RenameFlags::empty())?;
            }
        }
        self.settled = true;
        name_is_on_disk(&parent, durability)
    }

    /// Old and new folder change names in one step; where the file system cannot do that, in two, the first of which is taken back
    /// if the second fails. The old one is removed last.
    fn exchange(&mut self, parent: &Path, durability: Durability) -> Result<()> {
        let (here, there) = (&self.path, &self.target);
        match disk::rename(here, there, RenameFlags::EXCHANGE) {
            Ok(()) => {}
            Err(e) if is_unsupported(&e) => {
                let aside = here.with_extension("old");
                disk::rename(there, &aside, RenameFlags::empty()).map_err(|e| write_error(there, e))?;
                if let Err(e) = disk::rename(here, there, RenameFlags::empty()) {
                    disk::rename(&aside, there, RenameFlags::empty()).map_err(|e| write_error(&aside, e))?;
                    return Err(write_error(there, e));
                }
                self.path = aside;
            }
            Err(e) => return Err(write_error(there, e)),
        }
        // From here on the staging name holds the old folder, which stays if the new name may not be on disk.
        self.settled = true;
        name_is_on_disk(parent, durability).map_err(|e| {
            e.help(format!(
                "the output is complete, but its name may not be on disk yet; what it replaced is kept in {:?}",
                self.path
            ))
        })?;
        disk::remove_dir_all(&self.path).map_err(|e| {
            let help = format!("the output is complete; remove what it replaced yourself: {:?}", self.path);
            write_error(&self.path, e).help(help)
        })
    }
}

/// Device and inode of what is there, links not followed.
fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

fn appeared(target: &Path) -> Error {
    Error::new(rules::OUTPUT_EXISTS, "the output was made or replaced by another program while it was being written")
        .file(target)
        .class_of(Class::Busy)
        .help("give another name, or run the command again")
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.settled {
            // Nothing is left to report to; a leftover has a name that says what it is.
            let _ = match self.kind {
                OutputKind::File => disk::remove_file(&self.path),
                OutputKind::Folder => disk::remove_dir_all(&self.path),
            };
        }
    }
}

/// `target` is what messages call `path`.
fn sync_tree(path: &Path, target: &Path) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path).map_err(|e| write_error(target, e))? {
            let name = entry.map_err(|e| write_error(target, e))?.file_name();
            sync_tree(&path.join(&name), &target.join(&name))?;
        }
    }
    match path.is_dir() {
        true => disk::sync_dir(path),
        false => disk::open(path).and_then(|file| disk::sync(&file)),
    }
    .map_err(|e| write_error(target, e))
}

fn name_is_on_disk(folder: &Path, durability: Durability) -> Result<()> {
    match durability {
        Durability::Synced => disk::sync_dir(folder).map_err(|e| write_error(folder, e)),
        Durability::Fast => Ok(()),
    }
}

/// `renameat2`, and plain `rename` on file systems that do not know its flags.
fn rename(from: &Path, to: &Path, flags: RenameFlags) -> Result<()> {
    match disk::rename(from, to, flags) {
        Ok(()) => Ok(()),
        Err(e) if is_unsupported(&e) && identity(to).is_none() => {
            disk::rename(from, to, RenameFlags::empty()).map_err(|e| write_error(to, e))
        }
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Err(appeared(to)),
        Err(e) => Err(write_error(to, e)),
    }
}

/// The file system does not know the flags of `renameat2`.
fn is_unsupported(error: &std::io::Error) -> bool {
    [Errno::INVAL, Errno::NOSYS].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// The error for a failed write, with what to do for the usual causes.
pub(crate) fn write_error(path: &Path, error: std::io::Error) -> Error {
    let (what, help) = match error.kind() {
        ErrorKind::StorageFull => ("no space left on the device", "free some space, or write elsewhere"),
        ErrorKind::QuotaExceeded => ("the disk quota is used up", "free some space, or write elsewhere"),
        ErrorKind::FileTooLarge => ("the file would be larger than allowed", "raise the limit (ulimit -f), or write elsewhere"),
        ErrorKind::PermissionDenied => ("permission denied", "check the permissions of the folder"),
        ErrorKind::ReadOnlyFilesystem => ("the file system is read-only", "write elsewhere"),
        _ if no_descriptor(&error) => ("cannot write", MORE_DESCRIPTORS),
        _ => ("cannot write", "check the disk and try again"),
    };
    Error::new(rules::WRITE, format!("{what}: {error}")).file(path).help(help).because(error)
}

//! What a name inside a folder may lead to. A downloaded folder is somebody else's: a link in it could name any file of this
//! machine, whose content would then travel into the output. So a link is followed only within the folder, or into the blob store of
//! a model cache (`snapshots/<revision>/<file>` → `../../blobs/<digest>`). The rules are `K-008` and `K-009`.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::rules;

/// Most links from a name to a blob: one in a cache, two where a folder links into a cache.
const HOPS: usize = 2;

/// Whether `relative` may be read as a file of `folder`; what is missing or dangling is left to whoever opens it. Nothing is opened.
///
/// # Errors
/// `K-008` if a link leads elsewhere, `K-009` if it is not a regular file in the end.
pub(super) fn admit(folder: &Path, relative: &Path) -> Result<()> {
    let path = folder.join(relative);
    let Ok(entry) = fs::symlink_metadata(&path) else { return Ok(()) };
    if entry.file_type().is_symlink()
        && let (Ok(real), Ok(home)) = (fs::canonicalize(&path), fs::canonicalize(folder))
        && !real.starts_with(home)
        && blob(&path).is_none()
    {
        let message = format!("the link leads out of the folder, to {real:?}");
        return Err(Error::new(rules::LINKS_CONTAINED, message)
            .file(path)
            .help("copy the file into the folder; only links into a model cache are followed"));
    }
    let Ok(kind) = fs::metadata(&path).map(|m| m.file_type()) else { return Ok(()) };
    let found = match kind {
        k if k.is_file() => return Ok(()),
        k if k.is_dir() => "a folder",
        k if k.is_fifo() => "a FIFO",
        k if k.is_socket() => "a socket",
        _ => "a device",
    };
    Err(Error::new(rules::REGULAR_FILE, format!("expected a file, found {found}")).file(path))
}

/// The name of the blob that a link of a model cache leads to, or `None` if it is no such link.
pub(super) fn blob(link: &Path) -> Option<String> {
    let mut at = resolve_folder(link)?;
    for _ in 0..HOPS {
        let target = fs::read_link(&at).ok()?;
        at = resolve_folder(&at.parent()?.join(target))?;
        if !at.is_symlink() {
            break;
        }
    }
    let (store, name) = (at.parent()?, at.file_name()?.to_str()?);
    let is_digest = matches!(name.len(), 40 | 64) && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let is_store = store.file_name()? == "blobs" && store.parent()?.join("snapshots").is_dir();
    (is_digest && is_store && !at.is_symlink()).then(|| name.to_owned())
}

/// The path with the links of its folders resolved, and its last part as it is.
fn resolve_folder(path: &Path) -> Option<PathBuf> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Some(fs::canonicalize(parent).ok()?.join(path.file_name()?))
}

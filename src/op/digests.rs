//! Digests of an adapter's tensors: computed, and held against what the file states.

use crate::adapter::{Adapter, Factor};
use crate::error::{Error, Result};
use crate::io::{ContentRoot, tensor_digest};
use crate::rules;

/// Bytes that are read at a time.
const PIECE: usize = 1 << 20;

/// Calls `f` with the bytes of a tensor, piece by piece.
pub(super) fn pieces(factor: &Factor, mut f: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let len = factor.info().bytes();
    let mut buf = vec![0; PIECE.min(usize::try_from(len).unwrap_or(PIECE))];
    let mut at = 0;
    while at < len {
        let n = (len - at).min(PIECE as u64) as usize;
        factor.read(at, &mut buf[..n])?;
        f(&buf[..n])?;
        at += n as u64;
    }
    Ok(())
}

/// The digest of every tensor of the adapter, by its name in the file.
pub(super) fn content(adapter: &Adapter) -> Result<ContentRoot> {
    let mut root = ContentRoot::default();
    for factor in adapter.factors() {
        let mut hash = tensor_digest(factor.info());
        pieces(factor, |bytes| {
            hash.update(bytes);
            Ok(())
        })?;
        root.insert(factor.name(), hash.finish());
    }
    Ok(root)
}

/// Holds the tensors against the digests that the file states. Returns how many were checked: 0 if it states none.
///
/// # Errors
/// `C-037` naming the first tensor that differs, `C-038` if the content root does.
pub(super) fn verify_stated(adapter: &Adapter) -> Result<usize> {
    let stated = adapter.stated_digests();
    if stated.is_empty() {
        return Ok(0);
    }
    let found = content(adapter)?;
    let help = "the file is damaged or was edited; get it again from where it was published";
    for (name, digest) in found.digests() {
        if stated.get(name) != Some(digest) {
            let message = format!("the bytes of {name:?} are not the ones that the file's digest names");
            return Err(Error::new(rules::TENSOR_DIGEST, message).file(adapter.label()).tensor(name).help(help));
        }
    }
    if adapter.stated_content() != Some(&found.finish()) {
        let message = "the content root does not follow from the tensors' digests";
        return Err(Error::new(rules::CONTENT_ROOT, message).file(adapter.label()).help(help));
    }
    Ok(stated.len())
}

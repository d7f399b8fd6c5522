//! Digests of an adapter's tensors: computed, and held against what the file states.

use crate::adapter::{Adapter, Factor};
use crate::error::{Error, Result};
use crate::exec;
use crate::io::ContentRoot;
use crate::rules;

/// The digest of every tensor of the adapter, by its name in the file. `go_on` is asked before each of them, and may end it.
pub(super) fn content(adapter: &Adapter, go_on: impl Fn() -> Result<()> + Sync) -> Result<ContentRoot> {
    let factors: Vec<&Factor> = adapter.factors().collect();
    let mut root = ContentRoot::default();
    for (factor, digest) in factors.iter().zip(exec::digests(&factors, go_on)?) {
        root.insert(factor.name(), digest);
    }
    Ok(root)
}

/// Reads the tensors and holds them against the digests that the file states. Returns how many were checked: 0 if it states none.
///
/// # Errors
/// As [`verify`].
pub(super) fn verify_stated(adapter: &Adapter) -> Result<usize> {
    if adapter.stated_digests().is_empty() {
        return Ok(0);
    }
    verify(adapter, &content(adapter, || Ok(()))?)
}

/// Holds the digests `found` against those that the file states. Returns how many were checked: 0 if it states none.
///
/// # Errors
/// `C-037` naming the first tensor that differs, `C-038` if the content root does.
pub(super) fn verify(adapter: &Adapter, found: &ContentRoot) -> Result<usize> {
    let stated = adapter.stated_digests();
    if stated.is_empty() {
        return Ok(0);
    }
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

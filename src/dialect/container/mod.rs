//! The container: loratool's own dialect, a safetensors file whose metadata says everything that is needed to apply the adapter
//! (`spec/container.md`). No pattern is matched and no default assumed: every target is named with its factors, rank, alpha and scale,
//! and every tensor has its digest. The rules are `C-030` to `C-042`.
//!
//! | file | question |
//! |---|---|
//! | `manifest` | what does the manifest hold, and how is it written? |
//! | `canonical` | how is JSON that came from elsewhere written in the canonical form? |
//! | `fields` | which members has a JSON object, and of which types? |
//! | `parse` | is the text a manifest? |
//! | `read` | does the manifest agree with the file? |
//! | `names` | what are tensors called? |
//! | `write` | the other direction |

mod canonical;
mod fields;
mod manifest;
mod names;
mod parse;
mod read;
mod write;

#[cfg(test)]
mod tests;

pub(crate) use read::{is_container, read};
pub(crate) use write::{named, write};

/// The metadata key of the manifest.
const KEY: &str = "loratool.manifest";

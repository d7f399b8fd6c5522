//! Codecs: where the bytes of a named tensor are. They know nothing of LoRA.
#![cfg_attr(not(test), warn(clippy::indexing_slicing, reason = "numbers from a file index nothing unchecked"))]

pub(crate) mod safetensors;
pub(crate) mod shards;

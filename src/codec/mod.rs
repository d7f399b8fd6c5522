//! Codecs: where the bytes of a named tensor are. They know nothing of LoRA.

pub(crate) mod safetensors;
pub(crate) mod shards;

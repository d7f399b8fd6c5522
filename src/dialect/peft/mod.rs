//! The PEFT dialect: `adapter_config.json` and the tensor names of `adapter_model.safetensors`, as PEFT 0.21.2 writes and reads
//! them. It gives an [`Adapter`](crate::adapter::Adapter), or every reason why the file is not a plain LoRA. Where PEFT ignores
//! in silence (unexpected tensors, patterns that match nothing) this dialect refuses.
//!
//! | file | question |
//! |---|---|
//! | `json` | is it JSON, and which key occurs twice? |
//! | `config`, `fields` | what does `adapter_config.json` say, and with the right types? |
//! | `refuse` | which methods, variants and initialisations are not `s·B·A` on the published base? |
//! | `python`, `patterns` | which key of `rank_pattern` and `alpha_pattern` matches which module? |
//! | `scaling` | which rank and alpha does each module have? |
//! | `keys` | what is a tensor to its module? |
//! | `place`, `experts`, `packed` | which base tensor does a wrapped module stand for, and how are stacks of experts packed? |
//! | `methods` | what are the tensors of methods that are not LoRA? |
//! | `full` | is a full tensor announced? |
//! | `uniform` | which defaults and exceptions say the same? |
//! | `read`, `write`, `rescaling` | the two directions |
//! | `plain` | what does every loader understand? |

mod config;
mod experts;
mod fields;
mod full;
mod json;
mod keys;
mod methods;
mod packed;
mod patterns;
mod place;
pub(crate) mod plain;
mod python;
mod read;
mod refuse;
mod rescaling;
mod scaling;
mod uniform;
mod write;

#[cfg(test)]
mod tests;

pub(crate) use config::PeftConfig;
pub(crate) use packed::{is_packed, packed};
pub(crate) use read::{PeftOptions, read};
pub(crate) use write::config_json;

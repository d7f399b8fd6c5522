//! What the tensors of a container are called: as PEFT calls them, so that PEFT can load the file with a config beside it. Readers do
//! not look at the names; the manifest says what each tensor is.

use std::collections::HashSet;

use crate::adapter::{Adapter, Kind, Replacement, Target};
use crate::error::{Error, Result};
use crate::rules;

const PREFIX: &str = "base_model.model.";

/// The names of the tensors of one target.
pub(super) struct TargetNames {
    pub(super) a: String,
    pub(super) b: String,
    /// What an update of the bias would be called.
    pub(super) bias: String,
    /// What magnitudes would be called.
    pub(super) magnitude: String,
}

/// Names the tensors of a target.
///
/// # Errors
/// `P-011` if PEFT has no name for its factors: the target is no module's weight, and no parameter that PEFT can wrap.
pub(super) fn of_target(adapter: &Adapter, target: &Target) -> Result<TargetNames> {
    let attention = adapter.attention_of(target).map(|attention| match target.tensor.ends_with(".in_proj_weight") {
        true => attention.to_owned(),
        false => format!("{attention}.base_layer.out_proj"),
    });
    let parameter = || matches!(target.kind, Kind::Experts(_) | Kind::Linear(_)).then_some(target.tensor.as_str());
    let Some(module) = attention.as_deref().or_else(|| module(&target.tensor)).or_else(parameter) else {
        let message = format!("{:?} is not the weight of a module, so its factors have no name", target.tensor);
        return Err(Error::new(rules::KEY_GRAMMAR, message).tensor(&target.tensor).help("targets are named <module>.weight"));
    };
    let (a, b) = match target.kind {
        Kind::Embedding => ("lora_embedding_A", "lora_embedding_B"),
        _ => ("lora_A.weight", "lora_B.weight"),
    };
    let name = |part: &str| format!("{PREFIX}{module}.{part}");
    Ok(TargetNames { a: name(a), b: name(b), bias: name("lora_B.bias"), magnitude: name("lora_magnitude_vector") })
}

/// Names rows that replace others, as PEFT does.
pub(super) fn of_rows(tensor: &str) -> String {
    format!("{PREFIX}{}.token_adapter.trainable_tokens_delta", module(tensor).unwrap_or(tensor))
}

/// Names what multiplies a tensor, as PEFT does: weight and bias of a module have it in common.
pub(super) fn of_rescaling(tensor: &str) -> String {
    format!("{PREFIX}{}.ia3_l", module(tensor).or_else(|| tensor.strip_suffix(".bias")).unwrap_or(tensor))
}

/// The modules whose weight is a target.
pub(super) fn modules(adapter: &Adapter) -> HashSet<&str> {
    adapter.targets().iter().filter_map(|target| module(&target.tensor)).collect()
}

/// Names a replacement. PEFT wraps a targeted module, so the module's own weight and bias lie one level deeper there, and so does an
/// embedding of which tokens were trained.
pub(super) fn of_replacement(adapter: &Adapter, replacement: &Replacement, modules: &HashSet<&str>) -> String {
    match replacement.tensor.rsplit_once('.') {
        Some((module, "weight")) if adapter.rows().iter().any(|rows| rows.tensor == replacement.tensor) => {
            format!("{PREFIX}{module}.token_adapter.base_layer.weight")
        }
        Some((module, own)) if modules.contains(module) => format!("{PREFIX}{module}.base_layer.{own}"),
        _ => format!("{PREFIX}{}", replacement.tensor),
    }
}

fn module(tensor: &str) -> Option<&str> {
    tensor.strip_suffix(".weight").filter(|module| !module.is_empty())
}

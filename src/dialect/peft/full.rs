//! Full tensors in an adapter: modules that were trained whole, and trained biases. Each must be announced by the config, because
//! a full tensor that nobody announced may as well be a leftover, and replacing a base tensor by a leftover ruins the model.
//! Reading asks whether a tensor is announced, writing how to announce it.

use std::collections::BTreeSet;

use super::config::{Bias, PeftConfig};
use super::patterns::ends;
use crate::adapter::{Adapter, Replacement};
use crate::error::{Diagnostic, Error, Result};
use crate::rules;

/// Layers that PEFT saves unasked when it finds the vocabulary resized, or is told to (`save_embedding_layers`): those that
/// `get_input_embeddings` and `get_output_embeddings` of transformers give, whatever their names are (`utils/save_and_load.py`, 0.21.2).
const EMBEDDINGS: &[&str] =
    &["embed_in", "embed_out", "embed_tokens", "lm_head", "shared", "tok_embeddings", "word_embeddings", "wte"];

/// Whether a tensor is the weight of an embedding of tokens or of an output layer, by its name.
pub(super) fn is_embedding(tensor: &str) -> bool {
    let module = tensor.strip_suffix(".weight").and_then(|module| module.rsplit('.').next());
    module.is_some_and(|leaf| EMBEDDINGS.contains(&leaf))
}

/// Whether `modules_to_save` announces the parameter: some module on the way to it has a path that ends with an entry. As PEFT
/// compares (`utils/other.py`, `_set_trainable`), the end need not begin at a dot.
pub(super) fn saved(modules_to_save: &[String], parameter: &str) -> bool {
    parents(parameter).any(|module| modules_to_save.iter().any(|name| !name.is_empty() && module.ends_with(name.as_str())))
}

/// The modules that a parameter is in: `a.b.c` is in `a.b` and in `a`.
fn parents(parameter: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(parameter.rsplit_once('.'), |(module, _)| module.rsplit_once('.')).map(|(module, _)| module)
}

/// Why a full tensor is not accepted, or `None` if the config announces it. `targets` are the modules with a LoRA.
pub(super) fn unannounced(
    name: &str,
    parameter: &str,
    config: Option<&PeftConfig>,
    targets: &BTreeSet<&str>,
) -> Option<Diagnostic> {
    let refuse = |rule, why: &str, help: &str| Some(Diagnostic::new(rule, format!("{name:?} {why}")).tensor(name).help(help));
    let Some(config) = config else {
        let help = "put adapter_config.json beside the weights, or remove the tensor";
        return refuse(rules::FULL_TENSOR_NAMED, "is a full tensor, and there is no config to announce it", help);
    };
    // PEFT saves embeddings unasked when the vocabulary was resized, and loads them unasked.
    if saved(&config.modules_to_save, parameter) || is_embedding(parameter) && !name.contains(".base_layer.") {
        return None;
    }
    let module = parameter.strip_suffix(".bias");
    match (module, config.bias) {
        (Some(_), Bias::All) => return None,
        (Some(module), Bias::LoraOnly) if targets.contains(module) => return None,
        (Some(_), Bias::LoraOnly) => {
            let help = "only biases of layers with a LoRA are trained then; remove the tensor, or set bias to \"all\"";
            return refuse(rules::FULL_TENSOR_NAMED, "is the bias of a layer without LoRA, but bias is \"lora_only\"", help);
        }
        (Some(_), Bias::None) | (None, _) => {}
    }
    if ends(parameter).take(64).any(|end| end.starts_with("lora_")) {
        return refuse(
            rules::KEY_GRAMMAR,
            "is not a name that PEFT writes for LoRA",
            "PEFT would ignore it in silence; remove it",
        );
    }
    let why = if module.is_some() {
        "is a full tensor, but bias is \"none\" and modules_to_save does not name it"
    } else {
        "is a full tensor that modules_to_save does not name"
    };
    refuse(rules::FULL_TENSOR_NAMED, why, "name its module in modules_to_save if it was trained, or remove it")
}

/// How the replacements are announced.
pub(super) struct Announced {
    /// The value of `bias`.
    pub(super) bias: &'static str,
    /// The modules of `modules_to_save`, sorted.
    pub(super) modules_to_save: BTreeSet<String>,
}

impl Announced {
    pub(super) fn of(adapter: &Adapter, targets: &[&str]) -> Result<Announced> {
        let targets: BTreeSet<&str> = targets.iter().copied().collect();
        // The parameter itself: wrapped by `modules_to_save`, it would be replaced under one of its names only. Unannounced, PEFT loads it into
        // the parameter that all names share.
        let unasked = |r: &&Replacement| r.shared && is_embedding(&r.tensor);
        let parameters = || adapter.replacements().iter().filter(|r| !unasked(r)).map(|r| r.tensor.as_str());
        let mut saved = BTreeSet::new();
        for parameter in parameters().filter(|p| !p.ends_with(".bias") && !is_own_weight(p, &targets)) {
            let Some((module, _)) = parameter.rsplit_once('.') else {
                let message = format!("{parameter:?} is in no module, so PEFT's modules_to_save cannot name it");
                return Err(Error::new(rules::KEY_GRAMMAR, message).tensor(parameter));
            };
            if let Some(target) = targets.iter().find(|target| captures(module, target)) {
                let message = format!("{parameter:?} is replaced and {target:?} has a LoRA; PEFT would train {module:?} whole");
                let help = "a container holds both: name the output OUT.safetensors";
                return Err(Error::new(rules::CONFIG_METHOD, message).tensor(parameter).help(help));
            }
            saved.insert(module.to_owned());
        }
        let mut bias = "none";
        for module in parameters().filter_map(|p| p.strip_suffix(".bias")).filter(|module| !saved.contains(*module)) {
            bias = match targets.contains(module) {
                true if bias != "all" => "lora_only",
                _ => "all",
            };
        }
        Ok(Announced { bias, modules_to_save: saved })
    }
}

/// The weight of a module that has a LoRA itself: PEFT loads it without being told (`save_embedding_layers`).
pub(super) fn is_own_weight(parameter: &str, targets: &BTreeSet<&str>) -> bool {
    parameter.strip_suffix(".weight").is_some_and(|module| targets.contains(module))
}

/// Whether `modules_to_save: [module]` makes PEFT pass over the LoRA of `target`: it wraps every module whose path ends with the
/// entry, and excludes every module at or below a path that has the entry in it.
fn captures(module: &str, target: &str) -> bool {
    target.ends_with(module) || format!(".{target}.").contains(&format!(".{module}."))
}

//! The plainest adapter that PEFT's format has: one rank, one alpha, no pattern, no variant, linear layers only. It is what every
//! reader of the format understands, so it is what `bake` writes. The fields are those that some loader asks for or that PEFT has no
//! default for; what is off is left out where leaving it out means off everywhere.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::keys::PREFIX;
use super::write::{fan_in_fan_out, number, render};
use crate::adapter::{Adapter, Kind, Orientation};
use crate::error::Diagnostic;

/// Fields that are carried over from the config that the adapter came with, unless they are null: by them PEFT finds the class of the
/// model.
const CARRIED: &[&str] = &["auto_mapping", "revision", "task_type"];

/// What the factors of a module are called: A and B.
pub(crate) fn names(module: &str) -> (String, String) {
    (format!("{PREFIX}{module}.lora_A.weight"), format!("{PREFIX}{module}.lora_B.weight"))
}

/// The text of `adapter_config.json` for linear targets of one rank and one alpha, and what it could not say.
pub(crate) fn config(adapter: &Adapter, modules: &[&str], rank: u64, alpha: f64) -> (String, Vec<Diagnostic>) {
    let mut losses = Vec::new();
    let origin: Option<Value> = adapter.origin_config().and_then(|text| serde_json::from_str(text).ok());
    let mut fields: BTreeMap<&str, Value> = BTreeMap::new();
    for field in CARRIED {
        if let Some(value) = origin.as_ref().and_then(|origin| origin.get(*field)).filter(|value| !value.is_null()) {
            fields.insert(field, value.clone());
        }
    }
    // Nobody said which way round the weights are: then this config does not either, and PEFT goes by the layers.
    let undeclared = |kind| matches!(kind, Kind::Linear(Orientation::Undeclared));
    if !adapter.targets().iter().all(|target| undeclared(target.kind)) {
        fields.insert("fan_in_fan_out", json!(fan_in_fan_out(adapter, &mut losses)));
    }
    fields.insert("alpha_pattern", json!({}));
    fields.insert("base_model_name_or_path", json!(adapter.base().name));
    fields.insert("bias", json!("none"));
    fields.insert("inference_mode", json!(true));
    fields.insert("init_lora_weights", json!(true));
    fields.insert("lora_alpha", number(alpha));
    fields.insert("lora_dropout", json!(0.0));
    fields.insert("modules_to_save", Value::Null);
    fields.insert("peft_type", json!("LORA"));
    fields.insert("r", json!(rank));
    fields.insert("rank_pattern", json!({}));
    fields.insert("target_modules", json!(leaves(modules)));
    fields.insert("use_dora", json!(false));
    fields.insert("use_rslora", json!(false));
    (render(&json!(fields)), losses)
}

/// The last part of each path, sorted: what loaders that know modules by their own names can make sense of. PEFT gives an update of
/// zero to layers of that name that the adapter does not have. A number names nothing, and takes the part before it along.
fn leaves<'a>(modules: &[&'a str]) -> BTreeSet<&'a str> {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let leaf = |module: &'a str| {
        let mut start = module.len();
        for part in module.rsplit('.') {
            start -= part.len();
            if !is_number(part) {
                break;
            }
            start = start.saturating_sub(1);
        }
        module.get(start..).unwrap_or(module)
    };
    modules.iter().map(|module| leaf(module)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_known_by_the_last_part_that_is_a_name() {
        let modules = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "attn.to_out.0", "lm_head", "0.1"];
        assert_eq!(leaves(&modules), ["0.1", "lm_head", "q_proj", "to_out.0"].into());
    }
}

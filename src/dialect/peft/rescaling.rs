//! `adapter_config.json` of IA3, for an adapter that does nothing but multiply.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};

use super::config::PeftConfig;
use super::methods::Method;
use super::write::{readable, render};
use crate::adapter::{Adapter, Axis, Orientation};
use crate::error::{Diagnostic, Error, Result};
use crate::limits::Limits;
use crate::rules;

/// The config that the adapter came with while it describes it, or a new one.
///
/// # Errors
/// `P-006` if the bias of a module is multiplied and its weight is not, or otherwise.
pub(super) fn config_json(adapter: &Adapter, limits: &Limits) -> Result<(String, Vec<Diagnostic>)> {
    let modules = modules(adapter)?;
    if let Some(origin) = adapter.origin_config().filter(|origin| describes(origin, adapter, &modules, limits).is_some()) {
        return Ok((readable(origin), Vec::new()));
    }
    let feedforward: BTreeSet<&str> =
        modules.iter().filter(|(_, axis)| **axis == Axis::Input).map(|(module, _)| *module).collect();
    let transposed = adapter.rescalings().iter().any(|rescaling| rescaling.orientation == Orientation::InOut);
    let fields: BTreeMap<&str, Value> = BTreeMap::from([
        ("base_model_name_or_path", json!(adapter.base().name)),
        ("fan_in_fan_out", json!(transposed)),
        ("feedforward_modules", json!(feedforward)),
        ("inference_mode", json!(true)),
        ("init_ia3_weights", json!(true)),
        ("modules_to_save", Value::Null),
        ("peft_type", json!("IA3")),
        ("target_modules", json!(modules.keys().collect::<Vec<_>>())),
    ]);
    Ok((render(&json!(fields)), Vec::new()))
}

/// What is multiplied of each module.
fn modules(adapter: &Adapter) -> Result<BTreeMap<&str, Axis>> {
    let mut weights = BTreeMap::new();
    for rescaling in adapter.rescalings() {
        if let Some(module) = rescaling.tensor.strip_suffix(".weight") {
            weights.insert(module, rescaling.axis);
        }
    }
    // PEFT multiplies a bias exactly if it multiplies the outputs of the weight.
    for rescaling in adapter.rescalings().iter().filter(|rescaling| !rescaling.tensor.ends_with(".weight")) {
        let module = rescaling.tensor.strip_suffix(".bias").unwrap_or(&rescaling.tensor);
        if weights.get(module) != Some(&Axis::Output) || rescaling.axis != Axis::Output {
            let message = format!("{:?} is multiplied otherwise than PEFT's IA3 does", rescaling.tensor);
            return Err(Error::new(rules::CONFIG_METHOD, message).tensor(&rescaling.tensor));
        }
    }
    Ok(weights)
}

/// `Some` if `origin` says the same.
fn describes(origin: &str, adapter: &Adapter, modules: &BTreeMap<&str, Axis>, limits: &Limits) -> Option<()> {
    let config = PeftConfig::parse(origin.as_bytes(), Path::new("adapter_config.json"), limits).ok()?;
    let same = modules.iter().all(|(module, axis)| {
        let listed = config.feedforward_modules.iter().any(|name| module.ends_with(name.as_str()));
        listed == (*axis == Axis::Input)
    });
    let oriented = adapter.rescalings().iter().all(|rescaling| rescaling.orientation == config.orientation);
    (config.method == Method::Ia3 && same && oriented && config.base_name == adapter.base().name).then_some(())
}

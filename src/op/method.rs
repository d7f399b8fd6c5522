//! What an adapter is called and what it asks for, in a person's words, from the config that it came with and from what it holds.

use serde_json::Value;

use crate::adapter::{Adapter, Kind, Removed};

/// `(peft_type, what people call it)`.
const METHODS: &[(&str, &str)] = &[
    ("ADALORA", "AdaLoRA"),
    ("LOHA", "LoHa"),
    ("LOKR", "LoKr"),
    ("VERA", "VeRA"),
    ("IA3", "IA3"),
    ("TRAINABLE_TOKENS", "trained tokens"),
];

/// `(field that is on, what people call it)`, for LoRA.
const VARIANTS: &[(&str, &str)] = &[
    ("use_dora", "DoRA"),
    ("use_bdlora", "BD-LoRA"),
    ("use_qalora", "QALoRA"),
    ("kasa_config", "KaSA"),
    ("use_rslora", "rsLoRA"),
];

/// `(beginning of init_lora_weights, what people call it)`.
const INITS: &[(&str, &str)] =
    &[("pissa", "PiSSA"), ("olora", "OLoRA"), ("corda", "CorDA"), ("lora_ga", "LoRA-GA"), ("loftq", "LoftQ"), ("eva", "EVA")];

/// The method, such as `LoRA`, `DoRA, rsLoRA` or `LoHa`.
pub(super) fn method(adapter: &Adapter) -> String {
    let config: Value = adapter.origin_config().and_then(|text| serde_json::from_str(text).ok()).unwrap_or(Value::Null);
    let stated = |key: &str| config.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let peft_type = stated("peft_type");
    if let Some((_, name)) = METHODS.iter().find(|(known, _)| *known == peft_type) {
        return (*name).to_owned();
    }
    let is_on = |key: &str| config.get(key).is_some_and(|value| !matches!(value, Value::Null | Value::Bool(false)));
    let mut names: Vec<&str> = VARIANTS.iter().filter(|(field, _)| is_on(field)).map(|(_, name)| *name).collect();
    if adapter.targets().iter().any(|target| target.magnitude.is_some()) && !names.contains(&"DoRA") {
        names.push("DoRA");
    }
    let init = stated("init_lora_weights").to_lowercase();
    names.extend(INITS.iter().find(|(start, _)| init.starts_with(start)).map(|(_, name)| *name));
    match (names.is_empty(), adapter.targets().is_empty(), adapter.rescalings().is_empty()) {
        (false, ..) => names.join(", "),
        (true, true, false) => "IA3".to_owned(),
        (true, true, true) => "full tensors".to_owned(),
        (true, false, _) => "LoRA".to_owned(),
    }
}

/// What has to be there or to be asked for before the adapter can be applied.
pub(super) fn needs(adapter: &Adapter) -> Vec<String> {
    let mut needs = Vec::new();
    match adapter.parts().residual.as_ref().map(|(_, removed)| *removed) {
        None => {}
        Some(Removed::Unknown) => needs.push("--residual-base, with the base of training".to_owned()),
        Some(_) => needs.push("--recompute-residual, or --residual-base with that of training".to_owned()),
    }
    if !adapter.replication().is_empty() {
        let layers: u64 = adapter.replication().iter().map(|(start, end)| end.saturating_sub(*start)).sum();
        needs.push(format!("the base with its layers repeated, {layers} in all, which merge does"));
    }
    if adapter.targets().iter().any(|target| matches!(target.kind, Kind::Flat | Kind::Shared(_))) {
        needs.push("the base, to be converted to another format".to_owned());
    }
    let magnitudes = adapter.targets().iter().any(|target| target.magnitude.is_some());
    if magnitudes || !adapter.rows().is_empty() || !adapter.rescalings().is_empty() {
        needs.push("a merge into a new folder (not --in-place), at weight 1".to_owned());
    } else if !adapter.replacements().is_empty() {
        needs.push("the weight 1, or --skip-replacements to leave full tensors out".to_owned());
    }
    needs
}

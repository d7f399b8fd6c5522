//! What the conditions look at: the adapter, the config as the loader will read it, and what lies beside the weights.

use serde_json::Value;

use crate::adapter::{Adapter, Replacement, Target};

/// The files that a loader would find.
#[derive(Debug, Clone, Default)]
pub(crate) struct Files {
    /// The text of `adapter_config.json`, if there is one beside the weights.
    pub(crate) config: Option<String>,
    /// Other safetensors files in the folder, sorted.
    pub(crate) others: Vec<String>,
}

/// An adapter as a loader finds it.
pub(crate) struct Subject<'a> {
    pub(crate) adapter: &'a Adapter,
    pub(crate) files: &'a Files,
    /// The config, or `Null`.
    config: Value,
}

impl<'a> Subject<'a> {
    pub(crate) fn new(adapter: &'a Adapter, files: &'a Files) -> Self {
        let config = files.config.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or(Value::Null);
        Subject { adapter, files, config }
    }

    pub(super) fn targets(&self) -> &'a [Target] {
        self.adapter.targets()
    }

    /// The value of a field; `None` if it is missing, and also if it is null.
    pub(super) fn field(&self, name: &str) -> Option<&Value> {
        self.config.get(name).filter(|value| !value.is_null())
    }

    /// Whether the config has the field, null or not.
    pub(super) fn has(&self, name: &str) -> bool {
        self.config.get(name).is_some()
    }

    /// Whether a field that is off by default is on.
    pub(super) fn is_set(&self, name: &str) -> bool {
        match self.field(name) {
            None | Some(Value::Bool(false)) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(_) => true,
        }
    }

    /// The rank that a loader takes for that of every target: `r`, or the first target's if there is no config.
    pub(super) fn rank(&self) -> Option<u64> {
        let first = self.targets().first().map(|target| target.scaling.rank);
        self.field("r").and_then(Value::as_u64).or(first)
    }

    /// The alpha that a loader takes for that of every target.
    pub(super) fn alpha(&self) -> Option<f64> {
        let first = self.targets().first().map(|target| target.scaling.alpha);
        self.field("lora_alpha").and_then(Value::as_f64).or(first)
    }

    /// The strings of a list; empty if the field is none.
    pub(super) fn names(&self, field: &str) -> Vec<&str> {
        let list = self.field(field).and_then(Value::as_array);
        list.map_or_else(Vec::new, |list| list.iter().filter_map(Value::as_str).collect())
    }

    /// Full tensors of modules that were trained whole: not a bias by itself.
    pub(super) fn saved(&self) -> impl Iterator<Item = &'a Replacement> {
        self.adapter.replacements().iter().filter(|replacement| !self.is_own_bias(replacement))
    }

    /// Biases that were trained with the rest of their module frozen.
    pub(super) fn biases(&self) -> impl Iterator<Item = &'a Replacement> {
        self.adapter.replacements().iter().filter(|replacement| self.is_own_bias(replacement))
    }

    /// A bias that comes without the weight of its module.
    fn is_own_bias(&self, replacement: &Replacement) -> bool {
        let Some(module) = replacement.tensor.strip_suffix(".bias") else { return false };
        let weight = format!("{module}.weight");
        !self.adapter.replacements().iter().any(|other| other.tensor == weight)
    }
}

/// The module whose weight a tensor is.
pub(super) fn module(tensor: &str) -> &str {
    tensor.rsplit_once('.').map_or(tensor, |(module, _)| module)
}

/// The last part of a module's path.
pub(super) fn leaf(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// Where the first number stands in a path: what is before it, the number, and what is after it.
pub(super) fn layer(module: &str) -> Option<(&str, u64, &str)> {
    let mut start = 0;
    for part in module.split('.') {
        let end = start + part.len();
        if let Ok(number) = part.parse() {
            return Some((module.get(..start)?, number, module.get(end..)?));
        }
        start = end + 1;
    }
    None
}

//! A merge of several adapters that are not simply added: by a method that works on single values straight into the base, by any other
//! through the adapter that `combine` would write.

use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use super::combine::{Combination, CombineMethod, CombineOptions};
use super::digests::content;
use super::lineage::{Merged, name};
use super::merge::MergeOptions;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::exec::{Progress, sha256};
use crate::plan::{Mixing, Weighted};
use crate::rules;

/// What is merged instead of the sum of the adapters.
pub(super) struct Mixed {
    /// What `combine` makes of them; none if each is merged by itself and the method is a part of the options.
    combination: Option<Combination>,
    pub(super) options: MergeOptions,
    /// What the record names.
    entry: Merged,
}

/// Everything that a method other than the sum needs before it is merged.
///
/// # Errors
/// `U-001` if the method cannot be merged; otherwise as [`Combination::new`].
pub(super) fn prepare(
    base: &Checkpoint,
    adapters: &[Weighted<'_>],
    output: &Path,
    options: &MergeOptions,
    progress: &dyn Progress,
) -> Result<Mixed> {
    let method = options.method;
    method.check()?;
    if let CombineMethod::Peft(_) = method {
        let message = "PEFT makes adapters of adapters, and merges none by such a type";
        return Err(Error::new(rules::ARGUMENT, message).help("combine them first: loratool combine --compat"));
    }
    let mut roots = Vec::with_capacity(adapters.len());
    for weighted in adapters {
        roots.push(content(weighted.adapter, || Ok(()))?.finish());
    }
    let named: Vec<String> =
        adapters.iter().map(|one| format!("{} × {}", one.weight, name(Path::new(one.adapter.label())))).collect();
    let weights: Vec<f64> = adapters.iter().map(|one| one.weight).collect();
    let recipe = json!({ "inputs": &roots, "method": method.described(), "weights": weights }).to_string();
    let entry =
        Merged { adapter: format!("{} of {}", method.name(), named.join(", ")), content: sha256(recipe.as_bytes()), weight: 1.0 };
    let mut options = options.clone();
    if method.is_by_value() {
        options.output.mixing = Some(Arc::new(Mixing { method: method.by_value(), roots }));
        return Ok(Mixed { combination: None, options, entry });
    }
    let combine = CombineOptions {
        method,
        allow_base_mismatch: options.bind.allow_base_mismatch,
        exec: options.exec.clone(),
        limits: options.limits.clone(),
        ..Default::default()
    };
    let beside = if output == base.path() { base.path() } else { output };
    let combination = Combination::new(adapters, beside, &combine, progress)?;
    Ok(Mixed { combination: Some(combination), options, entry })
}

impl Mixed {
    /// What is merged.
    pub(super) fn adapters<'m>(&'m self, adapters: &[Weighted<'m>]) -> Vec<Weighted<'m>> {
        match &self.combination {
            Some(combination) => vec![Weighted::full(combination.adapter())],
            None => adapters.to_vec(),
        }
    }

    /// What is recorded of it: one thing, because none of the adapters by itself is in the result.
    pub(super) fn entries(&self) -> Vec<Merged> {
        vec![self.entry.clone()]
    }
}

//! What takes the place of base values: full tensors, and rows of embeddings.

use std::collections::BTreeSet;

use super::{ByModule, Reader};
use crate::adapter::{Factor, Replacement, RowReplacement};
use crate::dialect::peft::config::PeftConfig;
use crate::dialect::peft::full;
use crate::dialect::peft::keys::{Key, Role};
use crate::dialect::peft::patterns::ends;
use crate::error::Diagnostic;
use crate::rules;

/// Output layers that are tied to an embedding.
const HEADS: &[&str] = &["lm_head", "embed_out"];

impl Reader<'_> {
    /// Rows of embeddings, which the config alone numbers.
    pub(super) fn rows(&mut self, keys: &[Key<'_>], config: Option<&PeftConfig>) -> Vec<RowReplacement> {
        let stated = config.map_or(&[][..], |config| &config.tokens);
        let (mut rows, mut used) = (Vec::new(), vec![false; stated.len()]);
        let is_head = |key: &&Key<'_>| HEADS.iter().any(|head| ends(&key.path).any(|end| end == *head));
        let (heads, embeddings): (Vec<_>, Vec<_>) = keys.iter().filter(|key| key.role == Role::Rows).partition(is_head);
        for key in embeddings.into_iter().chain(heads) {
            let path = key.path.as_str();
            let at = stated.iter().position(|(module, _)| module.is_empty() || ends(path).any(|end| end == module));
            // The config names one of two that are tied, and PEFT stores what they share under both.
            let is_named = at.and_then(|at| stated.get(at)).is_some_and(|(module, _)| !module.is_empty());
            if !is_named && self.is_copy(key, &rows) {
                let message = format!("{:?} is a second copy of rows that the embedding is given, which it is tied to", key.name);
                self.warnings.push(Diagnostic::new(rules::KEY_GRAMMAR, message).tensor(key.name));
                continue;
            }
            let Some((at, (_, ids))) = at.and_then(|at| Some((at, stated.get(at)?))) else {
                let message = format!("{:?} holds rows of an embedding, and no config says which", key.name);
                let help = "trainable_token_indices of adapter_config.json has to name them";
                self.problem(Diagnostic::new(rules::FULL_TENSOR_NAMED, message).tensor(key.name).help(help));
                continue;
            };
            if let Some(used) = used.get_mut(at) {
                *used = true;
            }
            let tensor = format!("{path}.weight");
            rows.extend(self.factor(key).map(|with| RowReplacement { tensor, rows: ids.clone(), with }));
        }
        if let Some((module, ids)) = stated.iter().zip(used).find(|(_, used)| !used).map(|(stated, _)| stated) {
            let message = format!("trainable_token_indices names {} rows of {module:?}, which are not in the file", ids.len());
            let help = "the file is incomplete; save the adapter again";
            self.problem(Diagnostic::new(rules::FACTORS_PAIRED, message).tensor("trainable_token_indices").help(help));
        }
        rows
    }

    /// Whether the same rows are there already. If they cannot be read, they are not.
    fn is_copy(&self, key: &Key<'_>, rows: &[RowReplacement]) -> bool {
        let equal = |with: &Factor| rows.iter().any(|first| first.with.equals(with).unwrap_or(false));
        self.factor(key).is_some_and(|with| equal(&with))
    }

    pub(super) fn replacements(
        &mut self,
        keys: &[Key<'_>],
        modules: &ByModule<'_>,
        config: Option<&PeftConfig>,
    ) -> Vec<Replacement> {
        let targets: BTreeSet<&str> = modules.keys().map(|(path, _)| *path).collect();
        let with_rows: BTreeSet<&str> = keys.iter().filter(|key| key.role == Role::Rows).map(|key| key.path.as_str()).collect();
        let mut replacements = Vec::new();
        for key in keys {
            let parameter = match key.role {
                Role::Full => key.path.clone(),
                Role::BaseBias => format!("{}.bias", key.path.trim_end_matches(".base_layer")),
                Role::BaseWeight if targets.contains(key.path.as_str()) || with_rows.contains(key.path.as_str()) => {
                    let tensor = format!("{}.weight", key.path);
                    replacements.extend(self.factor(key).map(|with| Replacement { tensor, with, shared: true }));
                    continue;
                }
                Role::BaseWeight => format!("{}.weight", key.path),
                _ => continue,
            };
            match full::unannounced(key.name, &parameter, config, &targets) {
                Some(problem) => self.problem(problem),
                None => {
                    let shared = config.is_none_or(|config| !full::saved(&config.modules_to_save, &parameter));
                    replacements.extend(self.factor(key).map(|with| Replacement { tensor: parameter, with, shared }));
                }
            }
        }
        replacements
    }
}

//! What takes the place of base values: full tensors, and rows of embeddings.

use std::collections::BTreeSet;

use super::{ByModule, Reader};
use crate::adapter::{Replacement, RowReplacement};
use crate::dialect::peft::config::PeftConfig;
use crate::dialect::peft::full;
use crate::dialect::peft::keys::{Key, Role};
use crate::dialect::peft::patterns::ends;
use crate::error::Diagnostic;
use crate::rules;

impl Reader<'_> {
    /// Rows of embeddings, which the config alone numbers.
    pub(super) fn rows(&mut self, keys: &[Key<'_>], config: Option<&PeftConfig>) -> Vec<RowReplacement> {
        let stated = config.map_or(&[][..], |config| &config.tokens);
        let (mut rows, mut used) = (Vec::new(), vec![false; stated.len()]);
        for key in keys.iter().filter(|key| key.role == Role::Rows) {
            let path = key.path.as_str();
            let at = stated.iter().position(|(module, _)| module.is_empty() || ends(path).any(|end| end == module));
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

    pub(super) fn replacements(
        &mut self,
        keys: &[Key<'_>],
        modules: &ByModule<'_>,
        config: Option<&PeftConfig>,
    ) -> Vec<Replacement> {
        let targets: BTreeSet<&str> = modules.keys().map(|(path, _)| *path).collect();
        let mut replacements = Vec::new();
        for key in keys {
            let parameter = match key.role {
                Role::Full => key.path.clone(),
                Role::BaseBias => format!("{}.bias", key.path.trim_end_matches(".base_layer")),
                Role::BaseWeight if targets.contains(key.path.as_str()) => {
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

//! A checkpoint whose layers are repeated: the same bytes under more names (PEFT `tuners/tuners_utils.py`, `replicate_layers`). Nothing is
//! read or written here; the tensors of a copy are read from where the layer that it repeats is.

use std::collections::BTreeSet;

use super::Checkpoint;
use crate::error::{Diagnostic, Error, Result};
use crate::rules;
use crate::tensor::TensorSource;

/// Layers that a stack may have: ten times those of any model.
const MOST: u64 = 10_000;

/// What lists of layers are called (`replicate_layers`; transformers 5.23).
const LISTS: &[&str] = &["layers", "layer", "h"];

impl Checkpoint {
    /// How its layers are repeated: ranges of the stored ones, one after the other; empty if they are as stored.
    pub fn replication(&self) -> &[(u64, u64)] {
        &self.replication
    }

    /// The checkpoint with its layers repeated: `[(0, 2), (1, 3)]` makes four layers of three, the stored 0, 1, 1 and 2.
    ///
    /// # Errors
    /// `P-006` for a range that is empty or has layers that the checkpoint does not have, or if it has no numbered layers.
    pub fn replicated(self, ranges: &[(u64, u64)]) -> Result<Checkpoint> {
        if ranges.is_empty() {
            return Ok(self);
        }
        let refuse = |message: String| Error::new(rules::CONFIG_METHOD, message).file(&self.path);
        let lists: BTreeSet<&str> = self.names().filter_map(|name| layer(name).map(|(before, ..)| before)).collect();
        let Some(list) = lists.first().map(|list| (*list).to_owned()) else {
            return Err(refuse("the base has no numbered layers that could be repeated".to_owned()));
        };
        if lists.len() > 1 {
            let message = format!("the base has several lists of layers, {lists:?}, and which is repeated is not known");
            return Err(refuse(message).help("repeat the layers of the language model in PEFT and save that as the base"));
        }
        let layer = |name: &'_ str| layer(name).map(|(_, number, after)| (number, after.to_owned()));
        let count = self.names().filter_map(|name| layer(name).map(|(number, _)| number.saturating_add(1))).max().unwrap_or(0);
        if let Some((start, end)) = ranges.iter().find(|(start, end)| start >= end || *end > count) {
            let message = format!("layers {start} to {end} are to be repeated, and the base has {count}");
            return Err(refuse(message).help("use the base that the adapter was trained on"));
        }
        let total = ranges.iter().fold(0, |sum: u64, (start, end)| sum.saturating_add(end - start));
        if total > MOST {
            return Err(Error::new(rules::CONFIG_LIMIT, format!("{total} layers, over the limit of {MOST}")).file(&self.path));
        }
        let stack: Vec<u64> = ranges.iter().flat_map(|(start, end)| *start..*end).collect();
        let names_of = |name: &str| -> Vec<String> {
            let Some((number, after)) = layer(name) else { return vec![name.to_owned()] };
            let places = stack.iter().enumerate().filter(|(_, stored)| **stored == number);
            places.map(|(place, _)| format!("{list}{place}{after}")).collect()
        };
        let mut warnings = self.warnings;
        let message = format!("the layers of the base are repeated, {count} become {}, as the adapter asks", stack.len());
        warnings.push(Diagnostic::new(rules::CONFIG_METHOD, message).file(&self.path));
        let shards: Vec<_> =
            self.shards.into_iter().map(|shard| super::Shard { file: shard.file.renamed(names_of), ..shard }).collect();
        let by_tensor =
            shards.iter().enumerate().flat_map(|(i, shard)| shard.file.names().map(move |name| (name.to_owned(), i))).collect();
        let (config, left) = self.config.with_layers(&stack, count);
        for key in left {
            let message =
                format!("{key:?} of config.json has {count} values, as many as there were layers, and is left as it is");
            let help = "if it holds one for each layer, repeat them in the config of the result";
            warnings.push(Diagnostic::new(rules::CONFIG_METHOD, message).file(&self.path).help(help));
        }
        Ok(Checkpoint { shards, by_tensor, warnings, config, replication: ranges.to_vec(), ..self })
    }
}

/// The number of the layer that a tensor belongs to, and the name before and after it.
fn layer(name: &str) -> Option<(&str, u64, &str)> {
    let mut at = 0;
    let mut segments = name.split('.').peekable();
    while let Some(segment) = segments.next() {
        at += segment.len() + 1;
        // Digits alone: another spelling of a number would be another name.
        let is_number = |next: &&&str| next.bytes().all(|b| b.is_ascii_digit()) && (**next == "0" || !next.starts_with('0'));
        let next = segments.peek().filter(|_| LISTS.contains(&segment)).filter(is_number);
        let number = next.and_then(|next| next.parse::<u64>().ok());
        if let (Some(number), Some(digits)) = (number, segments.peek()) {
            let end = at + digits.len();
            return Some((name.get(..at)?, number, name.get(end..)?));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::layer;

    #[test]
    fn the_number_of_a_layer_follows_the_name_of_the_list() {
        assert_eq!(layer("model.layers.12.mlp.experts.3.w1.weight"), Some(("model.layers.", 12, ".mlp.experts.3.w1.weight")));
        assert_eq!(layer("transformer.h.0.ln.weight"), Some(("transformer.h.", 0, ".ln.weight")));
        assert_eq!(layer("model.embed_tokens.weight"), None);
        assert_eq!(layer("model.layers.norm.weight"), None);
    }
}

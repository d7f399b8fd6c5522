//! Tensors that differ only in the number of their layer, taken together: an adapter of 500 targets is seven kinds of module.

use std::collections::{BTreeSet, HashMap, HashSet};

/// What is common to the tensors of a group: the name with `*` for each number, and whatever else is shown in the row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    pattern: String,
    /// First number in the name of each member.
    layers: BTreeSet<u64>,
    facts: Vec<String>,
    /// Indices of the members.
    pub(super) members: Vec<usize>,
}

/// Groups tensors by pattern and facts, in the order of first occurrence.
pub(super) fn group<'n>(tensors: impl Iterator<Item = (&'n str, Vec<String>)>) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut index = HashMap::new();
    for (i, (name, facts)) in tensors.enumerate() {
        let (pattern, layer) = pattern(name);
        let at = *index.entry((pattern.clone(), facts.clone())).or_insert(groups.len());
        if at == groups.len() {
            groups.push(Group { pattern, layers: BTreeSet::new(), facts, members: Vec::new() });
        }
        groups[at].layers.extend(layer);
        groups[at].members.push(i);
    }
    groups
}

/// The layer of a tensor: the first number in its name.
pub(super) fn layer(name: &str) -> Option<u64> {
    pattern(name).1
}

/// The pattern of a name, and its first number: its layer.
fn pattern(name: &str) -> (String, Option<u64>) {
    let mut layer = None;
    let parts: Vec<&str> = name
        .split('.')
        .map(|part| match part.parse::<u64>() {
            Ok(number) if part.bytes().all(|b| b.is_ascii_digit()) => {
                layer.get_or_insert(number);
                "*"
            }
            _ => part,
        })
        .collect();
    (parts.join("."), layer)
}

impl Group {
    /// The facts that the members share.
    pub(super) fn facts(&self) -> &[String] {
        &self.facts
    }

    /// How many layers.
    pub(super) fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// The layers, as ranges: `0-11, 14`. Empty if the name has no number.
    pub(super) fn layers(&self) -> String {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for &layer in &self.layers {
            match ranges.last_mut() {
                Some((_, end)) if end.checked_add(1) == Some(layer) => *end = layer,
                _ => ranges.push((layer, layer)),
            }
        }
        let shown: Vec<String> =
            ranges.iter().map(|(from, to)| if from == to { from.to_string() } else { format!("{from}-{to}") }).collect();
        shown.join(", ")
    }
}

/// What to call each group: the module below the layer's number, or the whole pattern where two kinds of module share that.
pub(super) fn labels(groups: &[Group]) -> Vec<String> {
    let mut patterns: HashMap<&str, HashSet<&str>> = HashMap::new();
    for group in groups {
        patterns.entry(leaf(&group.pattern)).or_default().insert(&group.pattern);
    }
    let label = |group: &Group| {
        let leaf = leaf(&group.pattern);
        let shared = patterns.get(leaf).is_some_and(|patterns| patterns.len() > 1);
        let name = if shared { &group.pattern } else { leaf };
        name.strip_suffix(".weight").unwrap_or(name).to_owned()
    };
    groups.iter().map(label).collect()
}

fn leaf(pattern: &str) -> &str {
    pattern.rsplit_once(".*.").map_or(pattern, |(_, leaf)| leaf)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(names: &[&str]) -> Vec<(String, String, usize)> {
        let groups = group(names.iter().map(|name| (*name, vec!["64x64".to_owned()])));
        labels(&groups).into_iter().zip(&groups).map(|(label, g)| (label, g.layers(), g.members.len())).collect()
    }

    #[test]
    fn layers_are_taken_together() {
        let names: Vec<String> = [0, 1, 2, 5].map(|i| format!("model.layers.{i}.self_attn.q_proj.weight")).to_vec();
        let names: Vec<&str> = names.iter().map(String::as_str).chain(["lm_head.weight"]).collect();
        let expected = [("self_attn.q_proj", "0-2, 5", 4), ("lm_head", "", 1)];
        assert_eq!(shown(&names), expected.map(|(label, layers, n)| (label.to_owned(), layers.to_owned(), n)));
    }

    #[test]
    fn modules_of_one_name_keep_their_paths() {
        let found = shown(&["encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.block.0.layer.0.SelfAttention.q.weight"]);
        let labels: Vec<&str> = found.iter().map(|f| f.0.as_str()).collect();
        assert_eq!(labels, ["encoder.block.*.layer.*.SelfAttention.q", "decoder.block.*.layer.*.SelfAttention.q"]);
    }

    #[test]
    fn experts_are_counted_within_their_layer() {
        let names: Vec<String> = (0..8).map(|e| format!("model.layers.3.mlp.experts.{e}.w1.weight")).collect();
        assert_eq!(shown(&names.iter().map(String::as_str).collect::<Vec<_>>()), [("w1".to_owned(), "3".to_owned(), 8)]);
    }

    #[test]
    fn what_differs_is_apart() {
        let facts = |rank: &str| vec![rank.to_owned()];
        let groups = group([("h.0.q.weight", facts("8")), ("h.1.q.weight", facts("16"))].into_iter());
        assert_eq!(groups.iter().map(Group::layers).collect::<Vec<_>>(), ["0", "1"]);
        assert_eq!(groups[1].facts(), ["16"]);
    }
}

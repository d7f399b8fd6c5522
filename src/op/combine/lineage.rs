//! What the result says of where it is from.

use std::path::Path;

use serde_json::{Value, json};

use super::options::{CombineOptions, LayerWeight};
use crate::adapter::{Adapter, Lineage, LineageInput};
use crate::loader::Loader;
use crate::op::lineage::name;
use crate::op::rank::RankRule;
use crate::plan::Weighted;

/// What all adapters say of their history, each step once.
pub(super) fn history(adapters: &[&Adapter], order: &[usize]) -> Vec<Lineage> {
    let mut steps: Vec<Lineage> = Vec::new();
    for step in order.iter().flat_map(|place| adapters[*place].lineage()) {
        if !steps.contains(step) {
            steps.push(step.clone());
        }
    }
    steps
}

/// What stands in the lineage: enough to do it again.
pub(super) fn step(adapters: &[Weighted<'_>], roots: &[String], options: &CombineOptions) -> Lineage {
    let input = |(weighted, root): (&Weighted<'_>, &String)| LineageInput {
        role: "adapter".into(),
        dialect: weighted.adapter.dialect().into(),
        content: root.clone(),
    };
    let layer = |layer: &LayerWeight| json!({ "adapter": layer.adapter, "factor": layer.factor, "pattern": layer.pattern });
    Lineage {
        op: "combine".to_owned(),
        tool: format!("loratool {}", env!("CARGO_PKG_VERSION")),
        inputs: adapters.iter().zip(roots).map(input).collect(),
        parameters: json!({
            "dtype": options.dtype.map(|dtype| dtype.to_string()),
            "for": options.loader.map(Loader::name),
            "layers": options.layers.iter().map(layer).collect::<Vec<Value>>(),
            "method": options.method.described(),
            "names": adapters.iter().map(|weighted| name(Path::new(weighted.adapter.label()))).collect::<Vec<_>>(),
            "parts": options.parts.name(),
            "prefix": options.prefix.as_ref().map(|(from, to)| format!("{from}={to}")),
            "rank": options.rank.map(RankRule::described),
            "split": options.split.name(),
            "weights": adapters.iter().map(|weighted| weighted.weight).collect::<Vec<_>>(),
        })
        .to_string(),
    }
}

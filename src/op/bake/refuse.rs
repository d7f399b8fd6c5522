//! What a plain adapter cannot say, by name and all at once. Every tensor of the adapter is a factor that is baked, or is named here,
//! whatever kinds of them the model may come to have.

use std::collections::HashSet;
use std::sync::Arc;

use crate::adapter::{Adapter, Factor, Kind, Target};
use crate::error::{Diagnostic, Error, Result};
use crate::rules;

const MERGE: &str =
    "loratool merge applies it: serve the merged model; or look for a loader that takes it, by loratool validate --for";

/// Refuses an adapter of which a part would be lost.
///
/// # Errors
/// `U-007` for every such part.
pub(super) fn check(adapter: &Adapter) -> Result<()> {
    let mut problems: Vec<Diagnostic> = adapter.targets().iter().filter_map(target).collect();
    let mut told: HashSet<(usize, &str)> = HashSet::new();
    for target in adapter.targets() {
        told.extend([key(&target.a), key(&target.b)]);
        if let Some(bias) = &target.bias {
            told.insert(key(&bias.delta));
            problems.push(refuse(&bias.tensor, "is updated by lora_bias"));
        }
    }
    for replacement in adapter.replacements() {
        told.insert(key(&replacement.with));
        let what = match replacement.tensor.ends_with(".bias") {
            true => "is replaced by a trained bias",
            false => "is replaced by a full tensor",
        };
        problems.push(refuse(&replacement.tensor, what));
    }
    let others = adapter.factors().filter(|factor| !told.contains(&key(factor)));
    problems.extend(others.map(|factor| refuse(factor.name(), "is neither A nor B")));
    if let Some(why) = adapter.residual() {
        let message = format!("the adapter belongs to another base than the published one: {}", why.message());
        let help = "make it one for the published base first: loratool convert --base BASE --recompute-residual";
        problems.push(Diagnostic::new(rules::PORTABLE, message).help(help));
    }
    if !adapter.replication().is_empty() {
        let message = "the adapter belongs to a base whose layers are repeated, and loaders repeat none";
        problems.push(Diagnostic::new(rules::PORTABLE, message).help("merge it: the result is a model of its own"));
    }
    if adapter.targets().is_empty() {
        problems.push(Diagnostic::new(rules::PORTABLE, "the adapter has no low-rank updates").help(MERGE));
    }
    Error::check(problems.into_iter().map(|problem| problem.file(adapter.label())).collect())
}

/// A tensor is known by its source and its name.
fn key(factor: &Factor) -> (usize, &str) {
    (Arc::as_ptr(factor.source()).cast::<()>() as usize, factor.name())
}

fn refuse(tensor: &str, what: &str) -> Diagnostic {
    let message = format!("{tensor:?} {what}, which a plain adapter does not have");
    Diagnostic::new(rules::PORTABLE, message).tensor(tensor).help(MERGE)
}

fn target(target: &Target) -> Option<Diagnostic> {
    let matrices = [&target.a, &target.b].iter().all(|factor| factor.info().shape.matrix().is_some());
    if target.kind == Kind::Embedding {
        return Some(refuse(&target.tensor, "is an embedding with factors of its own names and order"));
    }
    if matches!(target.kind, Kind::Flat | Kind::Shared(_)) {
        let message = format!("the kind of layer of {:?} is the base's, which the adapter does not know", target.tensor);
        let help = "convert the adapter with its base first: loratool convert --to container --base BASE";
        return Some(Diagnostic::new(rules::PORTABLE, message).tensor(&target.tensor).help(help));
    }
    if !matches!(target.kind, Kind::Linear(_)) || !matrices {
        return Some(refuse(&target.tensor, "is no linear layer"));
    }
    module(target).is_none().then(|| refuse(&target.tensor, "is not the weight of a module"))
}

/// The module whose weight is the target.
pub(super) fn module(target: &Target) -> Option<&str> {
    target.tensor.strip_suffix(".weight").filter(|module| !module.is_empty())
}

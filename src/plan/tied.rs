//! Tied weights: one tensor under several names. Changing it under one of them changes the others as well, or is undone when the
//! model is loaded, so a merge into an embedding that the config ties to the head is refused unless the user asks for the tie to be
//! broken. `spec/adapter-model.md`, A-026.

use std::collections::BTreeSet;

use crate::checkpoint::Checkpoint;
use crate::error::Diagnostic;
use crate::rules;
use crate::tensor::TensorSource;

/// The stored tensor that `name`, which the files leave out, has its values from.
pub(super) fn stored_twin(base: &Checkpoint, name: &str) -> Option<&'static str> {
    if base.info(name).is_some() {
        return None;
    }
    base.tied(name)?.present.first().copied()
}

/// Heads of decoders, about which `tie_word_embeddings` says nothing but that they are the embedding. With encoder-decoders it also
/// fills in the embeddings of both halves and scales outputs (T5), with masked language models it also ties a bias: there a file with
/// the flag set to false loads with weights made up at random (transformers 5.23).
const PLAIN_HEADS: &[&str] = &["lm_head.weight", "language_model.lm_head.weight", "embed_out.weight"];

/// Why the tensor may not be changed, or `None` if it may.
pub(super) fn problem(base: &Checkpoint, name: &str, untie: bool) -> Option<Diagnostic> {
    let tie = base.tied(name)?;
    let stored = base.info(name).is_some();
    let refuse = |message: String, help: &str| Some(Diagnostic::new(rules::TIED_WEIGHTS, message).file(base.path()).help(help));
    // Names that are this tensor whatever the config says. It has one stored name among them, and is changed by that one.
    let others: Vec<&str> = tie.present.iter().filter(|other| !tie.heads.contains(other)).copied().collect();
    let is_head = tie.heads.contains(&name);
    if !is_head && (!stored || !others.is_empty()) {
        let others = others.join("\" and \"");
        let message = format!("{name:?} is one tensor with {others:?}, by the architecture");
        return refuse(message, "use an adapter that targets the stored name");
    }
    if tie.heads.is_empty() {
        return None;
    }
    if untie {
        let bodies =
            usize::from(!is_head) + tie.present.iter().chain(&tie.absent).filter(|other| !tie.heads.contains(other)).count();
        if bodies == 1 && tie.heads.iter().all(|head| PLAIN_HEADS.contains(head)) {
            return None;
        }
        let message =
            format!("{name:?} cannot be untied: in this model tie_word_embeddings also decides about other weights or scales");
        return refuse(message, "merge the adapter with PEFT (merge_and_unload) and use the merged model");
    }
    let others = tie.heads.iter().filter(|head| **head != name).chain(&tie.present).chain(&tie.absent);
    let twin = others.copied().next().unwrap_or_default();
    let message = match (stored, tie.present.is_empty()) {
        (false, _) => format!("{name:?} is tied to {twin:?} and not stored in the base: merging into it would change both"),
        (true, true) => format!("{twin:?} is tied to {name:?}: merging into it would change both"),
        (true, false) => format!("config.json ties {name:?} to {twin:?}: loading the result would undo the merge or change both"),
    };
    refuse(
        message,
        "the adapter was trained with one of them changed: pass --untie to write both tensors and untie them in config.json",
    )
}

/// The heads that must be written beside the changed tensors, because the files leave them out and they are to stay as they are.
pub(super) fn heads_to_write(base: &Checkpoint, changed: &BTreeSet<String>) -> Vec<String> {
    let ties = changed.iter().filter(|name| base.info(name).is_some()).filter_map(|name| base.tied(name));
    let absent = ties.flat_map(|tie| tie.heads.into_iter().filter(|head| base.info(head).is_none()).collect::<Vec<_>>());
    absent.map(str::to_owned).filter(|head| !changed.contains(head)).collect()
}

/// Do these changes break a tie that `config.json` states?
pub(super) fn is_broken(base: &Checkpoint, changed: &BTreeSet<String>) -> bool {
    changed.iter().any(|name| base.tied(name).is_some_and(|tie| !tie.heads.is_empty()))
}

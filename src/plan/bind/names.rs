//! Under which names the base has what an adapter changes: one renaming that finds every target, or what is missing, by name.

use std::collections::HashSet;

use super::Binder;
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Error, Result};
use crate::limits::Limits;
use crate::plan::quantised::UNPACKED_BASE;
use crate::plan::rename::{self, Renaming};
use crate::plan::{fused, tied};
use crate::rules;
use crate::tensor::TensorSource;

impl Binder<'_, '_> {
    pub(super) fn exists(&self, name: &str) -> bool {
        let elsewhere = || fused::is_apart(self.base, name) || fused::in_stack(self.base, name).is_some();
        self.base.info(name).is_some() || tied::stored_twin(self.base, name).is_some() || elsewhere()
    }

    /// Exact names, then the user's prefix, then the known renamings: the one that finds every target, if only one does.
    pub(super) fn choose_renaming(&mut self, targets: Vec<&str>, whole: &[&str], label: &str, limits: &Limits) -> Result<()> {
        let needed: Vec<&str> = targets.iter().copied().filter(|t| !self.may_be_missing(t)).collect();
        let found = |renaming: &Renaming| {
            let exists = |name: &str| self.exists(name);
            needed.iter().filter(|name| exists(&renaming.apply(name, &exists))).count()
        };
        let candidates = self.candidates();
        if needed.is_empty() {
            // Replacements alone: they carry no proof of a renaming, so they are taken by their exact names or the user's prefix.
            self.adopt(candidates.into_iter().next().unwrap_or_else(Renaming::identity));
            return Ok(());
        }
        let whole_found = |renaming: &Renaming| {
            let exists = |name: &str| self.exists(name);
            whole.iter().filter(|name| exists(&renaming.apply(name, &exists))).count()
        };
        let mut fitting: Vec<Renaming> = candidates.into_iter().filter(|c| found(c) == needed.len()).collect();
        let most = fitting.iter().map(whole_found).max().unwrap_or(0);
        fitting.retain(|renaming| whole_found(renaming) == most);
        if fitting.first().is_some_and(|first| first.is_identity()) {
            fitting.truncate(1);
        }
        let names = || needed.iter().chain(whole);
        let distinct: HashSet<Vec<String>> =
            fitting.iter().map(|renaming| names().map(|name| renaming.apply(name, &|n| self.exists(n))).collect()).collect();
        match (fitting.into_iter().next(), distinct.len()) {
            (Some(renaming), 1) => {
                self.adopt(renaming);
                Ok(())
            }
            (Some(_), _) => {
                Err(Error::new(rules::ONE_RENAMING, format!("{} renamings fit every target: ambiguous", distinct.len()))
                    .file(label)
                    .help("choose one with --prefix FROM=TO"))
            }
            (None, _) => self.explain_missing(&needed, label, limits),
        }
    }

    /// The renamings that may be used, in the order in which they are tried: the user's alone, or exact names and the known ones.
    fn candidates(&self) -> Vec<Renaming> {
        match &self.options.prefix {
            Some((from, to)) => vec![Renaming { from: from.clone(), to: to.clone(), family: None, asked: true }],
            None => std::iter::once(Renaming::identity()).chain(rename::known()).collect(),
        }
    }

    fn adopt(&mut self, renaming: Renaming) {
        self.renaming = renaming.clone();
        self.binding.renaming = renaming;
    }

    pub(super) fn may_be_missing(&self, name: &str) -> bool {
        self.base.info(name).is_none() && self.options.allow_missing.iter().any(|pattern| rename::matches(pattern, name))
    }

    /// No renaming finds every target. Says which are missing under the best one, with the nearest names and the way out.
    fn explain_missing(&mut self, needed: &[&str], label: &str, limits: &Limits) -> Result<()> {
        let exists = |name: &str| self.exists(name);
        let score = |renaming: &Renaming| needed.iter().filter(|n| exists(&renaming.apply(n, &exists))).count();
        let candidates = self.candidates();
        // The first of the best: exact names win a draw.
        let best = candidates.iter().rev().max_by_key(|c| score(c)).cloned().unwrap_or_else(Renaming::identity);
        let missing: Vec<&str> = needed.iter().copied().filter(|n| !exists(&best.apply(n, &exists))).collect();
        if missing.len() == needed.len() {
            return Err(self.nothing_found(needed, label));
        }
        let mut problems = Vec::new();
        for name in missing.iter().take(limits.problems_shown) {
            problems.push(self.one_missing(name, &best).file(label));
        }
        if missing.len() > limits.problems_shown {
            let message = format!("and {} more of {} targets are missing", missing.len() - limits.problems_shown, needed.len());
            problems.push(Diagnostic::new(rules::EVERY_TARGET, message).file(label));
        }
        Error::check(problems)
    }

    fn one_missing(&self, name: &str, renaming: &Renaming) -> Diagnostic {
        let wanted = renaming.apply(name, &|n| self.exists(n));
        if let Some(packed) = packed_form(self.base, &wanted) {
            return packed;
        }
        let nearest = rename::nearest(&wanted, self.base.names()).map_or(String::new(), |n| format!("; nearest is {n:?}"));
        Diagnostic::new(rules::EVERY_TARGET, format!("adapter target {wanted:?} is not in the base{nearest}"))
            .tensor(name)
            .help(format!("use the base that the adapter was trained on, or leave it out by name: --allow-missing {name:?}"))
    }

    fn nothing_found(&self, needed: &[&str], label: &str) -> Error {
        if let Some(packed) = needed.first().and_then(|name| packed_form(self.base, name)) {
            return packed.file(self.base.path()).into();
        }
        let show = |names: Vec<&str>| names.iter().map(|n| format!("{n:?}")).collect::<Vec<_>>().join(", ");
        if let (Some((from, to)), Some(asked)) = (&self.options.prefix, self.candidates().first()) {
            let renamed: Vec<String> = needed.iter().take(3).map(|n| asked.apply(n, &|n| self.exists(n))).collect();
            let message = format!("no target is in the base under --prefix {from:?}={to:?}: {renamed:?}");
            let help = "leave out --prefix to have exact names and the known renamings tried";
            return Error::new(rules::SOME_TARGET, message).file(label).help(help);
        }
        let first = needed.first().copied().unwrap_or_default();
        let near = rename::nearest(first, self.base.names()).unwrap_or_default();
        let shared = rename::common_suffix(first, near);
        let cut = |name: &str| name.get(..(name.len() + 1).saturating_sub(shared)).unwrap_or_default().to_owned();
        let mut theirs: Vec<&str> = self.base.names().collect();
        theirs.sort_by_key(|name| std::cmp::Reverse((*name == near, rename::common_suffix(first, name))));
        theirs.truncate(3);
        let suffix = near.get((near.len() + 1).saturating_sub(shared)..).unwrap_or_default();
        let message = format!(
            "no target of the adapter is in the base. adapter: {}; base: {}; longest common suffix: {suffix:?}",
            show(needed.iter().copied().take(3).collect()),
            show(theirs)
        );
        let help = if rename::tells_a_layer(suffix) {
            format!("if they are the same layers: --prefix {:?}={:?}", cut(first), cut(near))
        } else {
            "this is not the base that the adapter was trained on".to_owned()
        };
        Error::new(rules::SOME_TARGET, message).file(label).help(help)
    }
}

/// Siblings that tell that a weight is stored packed, with the scheme that packs it so.
const PACKED: &[(&str, &str)] = &[
    ("qweight", "GPTQ or AWQ"),
    ("weight_packed", "compressed-tensors"),
    ("weight.absmax", "bitsandbytes"),
    ("weight_blocks", "MXFP4"),
    ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
];

/// The target is not there, but its packed form is.
fn packed_form(base: &Checkpoint, name: &str) -> Option<Diagnostic> {
    let stem = name.strip_suffix("weight")?;
    let (suffix, scheme) = PACKED.iter().find(|(suffix, _)| base.info(&format!("{stem}{suffix}")).is_some())?;
    let message = format!("the base holds {:?}: it is quantised ({scheme}) and cannot be merged into", format!("{stem}{suffix}"));
    Some(Diagnostic::new(rules::BASE_DTYPE, message).tensor(name).help(UNPACKED_BASE))
}

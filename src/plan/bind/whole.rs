//! What takes the place of base values: full tensors, and rows of them.

use super::{Binder, Ignored, elsewhere};
use crate::adapter::Replacement;
use crate::error::{Diagnostic, Result};
use crate::plan::options::Weighted;
use crate::plan::quantised::packed_dtype;
use crate::plan::shape::shape_help;
use crate::plan::tied;
use crate::rules;
use crate::tensor::{Shape, is_plain_float};

/// What an adapter has for the other name of a tied weight.
enum Copied {
    No,
    Equal,
    Other,
}

/// Is it an embedding or an output layer of which only the numbers of rows differ?
pub(in super::super) fn is_resized(name: &str, base: &Shape, with: &Shape) -> bool {
    is_vocabulary(name) && base.matrix().zip(with.matrix()).is_some_and(|(base, with)| base.1 == with.1)
}

impl<'a> Binder<'a, '_> {
    /// Whether the adapter also replaces the stored name of a weight that `replacement` replaces under a name that is left out.
    fn other_copy(&self, weighted: Weighted<'a>, replacement: &Replacement, twin: &str) -> Result<Copied> {
        let others = weighted.adapter.replacements().iter().filter(|other| other.tensor != replacement.tensor);
        let other = others.into_iter().find(|other| self.locate(&other.tensor).is_some_and(|(name, _)| name == twin));
        match other {
            None => Ok(Copied::No),
            Some(other) if other.shared && other.with.equals(&replacement.with)? => Ok(Copied::Equal),
            Some(_) => Ok(Copied::Other),
        }
    }

    pub(super) fn bind_replacements(&mut self, weighted: Weighted<'a>) {
        for replacement in weighted.adapter.replacements() {
            let with = &replacement.with;
            if self.options.skip_replacements {
                self.binding.ignored.push(Ignored { tensor: with.name().to_owned(), flag: "--skip-replacements" });
                continue;
            }
            if weighted.weight == 0.0 {
                self.binding.ignored.push(Ignored { tensor: with.name().to_owned(), flag: "weight 0" });
                continue;
            }
            if weighted.weight != 1.0 {
                let message =
                    format!("{:?} takes the place of a base tensor, which weight {} cannot scale", with.name(), weighted.weight);
                let help = "give the adapter the weight 1, or leave out its full tensors with --skip-replacements";
                self.problems.push(Diagnostic::new(rules::METHOD_SUPPORTED, message).tensor(with.name()).help(help));
                continue;
            }
            let located = self.locate(&replacement.tensor);
            let name = located
                .as_ref()
                .map_or_else(|| self.renaming.apply(&replacement.tensor, &|n| self.exists(n)), |(name, _)| name.clone());
            // What is shared changes under all of its names, and is stored under one.
            let shared = replacement.shared && self.base.tied(&name).is_some();
            if let Some(problem) = tied::problem(self.base, &name, self.options.untie).filter(|_| !shared) {
                self.problems.push(problem.tensor(with.name()));
                continue;
            }
            let name = match tied::stored_twin(self.base, &name).filter(|_| shared) {
                None => name,
                Some(twin) => match self.other_copy(weighted, replacement, twin) {
                    Err(error) => {
                        self.problems.extend(error.into_diagnostics());
                        continue;
                    }
                    Ok(Copied::Equal) => {
                        self.binding.copies.push(with);
                        continue;
                    }
                    // Untied, each name has the copy that was saved under it.
                    Ok(Copied::Other) if self.options.untie => name,
                    Ok(Copied::Other | Copied::No) => twin.to_owned(),
                },
            };
            match located {
                Some((_, info))
                    if info.shape != with.info().shape
                        && !(self.options.resize_vocabulary && is_resized(&name, &info.shape, &with.info().shape)) =>
                {
                    let pair = |s: &Shape| s.matrix().unwrap_or((0, 0));
                    let message = format!("replacement of {name:?} is {} but the base has {}", with.info().shape, info.shape);
                    let help = match is_resized(&name, &info.shape, &with.info().shape) {
                        true => "if the vocabulary was resized, pass --resize-vocab: the result then has that of the adapter",
                        false => shape_help(pair(&with.info().shape), pair(&info.shape)),
                    };
                    self.problems.push(Diagnostic::new(rules::REPLACEMENT_SHAPE, message).tensor(with.name()).help(help));
                    continue;
                }
                Some((_, info)) if !is_plain_float(info.dtype) => {
                    self.problems.push(packed_dtype(&name, &info, self.base));
                    continue;
                }
                None if !self.options.add_new_tensors => {
                    let message = format!("the adapter brings {name:?}, which the base does not have");
                    let help = "add it with --add-new-tensors (a head that was trained with the adapter), or leave out all full tensors with --skip-replacements";
                    self.problems.push(Diagnostic::new(rules::NEW_TENSOR, message).tensor(with.name()).help(help));
                    continue;
                }
                _ => {}
            }
            if replacement.shared {
                self.binding.shared.insert(name.clone());
            }
            if self.binding.replacements.insert(name.clone(), with).is_some() {
                let message = format!("two replacements land on the base tensor {name:?}");
                self.problems.push(Diagnostic::new(rules::TARGETS_UNIQUE, message).tensor(with.name()));
            }
        }
    }

    pub(super) fn bind_rows(&mut self, weighted: Weighted<'a>) {
        for rows in weighted.adapter.rows() {
            let with = &rows.with;
            let refuse = |rule, message: String| Diagnostic::new(rule, message).tensor(with.name());
            if self.options.skip_replacements || weighted.weight == 0.0 {
                let flag = if self.options.skip_replacements { "--skip-replacements" } else { "weight 0" };
                self.binding.ignored.push(Ignored { tensor: with.name().to_owned(), flag });
                continue;
            }
            if weighted.weight != 1.0 {
                let message =
                    format!("{:?} replaces rows of a base tensor, which weight {} cannot scale", with.name(), weighted.weight);
                let help = "give the adapter the weight 1, or leave out its full tensors with --skip-replacements";
                self.problems.push(refuse(rules::METHOD_SUPPORTED, message).help(help));
                continue;
            }
            // PEFT replaces the rows under all names that the embedding is tied to.
            let Some((name, info)) = self.locate(&rows.tensor) else {
                self.problems.push(elsewhere(&rows.tensor, with.name()));
                continue;
            };
            let own = self.binding.replacements.get(&name).copied();
            let name = match tied::stored_twin(self.base, &name).filter(|_| own.is_none()) {
                Some(twin) => twin.to_owned(),
                None => name,
            };
            let replaced = weighted.adapter.replacements().iter().any(|whole| whole.tensor == rows.tensor);
            if replaced && !self.binding.replacements.contains_key(&name) {
                // It was refused, which is said.
                continue;
            }
            let whole = self.binding.replacements.get(&name).map_or(&info.shape, |whole| &whole.info().shape);
            if !is_plain_float(info.dtype) {
                self.problems.push(packed_dtype(&name, &info, self.base));
                continue;
            }
            let (dims, rows_of) = (whole.dims(), with.info().shape.dims());
            if dims.get(1..) != rows_of.get(1..) {
                let message = format!("rows for {name:?} are {} but the base has {whole}", with.info().shape);
                self.problems.push(refuse(rules::REPLACEMENT_SHAPE, message));
                continue;
            }
            if let Some(row) = rows.rows.iter().find(|row| dims.first().is_none_or(|count| **row >= *count)) {
                let message = format!("row {row} of {name:?} is replaced, but the base has {whole}");
                let help = "the vocabulary was resized: use the base that the adapter was trained on, resized in the same way";
                self.problems.push(refuse(rules::REPLACEMENT_SHAPE, message).help(help));
                continue;
            }
            if self.binding.updates.contains_key(&name) {
                let message = format!("rows of {name:?} are replaced, and the same adapter updates all of it");
                self.problems.push(refuse(rules::TARGETS_UNIQUE, message));
                continue;
            }
            if self.binding.rows.insert(name.clone(), rows).is_some() {
                let message = format!("two lists of rows are replaced in {name:?}");
                self.problems.push(refuse(rules::TARGETS_UNIQUE, message));
            }
        }
    }
}

/// Has the tensor a row for each token?
pub(in crate::plan) fn is_vocabulary(name: &str) -> bool {
    let leaf = name.strip_suffix(".weight").and_then(|module| module.rsplit('.').next());
    leaf.is_some_and(|leaf| VOCABULARIES.contains(&leaf))
}

/// Modules with a row for each token.
const VOCABULARIES: &[&str] =
    &["embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared", "tok_embeddings", "output"];

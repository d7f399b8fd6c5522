//! A merge of several adapters that are not simply added: by a method that works on single values straight into the base, by any other
//! through the adapter that `combine` would write.

use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use super::account::refuse_repeats;
use super::combine::{Combination, CombineMethod, CombineOptions};
use super::digests::content;
use super::lineage::{Made, Merged, name};
use super::merge::{MergeOptions, output_kind};
use crate::adapter::{Adapter, AdapterParts};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::exec::{Progress, interrupted, sha256};
use crate::io::check_output;
use crate::plan::{Mixing, Plan, Weighted};
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
    let made = |roots: &[String]| -> Result<Merged> {
        let part = |(one, content): (&Weighted<'_>, &String)| Merged {
            adapter: name(Path::new(one.adapter.label())),
            content: content.clone(),
            weight: one.weight,
            by: None,
        };
        let mut of: Vec<Merged> = adapters.iter().zip(roots).map(part).collect();
        if !options.allow_repeat {
            refuse_repeats(adapters, &of)?;
        }
        // The order in which they are given changes nothing.
        of.sort_by(|x, y| x.content.cmp(&y.content).then(x.weight.total_cmp(&y.weight)));
        let named: Vec<String> = of.iter().map(|part| format!("{} × {}", part.weight, part.adapter)).collect();
        let made = Made { method: method.described(), of };
        Ok(Merged {
            adapter: format!("{} of {}", method.name(), named.join(", ")),
            // Of the method and what went into it; there may be no file of what came out.
            content: sha256(json!(&made).to_string().as_bytes()),
            weight: 1.0,
            by: Some(made),
        })
    };
    if method.is_by_value() {
        let go_on = || if progress.cancelled() { Err(interrupted()) } else { Ok(()) };
        let root = |one: &Weighted<'_>| Ok(content(one.adapter, go_on)?.finish());
        let roots = adapters.iter().map(root).collect::<Result<Vec<_>>>()?;
        let entry = made(&roots)?;
        let mut options = options.clone();
        options.output.mixing = Some(Arc::new(Mixing { method: method.by_value(), roots }));
        return Ok(Mixed { combination: None, options, entry });
    }
    // What is wrong with the output, or with an adapter for this base, is told before anything is computed.
    check_output(output, output_kind(base), &[base.path()], options.overwrite)?;
    Plan::with_output(base, adapters, &options.bind, &options.output, &options.limits)?;
    let combine = CombineOptions {
        method,
        prefix: options.bind.prefix.clone(),
        allow_base_mismatch: options.bind.allow_base_mismatch,
        exec: options.exec.clone(),
        limits: options.limits.clone(),
        ..Default::default()
    };
    let named: Vec<Adapter> = adapters.iter().map(|one| without_replacements(one.adapter, options)).collect::<Result<_>>()?;
    let whole: Vec<Weighted<'_>> =
        named.iter().zip(adapters).map(|(adapter, one)| Weighted { adapter, weight: one.weight }).collect();
    let combination = Combination::new(&whole, output, &combine, progress).map_err(|error| {
        // The policies of combine are not those of a merge.
        if error.diagnostics().iter().any(|told| told.rule().id == rules::METHOD_SUPPORTED.id) {
            return error.help("combine the adapters first, with --parts: loratool combine");
        }
        error
    })?;
    let roots: Vec<String> = combination.report().adapters.iter().map(|one| one.content.clone()).collect();
    let mut options = options.clone();
    // The combination has the names of the base.
    options.bind.prefix = None;
    Ok(Mixed { entry: made(&roots)?, combination: Some(combination), options })
}

/// The adapter as the options have it merged.
fn without_replacements(adapter: &Adapter, options: &MergeOptions) -> Result<Adapter> {
    if !options.bind.skip_replacements || adapter.replacements().is_empty() {
        return Ok(adapter.clone());
    }
    Adapter::new(AdapterParts { replacements: Vec::new(), ..adapter.parts().clone() }, &options.limits)
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

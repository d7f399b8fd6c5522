//! `resize`: an adapter of other ranks, as close to the one that was given as those ranks allow. It works on the factors: QR of both, the
//! singular values of the core between them, in f64, and never the product. So the error is known and not estimated.

mod one;
mod options;

use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use super::crew;
use super::digests::{content, verify};
use super::rank::{RankRule, Share, divide, is_over};
use super::spool::Spool;
use super::write;
use crate::adapter::{Adapter, Factor, Lineage, LineageInput, Target};
use crate::error::{Diagnostic, Error, Result};
use crate::exec::{self, Progress};
use crate::io::check_output;
use crate::loader::VLLM_RANKS;
use crate::report::text::plural;
use crate::report::{Note, ResizeReport};
use crate::rules;
use crate::tensor::TensorSource;

use one::Known;
pub(super) use one::Resized;
pub use options::ResizeOptions;

/// Writes the adapter with other ranks. Full tensors, rows, magnitudes and bias updates stay as they are. `progress` counts the bytes that
/// are read.
///
/// # Errors
/// `U-001` for options that cannot be carried out; `A-010`, `A-012`, `P-007` for adapters whose rank means something else; `A-008` if a value
/// is not finite, `A-031` if one is not in its new dtype; `E-012` if a decomposition does not converge; `C-037` if a stated digest does not
/// match; `U-002`, `U-003`, `E-002` for the output; `E-001`, `E-004`, `E-006`. On any error the output is what it was before.
pub fn resize(adapter: &Adapter, output: &Path, options: &ResizeOptions, progress: &dyn Progress) -> Result<ResizeReport> {
    options.check(adapter)?;
    let (kind, to) = write::kind(options.to);
    check_output(output, kind, &[Path::new(adapter.label())], options.overwrite)?;
    let go_on = || if progress.cancelled() { Err(exec::interrupted()) } else { Ok(()) };
    let root = content(adapter, go_on)?;
    verify(adapter, &root)?;
    let spool = Spool::new(output)?;
    let Cut { adapter: made, resized, warnings } = cut(adapter, options, spool, progress)?;
    let step = Lineage {
        op: "resize".to_owned(),
        tool: format!("loratool {}", env!("CARGO_PKG_VERSION")),
        inputs: vec![LineageInput { role: "adapter".into(), dialect: adapter.dialect().into(), content: root.finish() }],
        parameters: json!({
            "dtype": options.dtype.map(|dtype| dtype.to_string()), "for": options.loader.map(crate::Loader::name),
            "rank": options.rank.described(), "split": options.split.name(),
        })
        .to_string(),
    };
    let place = (output, options.to, options.overwrite);
    let written = write::write(&made, adapter.base(), step, place, || adapter.unchanged(), progress)?;
    let sum = |of: &dyn Fn(&Resized) -> f64| resized.iter().map(of).sum::<f64>();
    let (norm, error) = (sum(&|r| r.norm_squared), sum(&|r| r.error_squared));
    let highest = resized.iter().map(|r| r.report.rank).max().unwrap_or(0);
    Ok(ResizeReport {
        input: adapter.label().to_owned(),
        from: adapter.dialect(),
        to,
        output: output.display().to_string(),
        error: if norm > 0.0 { (error / norm).sqrt() } else { 0.0 },
        parameters_before: adapter.parameters(),
        parameters: made.parameters(),
        room: options.loader.and_then(|_| room(highest)),
        warnings: made.warnings().iter().chain(&warnings).map(Note::from).collect(),
        targets: resized.into_iter().map(|r| r.report).collect(),
        bytes: written.bytes,
        content: written.content,
        losses: written.losses.iter().map(Note::from).collect(),
    })
}

/// An adapter of other ranks, whose factors are in a spool.
pub(super) struct Cut {
    pub(super) adapter: Adapter,
    /// What became of each target.
    pub(super) resized: Vec<Resized>,
    pub(super) warnings: Vec<Diagnostic>,
}

/// The adapter with other ranks, before it is written. `progress` counts the bytes of the factors that are read.
///
/// # Errors
/// As [`resize`], but for the output.
pub(super) fn cut(adapter: &Adapter, options: &ResizeOptions, spool: Spool, progress: &dyn Progress) -> Result<Cut> {
    let targets = adapter.targets();
    let sizes: Vec<u64> = targets.iter().map(|target| target.a.info().bytes() + target.b.info().bytes()).collect();
    progress.expect(sizes.iter().sum());
    let resized = exec::on_threads(&options.exec, || -> Result<Vec<Resized>> {
        let each = |i: usize| -> Result<()> {
            progress.advance(sizes[i]);
            if progress.cancelled() { Err(exec::interrupted()) } else { Ok(()) }
        };
        let is_budget = matches!(options.rank, RankRule::Parameters(_) | RankRule::Bytes(_));
        if !is_budget && options.loader.is_none() {
            return crew::each(&sizes, |i| each(i).and_then(|()| one::by_rule(&targets[i], options, &spool)));
        }
        let known = crew::each(&sizes, |i| each(i).and_then(|()| Known::of(&targets[i])))?;
        let ranks = ranks(targets, &known, options)?;
        crew::each(&sizes, |i| each(i).and_then(|()| one::resize(&targets[i], &known[i], ranks[i], options, &spool)))
    })?;
    let adapter = rebuilt(adapter, &resized, spool, options)?;
    let warnings = rounded(&resized, options).into_iter().collect();
    Ok(Cut { adapter, resized, warnings })
}

/// Says where the rounding of the factors has broken the promise of the rule.
fn rounded(resized: &[Resized], options: &ResizeOptions) -> Option<Diagnostic> {
    let allowed = options.rank.allowed()?;
    let over: Vec<&Resized> = resized.iter().filter(|one| is_over(one.report.error, allowed)).collect();
    let first = &over.first()?.report;
    let message = format!(
        "more than {allowed} is lost of {} because of the rounding of the factors, the first {:?} with {:.4} at rank {}",
        plural(over.len() as u64, "target"),
        first.tensor,
        first.error,
        first.rank
    );
    Some(Diagnostic::new(rules::RANK_LIMIT, message).tensor(&first.tensor).help("store them with --dtype f32, or ask for less"))
}

/// The rank of every target.
fn ranks(targets: &[Target], known: &[Known], options: &ResizeOptions) -> Result<Vec<u64>> {
    let size = |target: &Target| match options.rank {
        RankRule::Bytes(_) => exec::float_of(options.dtype.unwrap_or(target.a.info().dtype)).map_or(4, |f| f.size() as u64),
        _ => 1,
    };
    let mut ranks: Vec<u64> = match options.rank {
        RankRule::Parameters(budget) | RankRule::Bytes(budget) => {
            let cost = |target: &Target| {
                let (out, inner) = target.out_in();
                target.experts().unwrap_or(1) * (out + inner) * size(target)
            };
            let mut shares = Vec::with_capacity(targets.len());
            for (known, target) in known.iter().zip(targets) {
                shares.push(Share { values: &known.together, cost: cost(target), least: one::least(target) });
            }
            let needed: u64 = shares.iter().map(|share| share.least * share.cost).sum();
            if needed > budget {
                let message =
                    format!("the targets with magnitudes or bias updates take {needed} at rank 1, and the budget is {budget}");
                return Err(Error::new(rules::ARGUMENT, message).help("give a larger budget"));
            }
            divide(&shares, budget)
        }
        rule => known.iter().zip(targets).map(|(known, target)| known.rank(rule).max(one::least(target))).collect(),
    };
    let highest = ranks.iter().copied().max().unwrap_or(0);
    if highest == 0 {
        let message = "no component of any target is kept";
        return Err(Error::new(rules::ARGUMENT, message).help("give a higher rank, a larger share or a larger budget"));
    }
    if options.loader.is_some() {
        let Some(room) = room(highest) else {
            let message = format!("a target takes rank {highest}, for which vllm has no room");
            return Err(Error::new(rules::ARGUMENT, message).help("ask for less: 512 is its highest"));
        };
        ranks.iter_mut().zip(known).for_each(|(rank, known)| *rank = room.min(known.most()).max(*rank));
    }
    Ok(ranks)
}

/// The rank that vLLM makes room for where an adapter has this one, if it does.
fn room(rank: u64) -> Option<u64> {
    VLLM_RANKS.into_iter().find(|room| *room >= rank)
}

/// The adapter with the factors of the spool.
fn rebuilt(adapter: &Adapter, resized: &[Resized], spool: Spool, options: &ResizeOptions) -> Result<Adapter> {
    let source: Arc<dyn TensorSource> = Arc::new(spool.finish());
    let mut parts = adapter.parts().clone();
    let (mut targets, mut dropped) = (Vec::with_capacity(parts.targets.len()), Vec::new());
    for (target, resized) in parts.targets.into_iter().zip(resized) {
        let Some(scaling) = resized.scaling else {
            dropped.push(target.tensor);
            continue;
        };
        let factor = |part: &str| {
            let name = one::name(&target, part);
            Factor::new(&source, &name).ok_or_else(|| Error::new(rules::READ, "a computed factor is missing").tensor(name))
        };
        let (a, b) = (factor("A")?, factor("B")?);
        targets.push(Target { a, b, scaling, singular_values: resized.singular_values.clone(), ..target });
    }
    if let Some(first) = dropped.first() {
        let count = plural(dropped.len() as u64, "target");
        let message = format!("nothing is left of {count}, the first {first:?}");
        parts.warnings.push(Diagnostic::new(rules::ADAPTER_NOT_EMPTY, message).tensor(first));
    }
    if targets.is_empty() && parts.replacements.is_empty() && parts.rows.is_empty() && parts.rescalings.is_empty() {
        let message = "every update of the adapter is zero, so that nothing would be left";
        return Err(Error::new(rules::ADAPTER_NOT_EMPTY, message).file(adapter.label()).help("it does nothing: leave it out"));
    }
    parts.targets = targets;
    parts.origin_config = None;
    parts.digests.clear();
    parts.content = None;
    Adapter::new(parts, &options.limits)
}

//! `compare`: how two adapters lie to each other, and what their sum would cost, before it is made. From the factors alone: no update is formed.

mod control;
mod figures;
mod verdict;

use std::collections::BTreeMap;

use super::combine::{Weights, align, renamed};
use super::crew;
use super::spectrum::spectrum;
use crate::adapter::Adapter;
use crate::checkpoint::Checkpoint;
use crate::error::{Diagnostic, Error, Result};
use crate::exec::{self, ExecOptions, Progress};
use crate::limits::Limits;
use crate::plan::BindOptions;
use crate::report::text::plural;
use crate::report::{CompareReport, ComparedTarget, Note, Truncation};
use crate::rules;

use figures::{Figures, One};

/// How to compare.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct CompareOptions {
    /// What may be relaxed where the adapters are held against a base. Its prefix renames the targets of both, with or without one.
    pub bind: BindOptions,
    /// Threads.
    pub exec: ExecOptions,
    /// Bounds on input.
    pub limits: Limits,
}

/// Compares two adapters. With a base also how large their updates are beside its weights, which are then read.
///
/// # Errors
/// `A-020`, `A-023`, `A-024`, `P-007`, `A-010` for adapters that are not of one base; `A-008` if a value is not finite; `E-012` if a
/// decomposition does not converge; what [`Binding::new`](crate::Binding::new) finds if there is a base; `E-001`, `E-004`, `E-006`.
pub fn compare(
    adapters: [&Adapter; 2],
    base: Option<&Checkpoint>,
    options: &CompareOptions,
    progress: &dyn Progress,
) -> Result<CompareReport> {
    let renamed = match &options.bind.prefix {
        None => None,
        Some((from, to)) => {
            Some([renamed(adapters[0], (from, to), &options.limits)?, renamed(adapters[1], (from, to), &options.limits)?])
        }
    };
    let adapters = renamed.as_ref().map_or(adapters, |both| both.each_ref());
    let weights = Weights::new(vec![1.0, 1.0], &[])?;
    let sums = align(&adapters, &[0, 1], &weights)?;
    let (shared, single): (Vec<_>, Vec<_>) = sums.iter().partition(|sum| sum.parts.len() == 2);
    let only = |adapter: usize| -> Vec<String> {
        single.iter().filter(|sum| sum.parts.iter().any(|part| part.adapter == adapter)).map(|sum| sum.tensor.clone()).collect()
    };
    let parts: Vec<(usize, u64)> =
        shared.iter().enumerate().flat_map(|(place, sum)| (0..sum.experts()).map(move |expert| (place, expert))).collect();
    let sizes: Vec<u64> =
        parts.iter().map(|(place, _)| shared[*place].rank() * (shared[*place].out_in().0 + shared[*place].out_in().1)).collect();
    progress.expect(sizes.iter().sum());
    let found = exec::on_threads(&options.exec, || {
        crew::each(&sizes, |i| {
            progress.advance(sizes[i]);
            if progress.cancelled() {
                return Err(exec::interrupted());
            }
            let (place, expert) = parts[i];
            One::of(shared[place], expert)
        })
    })?;
    let relative = base.map(|base| relatives(adapters, base, options, progress)).transpose()?;
    let (mut all, mut control) = (Figures::default(), Figures::default());
    let mut targets: Vec<(String, Figures)> = Vec::new();
    for ((place, _), one) in parts.iter().zip(found) {
        let tensor = &shared[*place].tensor;
        if targets.last().is_none_or(|(name, _)| name != tensor) {
            targets.push((tensor.clone(), Figures::default()));
        }
        if let Some((_, figures)) = targets.last_mut() {
            figures.add(&one.real);
        }
        all.add(&one.real);
        control.add(&one.random);
    }
    let together = all.overlap();
    let chance = all.chance();
    let relation = verdict::relation(&all, &together);
    let verdict = match adapters.iter().find(|adapter| adapter.targets().is_empty()) {
        Some(adapter) => format!("nothing can be said: {} has no low-rank updates", adapter.label()),
        None => verdict::sentence(relation, &together, chance, &all),
    };
    let target = |(tensor, figures): (String, Figures)| ComparedTarget {
        ranks: figures.ranks,
        overlap: figures.overlap(),
        output_angle: figures.angles[0],
        input_angle: figures.angles[1],
        rank_10: figures.rank_for(0.1),
        relative: relative.as_ref().and_then(|all| all.get(&tensor).copied()),
        tensor,
    };
    Ok(CompareReport {
        adapters: adapters.map(|adapter| adapter.label().to_owned()),
        verdict,
        relation,
        control: (!targets.is_empty()).then(|| control.overlap()),
        together,
        chance,
        truncation: all.truncation().map(|(rank, error)| Truncation { rank, error }).collect(),
        rank_10: all.rank_for(0.1),
        rank_1: all.rank_for(0.01),
        output_similarity: all.similarity(0),
        input_similarity: all.similarity(1),
        targets: targets.into_iter().map(target).collect(),
        only_first: only(0),
        only_second: only(1),
        warnings: adapters
            .iter()
            .flat_map(|one| one.warnings().iter().cloned().chain(beside(one)))
            .map(|d| Note::from(&d))
            .collect(),
    })
}

/// What an adapter has that is no low-rank update, and is not compared.
fn beside(adapter: &Adapter) -> Option<Diagnostic> {
    let biases = adapter.targets().iter().filter(|target| target.bias.is_some()).count();
    let magnitudes = adapter.targets().iter().filter(|target| target.magnitude.is_some()).count();
    let counts = [
        (adapter.replacements().len(), "full tensor"),
        (adapter.rows().len(), "tensor with replaced rows"),
        (adapter.rescalings().len(), "multiplied tensor"),
        (magnitudes, "magnitude vector"),
        (biases, "bias update"),
    ];
    let held: Vec<String> =
        counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| plural(*count as u64, what)).collect();
    let message = format!("only low-rank updates are compared, and it has more: {}", held.join(", "));
    (!held.is_empty()).then(|| Diagnostic::new(rules::METHOD_SUPPORTED, message).file(adapter.label()))
}

/// ‖Δ‖/‖W‖ of both adapters, by tensor.
fn relatives(
    adapters: [&Adapter; 2],
    base: &Checkpoint,
    options: &CompareOptions,
    progress: &dyn Progress,
) -> Result<BTreeMap<String, [f64; 2]>> {
    let mut all: BTreeMap<String, [f64; 2]> = BTreeMap::new();
    let bind = BindOptions { prefix: None, ..options.bind.clone() };
    for (place, adapter) in adapters.into_iter().enumerate() {
        let found = spectrum(adapter, Some(base), &bind, &options.limits, &options.exec, progress)?;
        for update in found.updates {
            let Some(relative) = update.relative else { continue };
            if let Some(slot) = all.entry(update.tensor).or_default().get_mut(place) {
                // Of a stack the largest.
                *slot = slot.max(relative);
            }
        }
    }
    Ok(all)
}

/// The error of a matrix without a decomposition.
fn diverged(tensor: &str) -> Error {
    let message = format!("no singular value decomposition of {tensor:?} was found: it does not converge");
    Error::new(rules::DECOMPOSED, message).tensor(tensor)
}

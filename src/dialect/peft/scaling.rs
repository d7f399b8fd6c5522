//! Rank and alpha of every module, from the config's defaults and patterns.

use super::config::PeftConfig;
use super::patterns::Modules;
use crate::adapter::Scaling;
use crate::error::Diagnostic;
use crate::limits::Limits;
use crate::rules;

/// What the config says about one module.
pub(super) struct Resolved {
    pub(super) scaling: Scaling,
    /// The field or key that the rank comes from, for messages.
    pub(super) rank_from: String,
}

/// Resolves every module. Patterns that match nothing are problems (PEFT warns and goes on: the trainer meant something); an alpha
/// that depends on the order of patterns is a warning.
pub(super) fn resolve(
    config: &PeftConfig,
    modules: &Modules<'_>,
    names: &[&str],
    limits: &Limits,
    problems: &mut Vec<Diagnostic>,
    warnings: &mut Vec<Diagnostic>,
) -> Vec<Resolved> {
    let ranks = modules.resolve("rank_pattern", &config.rank_pattern, limits, problems);
    let alphas = modules.resolve("alpha_pattern", &config.alpha_pattern, limits, problems);
    // A pattern that could not be run has matched nothing either; one report is enough.
    if problems.iter().all(|p| p.rule() != rules::PATTERN_REGEX && p.rule() != rules::CONFIG_LIMIT) {
        unused("rank_pattern", config.rank_pattern.iter().map(|(k, _)| k), &ranks.used, problems);
        unused("alpha_pattern", config.alpha_pattern.iter().map(|(k, _)| k), &alphas.used, problems);
    }
    // PEFT sorts the keys when it saves, so the key that wins now may not be the one that won in training. For ranks the tensors
    // tell; for alphas nothing does.
    let rivals = names.iter().zip(alphas.winner.iter().zip(&alphas.rival));
    if let Some((name, winner, rival)) = rivals.filter_map(|(name, (w, r))| Some((name, (*w)?, (*r)?))).next() {
        let key = |i: usize| config.alpha_pattern.get(i).map_or("", |(key, _)| key.as_str());
        let message =
            format!("{name:?} matches the alpha_pattern keys {:?} and {:?}; the first one counts", key(winner), key(rival));
        let help = "PEFT sorts the keys when it saves, so training may have used the other one; check the scale";
        warnings.push(Diagnostic::new(rules::PATTERN_USED, message).tensor("alpha_pattern").help(help));
    }
    let both = ranks.winner.iter().zip(&alphas.winner);
    both.map(|(rank, alpha)| {
        let by_rank = rank.and_then(|i| config.rank_pattern.get(i));
        let alpha = alpha.and_then(|i| config.alpha_pattern.get(i)).map_or(config.alpha, |(_, alpha)| *alpha);
        let rank = by_rank.map_or(config.rank, |(_, rank)| *rank);
        Resolved {
            scaling: Scaling { rank, alpha, rule: config.rule },
            rank_from: by_rank.map_or_else(|| "r".to_owned(), |(key, _)| format!("rank_pattern key {key:?}")),
        }
    })
    .collect()
}

fn unused<'a>(field: &str, keys: impl Iterator<Item = &'a String>, used: &[bool], problems: &mut Vec<Diagnostic>) {
    for (key, _) in keys.zip(used).filter(|(_, used)| !**used) {
        let message = format!("{field} key {key:?} matches no module of the adapter");
        let help = "PEFT would use the default in silence; correct the key, or remove it";
        problems.push(Diagnostic::new(rules::PATTERN_USED, message).tensor(field).help(help));
    }
}

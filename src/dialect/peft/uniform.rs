//! One rank, one alpha and one scaling rule for a whole adapter, with the exceptions: what a PEFT config is made of.

use std::collections::BTreeMap;

use crate::adapter::{Scaling, ScalingRule, Target};
use crate::error::{Error, Result};
use crate::rules;

/// The defaults, and the values of each target in the order of the adapter.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Uniform {
    pub(super) rule: ScalingRule,
    pub(super) rank: u64,
    pub(super) alpha: f64,
    pub(super) ranks: Vec<u64>,
    pub(super) alphas: Vec<f64>,
    /// Targets whose alpha was restated for the common rule.
    pub(super) folded: usize,
}

/// The most frequent rank and alpha as defaults, under the rule of most targets; under the other one if some scale cannot be
/// stated exactly under the first.
///
/// # Errors
/// `P-006` if neither rule states every scale exactly.
pub(super) fn of(targets: &[Target]) -> Result<Uniform> {
    let scalings: Vec<Scaling> = targets.iter().map(|target| target.scaling).collect();
    let stabilized = scalings.iter().filter(|s| s.rule == ScalingRule::RankStabilized).count();
    let mut candidates = [ScalingRule::Standard, ScalingRule::RankStabilized];
    if stabilized * 2 > scalings.len() {
        candidates.reverse();
    }
    let Some((rule, alphas)) = candidates.into_iter().find_map(|rule| {
        let alphas: Option<Vec<f64>> = scalings.iter().map(|scaling| restate(scaling, rule)).collect();
        Some((rule, alphas?))
    }) else {
        let message = "targets follow different scaling rules, and PEFT's one rule cannot state all of their scales exactly";
        return Err(Error::new(rules::CONFIG_METHOD, message));
    };
    let ranks: Vec<u64> = scalings.iter().map(|scaling| scaling.rank).collect();
    let rank = most_frequent(ranks.iter().copied()).unwrap_or(1);
    let alpha = most_frequent(alphas.iter().map(|alpha| alpha.to_bits())).map_or(1.0, f64::from_bits);
    let folded = scalings.iter().filter(|scaling| scaling.rule != rule).count();
    Ok(Uniform { rule, rank, alpha, ranks, alphas, folded })
}

/// The alpha that gives the same effective scale, to the last bit, under `rule`.
fn restate(scaling: &Scaling, rule: ScalingRule) -> Option<f64> {
    if scaling.rule == rule {
        return Some(scaling.alpha);
    }
    let scale = scaling.effective();
    let rank = scaling.rank as f64;
    let guess = scale * if rule == ScalingRule::Standard { rank } else { rank.sqrt() };
    // Rounding the product here and the quotient there each cost less than one step.
    let near = [guess, guess.next_up(), guess.next_down(), guess.next_up().next_up(), guess.next_down().next_down()];
    let exact = |alpha: &f64| alpha.is_finite() && Scaling { alpha: *alpha, rule, ..*scaling }.effective() == scale;
    near.into_iter().find(exact)
}

/// The value that occurs most often, the smallest of several.
fn most_frequent<V: Ord>(values: impl Iterator<Item = V>) -> Option<V> {
    let mut counts: BTreeMap<V, usize> = BTreeMap::new();
    for value in values {
        *counts.entry(value).or_default() += 1;
    }
    counts.into_iter().rev().max_by_key(|(_, count)| *count).map(|(value, _)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restated_alpha_gives_the_same_scale() {
        for rank in [1, 2, 3, 4, 6, 7, 8, 12, 16, 64, 100, 256] {
            for alpha in [1.0, 5.0, 8.0, 16.0, 0.1, -3.0] {
                for (from, to) in
                    [(ScalingRule::Standard, ScalingRule::RankStabilized), (ScalingRule::RankStabilized, ScalingRule::Standard)]
                {
                    let scaling = Scaling { rank, alpha, rule: from };
                    // Where no alpha does it, none is given.
                    if let Some(alpha) = restate(&scaling, to) {
                        assert_eq!(Scaling { rank, alpha, rule: to }.effective(), scaling.effective());
                    }
                }
            }
        }
        let sixteen = Scaling { rank: 16, alpha: 8.0, rule: ScalingRule::RankStabilized };
        assert_eq!(restate(&sixteen, ScalingRule::Standard), Some(32.0));
    }

    #[test]
    fn the_most_frequent_value_is_the_smallest_of_several() {
        assert_eq!(most_frequent([3, 1, 3, 1, 2].into_iter()), Some(1));
        assert_eq!(most_frequent([3, 1, 3].into_iter()), Some(3));
        assert_eq!(most_frequent(std::iter::empty::<u8>()), None);
    }
}

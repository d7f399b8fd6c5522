//! How many components of a change are kept, by a rule for one target or by a budget for all of them.

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::kernel::lowrank::Want;
use crate::rules;

/// How the rank of each target is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RankRule {
    /// The same for all; less where a target has less.
    Fixed(u64),
    /// The smallest that keeps this share of ‖D‖², between 0 and 1.
    Energy(f64),
    /// The smallest that leaves at most this share of ‖D‖, between 0 and 1.
    Error(f64),
    /// Ranks whose factors have at most so many values together, with the smallest error over all targets.
    Parameters(u64),
    /// Likewise, in bytes of the factors.
    Bytes(u64),
    /// As many components as stand out of the noise that rounding to the file's dtype has added.
    Auto,
}

impl RankRule {
    /// Refuses numbers that no rank follows from.
    ///
    /// # Errors
    /// `U-001`.
    pub(super) fn check(self) -> Result<()> {
        let refuse = |message: String| Err(Error::new(rules::ARGUMENT, message));
        match self {
            RankRule::Fixed(0) => refuse("a rank of 0 keeps nothing".to_owned()),
            RankRule::Parameters(0) | RankRule::Bytes(0) => refuse("a budget of 0 keeps nothing".to_owned()),
            RankRule::Energy(share) if !(share > 0.0 && share <= 1.0) => {
                refuse(format!("the share of the energy is {share}, and has to be above 0 and at most 1"))
            }
            RankRule::Error(share) if !(share > 0.0 && share < 1.0) => {
                refuse(format!("the relative error is {share}, and has to be between 0 and 1"))
            }
            _ => Ok(()),
        }
    }

    /// As it stands in a lineage.
    pub(super) fn described(self) -> Value {
        match self {
            RankRule::Fixed(rank) => json!({ "rank": rank }),
            RankRule::Energy(share) => json!({ "energy": share }),
            RankRule::Error(share) => json!({ "error": share }),
            RankRule::Parameters(budget) => json!({ "budget_parameters": budget }),
            RankRule::Bytes(budget) => json!({ "budget_bytes": budget }),
            RankRule::Auto => json!("auto"),
        }
    }

    /// The relative error that each target may have, if the rule says so.
    pub(super) fn allowed(self) -> Option<f64> {
        match self {
            RankRule::Error(share) => Some(share),
            RankRule::Energy(share) => Some((1.0 - share).max(0.0).sqrt()),
            _ => None,
        }
    }

    /// The rank for one target by its singular values as far as they are known, largest first, under a cap; `edge` is the largest value that
    /// noise has. `None` for a budget, which no target has by itself.
    pub(super) fn want(self, values: &[f64], norm_squared: f64, edge: f64, cap: usize) -> Option<Want> {
        let known = |rank: Option<usize>| match rank {
            Some(rank) => Want::Rank(rank.min(cap)),
            None if values.len() >= cap => Want::Rank(cap),
            None => Want::More,
        };
        Some(match self {
            RankRule::Fixed(rank) => Want::Rank(usize::try_from(rank).unwrap_or(cap).min(cap)),
            RankRule::Energy(share) => known(enough(values, share * norm_squared)),
            RankRule::Error(share) => known(enough(values, (1.0 - share * share) * norm_squared)),
            RankRule::Auto => {
                let count = values.iter().take_while(|value| **value > edge).count();
                known((count < values.len()).then_some(count))
            }
            RankRule::Parameters(_) | RankRule::Bytes(_) => return None,
        })
    }
}

/// Whether an error is more than a rule allows, and not by the rounding of f32 alone.
pub(super) fn is_over(error: f64, allowed: f64) -> bool {
    error > allowed * (1.0 + 1e-3) + 1e-6
}

/// The smallest number of values whose squares add up to `wanted`.
fn enough(values: &[f64], wanted: f64) -> Option<usize> {
    let mut sum = 0.0;
    // What rounding leaves of a sum that ought to be all of it.
    let wanted = wanted * (1.0 - 1e-12);
    values
        .iter()
        .position(|value| {
            sum += value * value;
            sum >= wanted
        })
        .map(|at| at + 1)
}

/// One target in the division of a budget.
pub(super) struct Share<'s> {
    /// Singular values, largest first.
    pub(super) values: &'s [f64],
    /// Values of both factors that one more component takes.
    pub(super) cost: u64,
    /// The rank that it has in any case, also beyond the budget.
    pub(super) least: u64,
}

/// Ranks that keep the most of Σ S² for at most `budget` values of factors: the components in the order of S² for each value. What one
/// component gains falls with the rank, so the greedy order is the best for every size that it passes through, and the end is off by at
/// most the first component that has no room.
pub(super) fn divide(shares: &[Share<'_>], budget: u64) -> Vec<u64> {
    let of = |target: usize, share: &Share<'_>| {
        let gain = |value: &f64| value * value / share.cost.max(1) as f64;
        share.values.iter().skip(share.least as usize).map(gain).map(move |gain| (gain, target)).collect::<Vec<_>>()
    };
    let mut order: Vec<(f64, usize)> = shares.iter().enumerate().flat_map(|(i, share)| of(i, share)).collect();
    order.retain(|(gain, _)| *gain > 0.0);
    order.sort_by(|x, y| y.0.total_cmp(&x.0).then(x.1.cmp(&y.1)));
    let mut ranks: Vec<u64> = shares.iter().map(|share| share.least).collect();
    let spent = shares.iter().fold(0u64, |sum, share| sum.saturating_add(share.least.saturating_mul(share.cost)));
    let (mut full, mut left) = (vec![false; shares.len()], budget.saturating_sub(spent));
    for (_, target) in order {
        let cost = shares[target].cost;
        // A later component of a target has no use without the one before it.
        if full[target] || cost > left {
            full[target] = true;
            continue;
        }
        left -= cost;
        ranks[target] += 1;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rules_count_components() {
        let values = [4.0, 2.0, 1.0, 0.5];
        let norm = 21.5;
        let want = |rule: RankRule, cap| rule.want(&values, norm, 0.75, cap).unwrap();
        assert_eq!(want(RankRule::Fixed(3), 99), Want::Rank(3));
        assert_eq!(want(RankRule::Fixed(3), 2), Want::Rank(2));
        assert_eq!(want(RankRule::Energy(16.0 / 21.5), 99), Want::Rank(1));
        assert_eq!(want(RankRule::Energy(0.75), 99), Want::Rank(2));
        assert_eq!(want(RankRule::Energy(1.0), 99), Want::More);
        assert_eq!(want(RankRule::Energy(1.0), 4), Want::Rank(4));
        assert_eq!(want(RankRule::Error((1.5f64 / 21.5).sqrt()), 99), Want::Rank(2));
        assert_eq!(want(RankRule::Auto, 99), Want::Rank(3));
        assert_eq!(RankRule::Auto.want(&values, norm, 0.1, 99), Some(Want::More));
    }

    proptest! {
        /// Against all divisions there are: none keeps more than this one and the first component that had no room.
        #[test]
        fn no_division_of_a_budget_keeps_more_but_for_one_component(
            one in proptest::collection::vec(0.01f64..9.0, 3), two in proptest::collection::vec(0.01f64..9.0, 3), costs in (1u64..5, 1u64..5),
        ) {
            let sorted = |mut values: Vec<f64>| { values.sort_by(|x, y| y.total_cmp(x)); values };
            let (one, two) = (sorted(one), sorted(two));
            let shares = [Share { values: &one, cost: costs.0, least: 0 }, Share { values: &two, cost: costs.1, least: 0 }];
            let kept = |ranks: [usize; 2]| one[..ranks[0]].iter().chain(&two[..ranks[1]]).map(|v| v * v).sum::<f64>();
            for budget in 0..24 {
                let ranks = divide(&shares, budget);
                let size = |r: [u64; 2]| r[0] * costs.0 + r[1] * costs.1;
                prop_assert!(size([ranks[0], ranks[1]]) <= budget);
                let next = |values: &[f64], rank: u64| values.get(rank as usize).map_or(0.0, |v| v * v);
                let most = kept([ranks[0] as usize, ranks[1] as usize]) + next(&one, ranks[0]).max(next(&two, ranks[1]));
                for i in 0..4u64 {
                    for j in (0..4u64).filter(|j| size([i, *j]) <= budget) {
                        prop_assert!(kept([i as usize, j as usize]) <= most + 1e-9);
                    }
                }
            }
        }
    }
}

//! Which values of an update are kept, and what they are multiplied by: what comes before the values of several updates are added up.

use super::super::stochastic::unit;
use super::ties::Cut;

/// Which values of an update are kept, for one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Keep {
    /// All.
    All,
    /// By falling size, those from behind `first` on up to `last`.
    Between { first: Option<Cut>, last: Cut },
    /// Each with this probability, and then divided by it (DARE, Yu et al. 2023, section 3.2).
    ByChance { density: f64, key: u64 },
    /// Each with a probability that rises with its size among those of its row, from `density - epsilon / 2` to `density + epsilon / 2`, and
    /// then divided by it (DELLA, Deep et al. 2024, section 3.1).
    ByRank { density: f64, epsilon: f64, key: u64 },
}

impl Keep {
    /// Drops what is not kept of one row, and multiplies the rest. Its first value has the index `first` in the update, and each one after it
    /// an index that is higher by `stride`.
    pub(crate) fn row(self, row: &mut [f64], first: u64, stride: u64) {
        let indices = (0..).map(|place| first + place * stride);
        match self {
            Keep::All => {}
            Keep::Between { first: before, last } => {
                let end = first + row.len().saturating_sub(1) as u64 * stride;
                let above = before.map_or(Some(f64::INFINITY), |cut| cut.bound(first, end));
                if let (Some(low), Some(high)) = (last.bound(first, end), above) {
                    row.iter_mut().for_each(|x| *x = if (x.abs() > low) & (x.abs() <= high) { *x } else { 0.0 });
                    return;
                }
                for (value, index) in row.iter_mut().zip(indices) {
                    if !last.keeps(*value, index) || before.is_some_and(|cut| cut.keeps(*value, index)) {
                        *value = 0.0;
                    }
                }
            }
            Keep::ByChance { density, key } => {
                for (value, index) in row.iter_mut().zip(indices) {
                    *value = if unit(key, index) < density { *value / density } else { 0.0 };
                }
            }
            Keep::ByRank { density, epsilon, key } => {
                let mut order: Vec<usize> = (0..row.len()).collect();
                order.sort_unstable_by(|x, y| row[*x].abs().total_cmp(&row[*y].abs()).then(x.cmp(y)));
                let last = (row.len().max(2) - 1) as f64;
                for (rank, place) in order.into_iter().enumerate() {
                    let probability = density + epsilon * (rank as f64 / last - 0.5);
                    let value = &mut row[place];
                    *value = if unit(key, first + place as u64 * stride) < probability { *value / probability } else { 0.0 };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn between_two_cuts_the_largest_and_the_smallest_are_dropped() {
        let values = [5.0, -1.0, 3.0, 0.5, -4.0, 2.0];
        let keep = |first: Option<usize>, last: usize| {
            let cut = |count| Cut::of(&values, count).unwrap();
            let mut row = values;
            Keep::Between { first: first.map(cut), last: cut(last) }.row(&mut row, 0, 1);
            row
        };
        assert_eq!(keep(None, 3), [5.0, 0.0, 3.0, 0.0, -4.0, 0.0]);
        assert_eq!(keep(Some(1), 4), [0.0, 0.0, 3.0, 0.0, -4.0, 2.0]);
    }

    #[test]
    fn chance_keeps_the_mean() {
        let (len, density) = (40_000, 0.3);
        let mean = |keep: Keep| {
            let mut row: Vec<f64> = (0..len).map(|i| 1.0 + (i % 7) as f64).collect();
            let before: f64 = row.iter().sum();
            keep.row(&mut row, 9, 1);
            (row.iter().sum::<f64>() / before, row.iter().filter(|x| **x != 0.0).count() as f64 / len as f64)
        };
        for keep in [Keep::ByChance { density, key: 5 }, Keep::ByRank { density, epsilon: 0.2, key: 5 }] {
            let (sum, share) = mean(keep);
            assert!((sum - 1.0).abs() < 0.03 && (share - density).abs() < 0.01, "{keep:?}: {sum} {share}");
        }
        assert_ne!(mean(Keep::ByChance { density, key: 5 }), mean(Keep::ByChance { density, key: 6 }));
        // Large values are kept more often than small ones.
        let mut row: Vec<f64> = (0..len).map(|i| i as f64 + 1.0).collect();
        Keep::ByRank { density: 0.5, epsilon: 0.8, key: 1 }.row(&mut row, 0, 1);
        let kept = |part: &[f64]| part.iter().filter(|x| **x != 0.0).count();
        assert!(kept(&row[..4000]) < 800 && kept(&row[len as usize - 4000..]) > 3200);
    }
}

//! A method that makes one update of several value by value: what it drops of each, and how what is left becomes one value.

use super::prune::Keep;
use super::select::{Reading, cut};
use super::ties::kept;

/// A method that works on single values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ByValue {
    pub(crate) drops: Drops,
    pub(crate) tally: Tally,
}

/// What is dropped of an update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Drops {
    Nothing,
    /// All but this share, the largest.
    Small {
        density: f64,
    },
    /// The share `outliers` of the largest, and all but `density` of the rest.
    SmallAndLarge {
        density: f64,
        outliers: f64,
    },
    /// See [`Keep::ByChance`].
    ByChance {
        density: f64,
        seed: u64,
    },
    /// See [`Keep::ByRank`].
    ByRank {
        density: f64,
        epsilon: f64,
        seed: u64,
    },
}

/// How the values of several updates become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tally {
    /// Their sum.
    Sum,
    /// The mean of those that have the sign of their sum, before the weights where these are still to come.
    Elected,
    /// The mean of those that have the sign that most have.
    MostSigns,
}

impl Drops {
    /// What is kept of an update of `len` values. `key` makes a key of the seed.
    ///
    /// # Errors
    /// Those of reading the update.
    pub(crate) fn keep<R: Reading>(self, update: &R, len: u64, key: impl Fn(u64) -> u64) -> Result<Keep, R::Error> {
        Ok(match self {
            Drops::Small { density } if density < 1.0 => Keep::Between { first: None, last: cut(update, kept(density, len))? },
            Drops::SmallAndLarge { density, outliers } => {
                let kept = kept(density, len);
                let dropped = ((outliers * len as f64) as u64).min(len.saturating_sub(kept));
                let first = if dropped > 0 { Some(cut(update, dropped)?) } else { None };
                Keep::Between { first, last: cut(update, dropped + kept)? }
            }
            Drops::ByChance { density, seed } if density < 1.0 => Keep::ByChance { density, key: key(seed) },
            Drops::ByRank { density, epsilon, seed } => Keep::ByRank { density, epsilon, key: key(seed) },
            Drops::Nothing | Drops::Small { .. } | Drops::ByChance { .. } => Keep::All,
        })
    }
}

/// Values that are tallied together.
const BLOCK: usize = 256;

impl Tally {
    /// One update of several, each with its weight and as many values as `out`. Sums are taken in the order of the updates.
    pub(crate) fn of(self, updates: &[(f64, &[f64])], out: &mut [f64]) {
        match self {
            Tally::Sum => {
                out.fill(0.0);
                for (weight, values) in updates {
                    out.iter_mut().zip(*values).for_each(|(sum, value)| *sum += weight * value);
                }
            }
            Tally::Elected => agreed(updates, |value| value, out),
            Tally::MostSigns => agreed(updates, |value| if value == 0.0 { 0.0 } else { value.signum() }, out),
        }
    }
}

/// The mean of the values whose votes have the sign of the sum of all votes; + if that is 0. Votes of 0 have none. Each step is a loop of its
/// own, as that is what the compiler vectorises.
fn agreed(updates: &[(f64, &[f64])], vote: impl Fn(f64) -> f64, out: &mut [f64]) {
    for (i, out) in out.chunks_mut(BLOCK).enumerate() {
        let parts = || updates.iter().map(|(weight, values)| (weight, &values[i * BLOCK..i * BLOCK + out.len()]));
        let (mut total, mut sum, mut count) = ([0.0; BLOCK], [0.0; BLOCK], [0.0; BLOCK]);
        for (_, values) in parts() {
            total.iter_mut().zip(values).for_each(|(total, value)| *total += vote(*value));
        }
        let sign = total.map(|total| if total >= 0.0 { 1.0 } else { -1.0 });
        for (weight, values) in parts() {
            for (((sum, count), sign), value) in sum.iter_mut().zip(&mut count).zip(&sign).zip(values) {
                // Half of the values agree, so that a branch would be taken by chance.
                let mask = 0u64.wrapping_sub(u64::from(vote(*value) * sign > 0.0));
                *sum += f64::from_bits((weight * value).to_bits() & mask);
                *count += f64::from_bits(1f64.to_bits() & mask);
            }
        }
        // Of none the sum is 0.
        out.iter_mut().zip(sum.iter().zip(count)).for_each(|(out, (sum, count))| *out = sum / f64::max(count, 1.0));
    }
}

/// The key of what is left to chance: another one for each seed, tensor, matrix of a stack and adapter, whatever the order of the adapters is
/// (FNV-1a, 64 bits). `root` is the adapter's content root.
pub(crate) fn key(seed: u64, tensor: &str, slice: u64, root: &str) -> u64 {
    let bytes = seed.to_le_bytes().into_iter().chain(slice.to_le_bytes()).chain(tensor.bytes()).chain(root.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of updates with a weight and one value each.
    fn one(tally: Tally, updates: &[(f64, f64)]) -> f64 {
        let terms: Vec<(f64, &[f64])> = updates.iter().map(|(weight, value)| (*weight, std::slice::from_ref(value))).collect();
        let mut out = [7.0];
        tally.of(&terms, &mut out);
        out[0]
    }

    #[test]
    fn what_agrees_with_the_sum_is_averaged() {
        let of = |values: &[f64]| one(Tally::Elected, &values.iter().map(|value| (1.0, *value)).collect::<Vec<_>>());
        assert_eq!(of(&[3.0, 1.0, -2.0]), 2.0);
        assert_eq!(of(&[1.0, -4.0, 0.0, -2.0]), -3.0);
        assert_eq!(of(&[1.0, -1.0]), 1.0);
        assert_eq!((of(&[0.0, 0.0]), of(&[])), (0.0, 0.0));
        // Votes have no weight: -3 and -1 outvote 1, and -5 * -3 and -1 * -1 are averaged.
        assert_eq!(one(Tally::Elected, &[(-2.0, 1.0), (-5.0, -3.0), (-1.0, -1.0)]), 8.0);
        assert_eq!(one(Tally::MostSigns, &[(1.0, 5.0), (1.0, -1.0), (1.0, -2.0)]), -1.5);
        assert_eq!(one(Tally::Sum, &[(2.0, 5.0), (-1.0, 1.0)]), 9.0);
    }

    #[test]
    fn every_place_of_a_long_tile_is_tallied_alike() {
        let len = 2 * BLOCK + 3;
        let wave = |by: f64| (0..len).map(|i| (by * i as f64).sin()).collect::<Vec<f64>>();
        let updates = [wave(0.3), wave(1.1), wave(2.7)];
        let terms: Vec<(f64, &[f64])> =
            updates.iter().zip([1.0, 0.5, -2.0]).map(|(values, weight)| (weight, &values[..])).collect();
        for tally in [Tally::Sum, Tally::Elected, Tally::MostSigns] {
            let mut out = vec![0.0; len];
            tally.of(&terms, &mut out);
            let single = |i: usize| terms.iter().map(|(weight, values)| (*weight, values[i])).collect::<Vec<_>>();
            assert!((0..len).all(|i| out[i] == one(tally, &single(i))), "{tally:?}");
        }
    }
}

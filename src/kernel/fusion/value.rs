//! A method that makes one update of several value by value: what it drops of each, and how what is left becomes one value.

use super::prune::Keep;
use super::select::{Reading, cut};
use super::ties::{agreed, kept};

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

impl Tally {
    /// One value of several updates, each as its vote and as what it adds.
    #[inline(always)]
    pub(crate) fn of(self, values: impl Iterator<Item = (f64, f64)> + Clone) -> f64 {
        match self {
            Tally::Sum => values.map(|(_, value)| value).sum(),
            Tally::Elected => agreed(values),
            Tally::MostSigns => {
                let sign = |x: f64| if x == 0.0 { 0.0 } else { x.signum() };
                agreed(values.map(|(vote, value)| (sign(vote), value)))
            }
        }
    }
}

/// The key of what is left to chance: another one for each seed, tensor, matrix of a stack and adapter, whatever the order of the adapters is
/// (FNV-1a, 64 bits). `root` is the adapter's content root.
pub(crate) fn key(seed: u64, tensor: &str, slice: u64, root: &str) -> u64 {
    let bytes = seed.to_le_bytes().into_iter().chain(slice.to_le_bytes()).chain(tensor.bytes()).chain(root.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

//! How far subtracting an update is from what was there before it was added. M = round(W + D) is known, W is not: R = round(M − D) is W
//! again unless M has coarser steps than R. For |W − (M − D)| ≤ ½ step(M) by what rounding is; if that and |R − (M − D)| together are less
//! than the step of the format at R, no other value of the format than R can be W.

use rayon::prelude::*;

use super::compare::{BLOCK, Scratch, load_origin, parts, update};
use super::load::float_of;
use super::measure::unit;
use super::run::{Progress, interrupted};
use crate::error::Result;
use crate::kernel::Float;
use crate::plan::{Change, Plan};

/// What is known of restored values; of two parts it adds up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Restored {
    pub(crate) values: u64,
    /// Values that are certain to be what they were.
    pub(crate) certain: u64,
    /// A bound on ‖R − W‖², of the values that are not.
    pub(crate) error: f64,
    /// ‖R‖².
    pub(crate) size: f64,
}

impl Restored {
    fn plus(self, other: Restored) -> Restored {
        Restored {
            values: self.values + other.values,
            certain: self.certain + other.certain,
            error: self.error + other.error,
            size: self.size + other.size,
        }
    }

    /// M as stored and R as computed, in f64, with the sum `r` = M − D that R is rounded from.
    fn value(&mut self, stored: Float, m: f64, r: f64, restored: f64) {
        let (coarse, fine) = (unit(stored, m.abs()), below(stored, restored.abs()));
        self.values += 1;
        self.size += restored * restored;
        // 2⁻²⁰ covers the rounding of r. F64 has no wider format to compute it in.
        let sure = coarse <= fine && (r - restored).abs() < 0.5 * fine * (1.0 - 2f64.powi(-20)) && stored != Float::F64;
        if sure {
            self.certain += 1;
        } else {
            let bound = 0.5 * coarse + 0.5 * unit(stored, restored.abs().max(r.abs()));
            self.error += bound * bound;
        }
    }
}

/// The distance from a positive number of the format to the next smaller one.
fn below(stored: Float, x: f64) -> f64 {
    let step = unit(stored, x);
    // Below a power of two the steps are half as long, but for the smallest.
    unit(stored, x - 0.5 * step)
}

/// What subtracting restores, of all changes of a plan whose weights are those of the merge, negated.
///
/// # Errors
/// `E-001`, `E-004`, `A-008`, `E-006`.
pub(crate) fn restored(plan: &Plan<'_>, progress: &dyn Progress) -> Result<Restored> {
    let each: Result<Vec<_>> = plan.changes().map(|change| of_change(plan, change, progress)).collect();
    Ok(each?.into_iter().fold(Restored::default(), Restored::plus))
}

fn of_change(plan: &Plan<'_>, change: &Change<'_>, progress: &dyn Progress) -> Result<Restored> {
    let stored = float_of(change.info.dtype).unwrap_or_else(|| unreachable!("only plain floats are changed"));
    let found: Result<Vec<Restored>> = parts(change, BLOCK, 1.0)
        .into_par_iter()
        .map_init(Scratch::default, |scratch, (rows, cols)| {
            if progress.cancelled() {
                return Err(interrupted());
            }
            load_origin(plan, change, &rows, &cols, scratch)?;
            update(change, rows, cols, scratch)?;
            let sums: Vec<f64> = scratch.base.iter().zip(&scratch.delta).map(|(m, d)| m + d).collect();
            let (mut raw, mut rounded) = (vec![0; sums.len() * stored.size()], vec![0.0; sums.len()]);
            stored.narrow(&sums, &mut raw);
            stored.widen(&raw, &mut rounded);
            let mut found = Restored::default();
            for ((m, r), restored) in scratch.base.iter().zip(sums).zip(rounded) {
                found.value(stored, *m, r, restored);
            }
            Ok(found)
        })
        .collect();
    Ok(found?.into_iter().fold(Restored::default(), Restored::plus))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round(x: f64) -> f64 {
        let (mut raw, mut one) = ([0; 2], [0.0]);
        Float::BF16.narrow(&[x], &mut raw);
        Float::BF16.widen(&raw, &mut one);
        one[0]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn what_is_certain_is_what_it_was(w in -2.0f64..2.0, d in -2.0f64..2.0, small in 0i32..12) {
            let (w, d) = (round(w), d * 2f64.powi(-small));
            let m = round(w + d);
            let (r, mut found) = (m - d, Restored::default());
            found.value(Float::BF16, m, r, round(r));
            if found.certain == 1 {
                prop_assert_eq!(round(r), w);
            } else {
                prop_assert!((round(r) - w).powi(2) <= found.error);
            }
        }
    }

    #[test]
    fn most_small_updates_can_be_taken_back_for_certain() {
        let mut found = Restored::default();
        for i in 0..1000 {
            let (w, d) = (round(1.0 + f64::from(i) / 1000.0), 0.001 * f64::from(i % 7));
            let m = round(w + d);
            found.value(Float::BF16, m, m - d, round(m - d));
        }
        assert!(found.certain > 900 && found.certain < 1000, "{found:?}");
        assert_eq!((below(Float::BF16, 1.0), below(Float::BF16, 1.5)), (2f64.powi(-8), 2f64.powi(-7)));
    }
}

//! One rank and one scale for all targets, and the number by which each B is multiplied so that its update stays what it is. The scale
//! is that of most targets; those that differ from it by a power of two cost no bit.

use crate::adapter::Target;
use crate::error::{Error, Result};
use crate::rules;

/// What all targets of a plain adapter share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Common {
    /// The rank that every pair is padded to.
    pub(super) rank: u64,
    /// The alpha that gives the scale.
    pub(super) alpha: f64,
    /// `alpha / rank`, in f64, as PEFT computes it.
    pub(super) scale: f64,
}

impl Common {
    /// Chooses for `targets`, at a rank of at least that of each of them.
    ///
    /// # Errors
    /// `U-001` if `rank` is asked for and is less than that of a target.
    pub(super) fn of(targets: &[Target], rank: Option<u64>) -> Result<Common> {
        let highest = targets.iter().max_by_key(|target| target.scaling.rank);
        let least = highest.map_or(1, |target| target.scaling.rank);
        let rank = rank.unwrap_or(least);
        if let Some(target) = highest.filter(|_| rank < least) {
            let message = format!("rank {rank} is asked for, and {:?} has rank {least}", target.tensor);
            let help = "padding only adds to a rank; give one that is at least the highest, or none";
            return Err(Error::new(rules::ARGUMENT, message).tensor(&target.tensor).help(help));
        }
        let scales: Vec<f64> = targets.iter().map(|target| target.scaling.effective()).collect();
        let reached = scales.iter().filter_map(|&scale| Some(Common { rank, alpha: alpha(scale, rank)?, scale }));
        // By what is exact first, then by what is left as it is; whole alphas are what most readers expect; and under the largest
        // scale no B grows, which might take it beyond its dtype.
        let count = |is_so: &dyn Fn(f64) -> bool| scales.iter().filter(|&&scale| is_so(scale)).count();
        let worth = |common: &Common| {
            let exact = count(&|scale| is_power_of_two_apart(scale, common.scale));
            let same = count(&|scale| scale == common.scale);
            (exact, same, common.alpha.fract() == 0.0, common.scale.to_bits())
        };
        Ok(reached.max_by_key(worth).unwrap_or_else(|| nearest(scales.first().copied().unwrap_or(1.0), rank)))
    }

    /// What B of a target is multiplied by.
    pub(super) fn fold(&self, target: &Target) -> f64 {
        target.scaling.effective() / self.scale
    }
}

/// The two differ by a power of two, so that their quotient is exact.
pub(super) fn is_power_of_two_apart(x: f64, y: f64) -> bool {
    let mantissa = |value: f64| value.to_bits() & ((1 << 52) - 1);
    x.is_normal() && y.is_normal() && mantissa(x) == mantissa(y)
}

/// The alpha of which `alpha / rank` is `scale` to the last bit; there is not one for every rank that is no power of two.
fn alpha(scale: f64, rank: u64) -> Option<f64> {
    let guess = scale * rank as f64;
    let near = [guess, guess.next_up(), guess.next_down(), guess.next_up().next_up(), guess.next_down().next_down()];
    near.into_iter().find(|alpha| alpha.is_finite() && alpha / rank as f64 == scale)
}

/// The scale next to one that no alpha gives: within 2⁻⁵² of it, which the report shows as an error.
fn nearest(scale: f64, rank: u64) -> Common {
    let alpha = scale * rank as f64;
    Common { rank, alpha, scale: alpha / rank as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphas_give_the_scale_to_the_last_bit_or_are_none() {
        for rank in 1..200u64 {
            for scale in [1.0, 0.5, 2.0, 16.0 / 3.0, 8.0 / 6f64.sqrt(), 22.6 / 7.0, 1.0 / 3.0] {
                match alpha(scale, rank) {
                    Some(alpha) => assert_eq!(alpha / rank as f64, scale),
                    None => assert!(!rank.is_power_of_two() && (nearest(scale, rank).scale / scale - 1.0).abs() < 3e-16),
                }
            }
        }
        assert_eq!(alpha(2.0, 8), Some(16.0));
    }

    #[test]
    fn powers_of_two_are_told_by_the_mantissa() {
        assert!(is_power_of_two_apart(0.75, 3.0) && is_power_of_two_apart(1.0, 1.0));
        assert!(!is_power_of_two_apart(0.75, 1.0) && !is_power_of_two_apart(1.0, 1.0f64.next_up()));
    }
}

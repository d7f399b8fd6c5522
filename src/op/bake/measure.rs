//! What baking costs: of each target, whether its update is the same to the last bit, and otherwise by how much it differs. Measured
//! on the values, not taken from what ought to be.

use super::scale::{Common, is_power_of_two_apart};
use super::source::Entry;
use crate::adapter::Target;
use crate::error::{Error, Result};
use crate::kernel::product_norm;
use crate::rules;
use crate::tensor::pieces;

/// One target and what its factors become.
pub(super) struct Pair<'a> {
    pub(super) target: &'a Target,
    pub(super) a: Entry,
    pub(super) b: Entry,
}

/// ‖ΔW′ − ΔW‖ and ‖ΔW‖ (Frobenius).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Norms {
    pub(super) error: f64,
    pub(super) update: f64,
}

impl Pair<'_> {
    /// Whether the update stays the same to the last bit: no value of a factor is rounded, and what B is multiplied by is exactly
    /// what the scale is divided by.
    ///
    /// # Errors
    /// `A-008` if a value is not finite, `A-031` if one is not in its new dtype, `E-001`, `E-004`.
    pub(super) fn is_exact(&self, common: &Common) -> Result<bool> {
        let (a, b) = (is_kept(&self.a)?, is_kept(&self.b)?);
        Ok(a && b && is_power_of_two_apart(self.target.scaling.effective(), common.scale))
    }

    /// How far the baked update is from what it was, from the factors: the difference is (s′B′ − sB)·A′ + sB·(A′ − A), of which
    /// neither term is a difference of large numbers.
    ///
    /// # Errors
    /// `E-001`, `E-004`.
    pub(super) fn norms(&self, common: &Common) -> Result<Norms> {
        let rank = self.target.scaling.rank as usize;
        let scale = self.target.scaling.effective();
        let ((a, a_after), (b, b_after)) = (before_and_after(&self.a)?, before_and_after(&self.b)?);
        let update = scale.abs() * product_norm(&b, &a, rank);
        let moved = |row: &[f64], after: &[f64]| -> Vec<f64> {
            let differences = row.iter().zip(after).map(|(b, after)| common.scale * after - scale * b);
            differences.chain(row.iter().map(|b| scale * b)).collect()
        };
        let left: Vec<f64> =
            b.chunks_exact(rank).zip(b_after.chunks_exact(rank)).flat_map(|(row, after)| moved(row, after)).collect();
        let right: Vec<f64> = a_after.iter().copied().chain(a.iter().zip(&a_after).map(|(a, after)| after - a)).collect();
        Ok(Norms { error: product_norm(&left, &right, 2 * rank), update })
    }
}

/// Whether every value of a factor is, after rounding, what it was times the number that it is multiplied by.
fn is_kept(entry: &Entry) -> Result<bool> {
    let mut kept = true;
    each(entry, |before, after| {
        for (before, after) in before.iter().zip(after) {
            if !before.is_finite() {
                return Err(nonfinite(entry, format!("{:?} holds {before}", entry.from.name()), rules::FACTORS_FINITE));
            }
            if !after.is_finite() {
                let message = format!("{before} in {:?} times {} is beyond {}", entry.from.name(), entry.times, entry.info.dtype);
                return Err(nonfinite(entry, message, rules::RESULT_FINITE));
            }
            kept &= before * entry.times == *after;
        }
        Ok(())
    })?;
    Ok(kept)
}

fn nonfinite(entry: &Entry, message: String, rule: &'static rules::Rule) -> Error {
    let help = match rule.id == rules::RESULT_FINITE.id {
        true => "save the adapter in F32 first",
        false => "the training diverged or the file is damaged; use an earlier checkpoint of the adapter",
    };
    Error::new(rule, message).file(entry.from.source().label()).tensor(entry.from.name()).help(help)
}

fn before_and_after(entry: &Entry) -> Result<(Vec<f64>, Vec<f64>)> {
    let (mut all_before, mut all_after) = (Vec::new(), Vec::new());
    each(entry, |before, after| {
        all_before.extend_from_slice(before);
        all_after.extend_from_slice(after);
        Ok(())
    })?;
    Ok((all_before, all_after))
}

/// The values of a factor as they were and as they become, piece by piece.
fn each(entry: &Entry, mut step: impl FnMut(&[f64], &[f64]) -> Result<()>) -> Result<()> {
    let (from, to) = entry.floats()?;
    let (mut before, mut after, mut raw) = (Vec::new(), Vec::new(), Vec::new());
    pieces(entry.from.info().bytes(), |offset, bytes| {
        entry.from.read(offset, bytes)?;
        let count = bytes.len() / from.size();
        before.resize(count, 0.0);
        after.resize(count, 0.0);
        from.widen(bytes, &mut before);
        before.iter().zip(&mut after).for_each(|(before, after)| *after = before * entry.times);
        raw.resize(count * to.size(), 0);
        to.narrow(&after, &mut raw);
        to.widen(&raw, &mut after);
        step(&before, &after)
    })
}

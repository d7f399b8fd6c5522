//! The singular values of the updates of an adapter, from the factors: what its ranks are used for.

use super::crew;
use crate::adapter::{Adapter, Kind, Target};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::exec::{self, Difference, ExecOptions, Progress, Weight};
use crate::kernel::Isa;
use crate::kernel::lowrank::Found;
use crate::limits::Limits;
use crate::plan::{BindOptions, Binding, Weighted};
use crate::report::{EnergyRanks, Smaller, SpectrumReport, UpdateSpectrum};
use crate::rules;
use crate::tensor::TensorSource;

/// Singular values below this share of the largest are the rounding of f64.
const RESOLUTION: f64 = 1e-14;
/// Shares of the energy for which the report says what would be left of the adapter.
const SHARES: [f64; 3] = [0.9, 0.99, 0.999];

/// The singular values of every update, from its factors. With a base also how large the updates are beside its weights, which are then
/// read. DoRA's magnitudes are not in it.
///
/// # Errors
/// `A-010` for an update whose width only its base knows; `A-008` if a value is not finite; `E-012` if a decomposition does not converge;
/// what [`Binding::new`] finds if there is a base; `E-001`, `E-004`, `E-006`.
pub fn spectrum(
    adapter: &Adapter,
    base: Option<&Checkpoint>,
    bind: &BindOptions,
    limits: &Limits,
    exec: &ExecOptions,
    progress: &dyn Progress,
) -> Result<SpectrumReport> {
    if let Some(target) = adapter.targets().iter().find(|target| matches!(target.kind, Kind::Shared(_))) {
        let message = format!("which columns of A belong to {:?} is known by its base alone", target.tensor);
        let help = "settle it first: loratool convert --base BASE";
        return Err(Error::new(rules::METHOD_SUPPORTED, message).file(adapter.label()).help(help));
    }
    let binding = base.map(|base| Binding::new(base, Weighted::full(adapter), 0, bind, limits)).transpose()?;
    let parts: Vec<(&Target, u64)> =
        adapter.targets().iter().flat_map(|target| (0..target.experts().unwrap_or(1)).map(move |e| (target, e))).collect();
    let size = |target: &Target| (target.a.info().bytes() + target.b.info().bytes()) / target.experts().unwrap_or(1).max(1);
    let sizes: Vec<u64> = parts.iter().map(|(target, _)| size(target)).collect();
    progress.expect(sizes.iter().sum());
    let found = exec::on_threads(exec, || {
        crew::each(&sizes, |i| {
            if progress.cancelled() {
                return Err(exec::interrupted());
            }
            let (target, expert) = parts[i];
            let values = values(target, expert)?;
            let place = binding.as_ref().zip(base).and_then(|(binding, base)| Some((base, binding.settled(&target.tensor)?.0)));
            let relative = match place {
                Some((base, name)) => weight_norm(base, name, target, expert, progress)?.map(|norm| norm_of(&values) / norm),
                None => None,
            };
            progress.advance(sizes[i]);
            Ok((values, relative))
        })
    })?;
    let (mut updates, mut dead) = (Vec::new(), Vec::new());
    for ((target, expert), (values, relative)) in parts.iter().zip(found) {
        let expert = target.experts().map(|_| *expert);
        match values.is_empty() {
            true => dead.push(expert.map_or_else(|| target.tensor.clone(), |e| format!("{}[{e}]", target.tensor))),
            false => updates.push(described(target, expert, values, relative)),
        }
    }
    let norm = updates.iter().map(|update| update.norm * update.norm).sum::<f64>().sqrt();
    let smaller = SHARES.iter().map(|share| smaller(adapter, &updates, *share)).collect();
    Ok(SpectrumReport { updates, dead, norm, smaller })
}

fn values(target: &Target, expert: u64) -> Result<Vec<f64>> {
    let (b, a) = exec::read_factors(target, expert, 0..target.out_in().0)?;
    let found = Found::of_product(&b, &a, target.scaling.rank as usize, target.scaling.effective()).ok_or_else(|| {
        let message = format!("no singular value decomposition of {:?} was found: it does not converge", target.tensor);
        Error::new(rules::DECOMPOSED, message).file(target.a.source().label()).tensor(target.a.name())
    })?;
    let least = RESOLUTION * found.values().first().copied().unwrap_or(0.0);
    Ok(found.values().iter().copied().take_while(|value| *value > least).collect())
}

/// ‖W‖ of what an update belongs to; `None` if it is zero, no plain floats, or of another size.
fn weight_norm(base: &Checkpoint, name: &str, target: &Target, expert: u64, progress: &dyn Progress) -> Result<Option<f64>> {
    let Some((info, float)) = base.info(name).and_then(|info| Some((info, exec::float_of(info.dtype)?))) else { return Ok(None) };
    let count = target.experts().unwrap_or(1).max(1);
    let (out, inner) = target.out_in();
    if u128::from(info.shape.elements()) != u128::from(count) * u128::from(out) * u128::from(inner) {
        // Experts that are stacked on one side alone: the tensor is not what this update belongs to.
        return Ok(None);
    }
    let (rows, cols) = info.shape.split(if count > 1 { 2 } else { 1 });
    let rows = rows / count;
    let weight = Weight { source: base, name, float, first: expert * rows * cols };
    let weight = Difference::new(weight, None, (rows as usize, cols as usize), Isa::best(), progress);
    Ok(Some(weight.norm_squared()?.sqrt()).filter(|norm| *norm > 0.0))
}

fn norm_of(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

fn described(target: &Target, expert: Option<u64>, values: Vec<f64>, relative: Option<f64>) -> UpdateSpectrum {
    let (norm, sum) = (norm_of(&values), values.iter().sum::<f64>());
    let entropy: f64 = values.iter().map(|value| value / sum).map(|share| -share * share.ln()).sum();
    let largest = values.first().copied().unwrap_or(1.0);
    UpdateSpectrum {
        tensor: target.tensor.clone(),
        expert,
        rank: target.scaling.rank,
        norm,
        effective_rank: entropy.exp(),
        stable_rank: (norm / largest).powi(2),
        energy: EnergyRanks { keeps_90: keeps(&values, 0.9), keeps_99: keeps(&values, 0.99) },
        relative,
        singular_values: values,
    }
}

/// The smallest rank that keeps a share of the square of the norm.
fn keeps(values: &[f64], share: f64) -> u64 {
    let wanted = share * norm_of(values).powi(2) * (1.0 - 1e-12);
    let mut sum = 0.0;
    let enough = values.iter().position(|value| {
        sum += value * value;
        sum >= wanted
    });
    enough.map_or(values.len(), |at| at + 1) as u64
}

/// What `resize --energy` would make of the adapter: all parts of a stack have one rank.
fn smaller(adapter: &Adapter, updates: &[UpdateSpectrum], share: f64) -> Smaller {
    let (mut highest_rank, mut parameters) = (0, 0);
    for target in adapter.targets() {
        let of = updates.iter().filter(|update| update.tensor == target.tensor);
        let rank = of.map(|update| keeps(&update.singular_values, share)).max().unwrap_or(0);
        let (out, inner) = target.out_in();
        highest_rank = highest_rank.max(rank);
        parameters += target.experts().unwrap_or(1) * rank * (out + inner);
    }
    Smaller { energy: share, highest_rank, parameters }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_count_fully_and_a_single_one_counts_once() {
        assert_eq!((keeps(&[1.0; 10], 0.9), keeps(&[1.0; 10], 0.99), keeps(&[3.0], 0.9)), (9, 10, 1));
        assert_eq!(keeps(&[10.0, 1.0, 0.1], 0.9), 1);
    }
}

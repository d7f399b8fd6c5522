//! What PEFT does to single tensors when it combines adapters (`peft/utils/merge_utils.py`, 0.21.2), step by step in f32 as there, so that
//! the results are those of PEFT. It is not a sum of updates: see `docs/combine.md`.

use super::ties::Cut;

/// Where the signs that decide come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Majority {
    /// The sum of the values.
    Total,
    /// The sum of their signs.
    Frequency,
}

/// `magnitude_based_pruning`: the largest values, as many as the density says, rounded down. Of equal ones the first are kept; PEFT does
/// not say which.
pub(crate) fn prune_by_magnitude(tensor: &mut [f32], density: f64) {
    if density >= 1.0 {
        return;
    }
    let wide: Vec<f64> = tensor.iter().map(|value| f64::from(*value)).collect();
    let cut = Cut::of(&wide, (density * tensor.len() as f64) as usize);
    for ((value, index), wide) in tensor.iter_mut().zip(0..).zip(wide) {
        if cut.is_none_or(|cut| !cut.keeps(wide, index)) {
            *value = 0.0;
        }
    }
}

/// `random_pruning` with `rescale`: what the mask keeps, divided by the density.
pub(crate) fn prune_by_chance(tensor: &mut [f32], density: f64, keeps: impl Fn(u64) -> bool) {
    if density >= 1.0 {
        return;
    }
    for (value, index) in tensor.iter_mut().zip(0..) {
        *value = if keeps(index) { *value / density as f32 } else { 0.0 };
    }
}

/// `task_arithmetic`: Σ wₜ·xₜ.
pub(crate) fn task_arithmetic(tensors: &[Vec<f32>], weights: &[f32]) -> Vec<f32> {
    let at = |i: usize| tensors.iter().zip(weights).map(|(tensor, weight)| tensor[i] * weight).fold(0.0, |sum, x| sum + x);
    (0..tensors.first().map_or(0, Vec::len)).map(at).collect()
}

/// `calculate_majority_sign_mask` of the tensors as they are, then `disjoint_merge` of what the weights make of them: the sum of what has the
/// majority's sign, over how many have it.
pub(crate) fn disjoint_merge(tensors: &[Vec<f32>], weights: &[f32], majority: Majority) -> Vec<f32> {
    let sign = |x: f32| {
        if x > 0.0 {
            1.0
        } else if x < 0.0 {
            -1.0
        } else {
            0.0f32
        }
    };
    let at = |i: usize| {
        let votes = tensors.iter().map(|tensor| match majority {
            Majority::Total => tensor[i],
            Majority::Frequency => sign(tensor[i]),
        });
        let elected = if votes.fold(0.0, |sum, vote| sum + vote) >= 0.0 { 1.0 } else { -1.0 };
        let (mut sum, mut count) = (0.0f32, 0.0f32);
        for (tensor, weight) in tensors.iter().zip(weights) {
            let agrees = f32::from(u8::from(sign(tensor[i]) == elected));
            sum += tensor[i] * weight * agrees;
            count += agrees;
        }
        sum / count.max(1.0)
    };
    (0..tensors.first().map_or(0, Vec::len)).map(at).collect()
}

//! The updates that a method makes of those of the adapters, as factors in f64 that are not yet those that are stored.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::align::{Part, Sum};
use super::measure::Pair;
use super::mixed::Mixed;
use super::stacked::{Run, Stacked, common_dtype};
use crate::adapter::{Factor, Kind, Scaling, ScalingRule, Target};
use crate::error::{Error, Result};
use crate::rules;
use crate::tensor::{Dtype, Shape, TensorInfo, TensorSource};

/// The bits of the exponent of an f64: alone they are the power of two that is next below a normal number.
const EXPONENT: u64 = 0x7ff << 52;

/// How the factors of a sum are put side by side.
pub(super) struct Layout {
    pub(super) dtype: Dtype,
    /// Multiplies each A, for each sum in the order of its parts.
    gains: Vec<Vec<f64>>,
    /// The scale of each sum.
    scales: Vec<f64>,
    /// No value is rounded.
    pub(super) is_exact: bool,
}

impl Layout {
    /// In f64, with all scales in A.
    pub(super) fn wide(sums: &[Sum]) -> Layout {
        let gains = sums.iter().map(|sum| sum.parts.iter().map(Part::scale).collect()).collect();
        Layout::with(gains)
    }

    /// In f64, with these gains.
    pub(super) fn with(gains: Vec<Vec<f64>>) -> Layout {
        let scales = vec![1.0; gains.len()];
        Layout { dtype: Dtype::F64, gains, scales, is_exact: true }
    }

    /// As they are stored: in the dtype that the adapters have, if all have one and scales that differ by their signs alone; otherwise in
    /// F32, or F64 if an adapter has it, with A rounded once and the size of the largest scale left to alpha.
    pub(super) fn stored(sums: &[Sum], wide: &Layout, dtype: Option<Dtype>) -> Layout {
        let common = common_dtype(sums.iter().flat_map(|sum| &sum.parts).flat_map(|part| [&part.target.a, &part.target.b]));
        let mut is_exact = true;
        let (mut gains, mut scales) = (Vec::with_capacity(sums.len()), Vec::with_capacity(sums.len()));
        for (sum, wide) in sums.iter().zip(&wide.gains) {
            let size = wide.first().map_or(1.0, |gain| gain.abs());
            let has_bias = sum.parts.iter().any(|part| part.target.bias.is_some());
            if wide.iter().all(|gain| gain.abs() == size) && !has_bias && size > 0.0 {
                gains.push(wide.iter().map(|gain| gain.signum()).collect());
                scales.push(size);
            } else {
                is_exact = is_exact && wide.iter().all(|gain| gain.abs() == 1.0);
                // A power of two moves no bit of A, and keeps its values in the range of the dtype.
                let most = wide.iter().fold(0.0, |most: f64, gain| most.max(gain.abs()));
                let power = f64::from_bits(most.to_bits() & EXPONENT);
                let scale = if has_bias || power == 0.0 { 1.0 } else { power };
                gains.push(wide.iter().map(|gain| gain / scale).collect());
                scales.push(scale);
            }
        }
        let own = if is_exact || common == Dtype::F64 { common } else { Dtype::F32 };
        let dtype = dtype.unwrap_or(own);
        Layout { dtype, gains, scales, is_exact: is_exact && (dtype == common || dtype == Dtype::F32 && common != Dtype::F64) }
    }
}

impl Layout {
    /// ‖Δ‖² of a sum, and the square of what rounding its factors costs.
    ///
    /// # Errors
    /// `A-008`, `E-001`, `E-004`.
    pub(super) fn measured(&self, sum: &Sum, place: usize, exact: &Target, stored: &Target) -> Result<(f64, f64)> {
        let (mut norm, mut error) = (0.0, 0.0);
        let only_a = self.dtype == Dtype::F64 || self.dtype == Dtype::F32 && !sum.parts.iter().any(Part::is_wide);
        for expert in 0..sum.experts() {
            let pair = Pair::of(exact, expert)?;
            norm += pair.norm_squared();
            let turned = self.gains.get(place).is_some_and(|gains| gains.iter().all(|gain| gain.abs() == 1.0));
            if self.is_exact || only_a && turned {
                continue;
            }
            if !only_a {
                error += Pair::of(stored, expert)?.distance_squared(&pair);
                continue;
            }
            // B is stored as it is, so that only what A has lost is multiplied with it.
            let scale = self.scales.get(place).copied().unwrap_or(1.0);
            let lost = pair.a.iter().map(|a| self.rounded(a / scale) * scale - a).collect();
            error += Pair { a: lost, ..pair }.norm_squared();
        }
        Ok((norm, error))
    }

    /// A value of A as it is stored.
    fn rounded(&self, value: f64) -> f64 {
        if self.dtype == Dtype::F32 { f64::from(value as f32) } else { value }
    }
}

/// The sums with their factors side by side.
///
/// # Errors
/// `A-003` for factors that are larger than any file.
pub(super) fn side_by_side(sums: &[Sum], layout: &Layout, mixed: &Mixed, label: &Path) -> Result<Vec<Target>> {
    let mut stacked = Stacked::new(label);
    for (sum, gains) in sums.iter().zip(&layout.gains) {
        let (rank, experts) = (sum.rank(), sum.experts());
        let of = |factor: &Factor, gain: f64, blocks: u64| {
            let len = factor.info().shape.elements().checked_div(blocks).unwrap_or(0);
            Run { factor: factor.clone(), gain, len }
        };
        let (out, _) = sum.out_in();
        let parts = || sum.parts.iter().zip(gains);
        let a = parts().map(|(part, gain)| of(&part.target.a, *gain, experts)).collect();
        let b = parts().map(|(part, _)| of(&part.target.b, 1.0, experts * out)).collect();
        let (shape_a, shape_b) = shapes(sum, rank)?;
        stacked.insert(name(sum, "A"), TensorInfo { dtype: layout.dtype, shape: shape_a }, a);
        stacked.insert(name(sum, "B"), TensorInfo { dtype: layout.dtype, shape: shape_b }, b);
    }
    let source: Arc<dyn TensorSource> = Arc::new(stacked);
    let ranks = sums.iter().map(Sum::rank).zip(layout.scales.iter().copied());
    targets(sums, ranks, &source, mixed)
}

/// The targets of the sums with factors of these ranks and scales.
pub(super) fn targets<'s>(
    sums: impl IntoIterator<Item = &'s Sum>,
    ranks: impl Iterator<Item = (u64, f64)>,
    source: &Arc<dyn TensorSource>,
    mixed: &Mixed,
) -> Result<Vec<Target>> {
    let target = |(sum, (rank, scale)): (&Sum, (u64, f64))| {
        let factor = |part: &str| {
            let name = name(sum, part);
            Factor::new(source, &name).ok_or_else(|| Error::new(rules::READ, "a computed factor is missing").tensor(name))
        };
        Ok(Target {
            tensor: sum.tensor.clone(),
            kind: sum.kind,
            a: factor("A")?,
            b: factor("B")?,
            scaling: Scaling { rank, alpha: scale * rank as f64, rule: ScalingRule::Standard },
            bias: of(&mixed.biases, sum),
            magnitude: of(&mixed.magnitudes, sum),
            singular_values: None,
        })
    };
    sums.into_iter().zip(ranks).map(target).collect()
}

fn of<T: Clone>(all: &BTreeMap<String, T>, sum: &Sum) -> Option<T> {
    all.get(&sum.tensor).cloned()
}

/// The name of a factor among those that are computed.
pub(super) fn name(sum: &Sum, part: &str) -> String {
    format!("{}:{part}", sum.tensor)
}

/// The shapes of A and B of a rank.
///
/// # Errors
/// `A-003` if they are larger than any file.
pub(super) fn shapes(sum: &Sum, rank: u64) -> Result<(Shape, Shape)> {
    // The part whose factors have the dimensions of the kind.
    let part = sum.parts.iter().find(|part| part.target.kind == sum.kind || sum.kind != Kind::Conv);
    let dims = |factor: fn(&Target) -> &Factor| part.map_or(&[][..], |part| factor(&part.target).info().shape.dims()).to_vec();
    let at = if matches!(sum.kind, Kind::Experts(_)) { (1, 2) } else { (0, 1) };
    let with = |mut dims: Vec<u64>, at: usize| {
        dims.get_mut(at).into_iter().for_each(|dim| *dim = rank);
        Shape::new(dims).filter(|shape| shape.bytes(Dtype::F64).is_some()).ok_or_else(|| {
            let message = format!("the factors of {:?} with rank {rank} are larger than any file", sum.tensor);
            Error::new(rules::RANK_LIMIT, message).tensor(&sum.tensor)
        })
    };
    Ok((with(dims(|target| &target.a), at.0)?, with(dims(|target| &target.b), at.1)?))
}

//! The verdict on each changed tensor: its figures are taken and judged, and where they show that something else was added, the other
//! updates that it might have been are tried on a sample of the tensor.

use std::collections::HashMap;

use rayon::prelude::*;

use super::verdict::{Applied, Gains, Judgement, Said, explains, judge, scaled, times};
use crate::adapter::Scaling;
use crate::error::Result;
use crate::exec::{Alternative, Comparison, Figures, Lay, float_of};
use crate::kernel::Float;
use crate::plan::{Change, Norms, Quantised, Rounding, Weighted};
use crate::report::{Ulps, Verdict, VerifiedTensor};
use crate::tensor::{TensorInfo, TensorSource, is_plain_float};

/// The scaling of every factor by adapter and name.
type Scalings<'a> = HashMap<(usize, &'a str), Scaling>;

fn scalings<'a>(adapters: &[Weighted<'a>]) -> Scalings<'a> {
    let mut found = HashMap::new();
    for (i, weighted) in adapters.iter().enumerate() {
        for target in weighted.adapter.targets() {
            found.extend(target.factors().map(|factor| ((i, factor.name()), target.scaling)));
        }
    }
    found
}

/// Judges the changed tensors of one comparison.
pub(super) struct Judge<'p, 'a> {
    comparison: &'p Comparison<'p, 'a>,
    scalings: Scalings<'a>,
    adapters: &'p [Weighted<'a>],
}

impl<'p, 'a> Judge<'p, 'a> {
    pub(super) fn new(comparison: &'p Comparison<'p, 'a>, adapters: &'p [Weighted<'a>]) -> Self {
        Judge { comparison, scalings: scalings(adapters), adapters }
    }

    /// Every changed tensor that can be compared: there, in its shape, and a plain float, or codes with scales as the base has them.
    ///
    /// # Errors
    /// As [`Comparison::figures`].
    pub(super) fn all(&self) -> Result<Vec<(VerifiedTensor, Figures)>> {
        let changes: Vec<&Change<'_>> = self.comparison.plan.changes().collect();
        let comparable: Vec<(&Change<'_>, &TensorInfo)> = changes
            .iter()
            .filter_map(|change| {
                let info = self.comparison.merged.info(&change.name)?;
                let is_known = is_plain_float(info.dtype) || self.is_quantised(change, info);
                (info.shape == change.info.shape && is_known && !change.is_of_scales()).then_some((*change, info))
            })
            .collect();
        comparable.par_iter().map(|(change, info)| self.one(change, info, &changes)).collect()
    }

    /// Is the tensor stored as codes in both checkpoints, with scales of one form? They are compared together.
    fn is_quantised(&self, change: &Change<'_>, info: &TensorInfo) -> bool {
        let scales = |how: &Quantised<'_>| self.comparison.merged.info(&how.scales) == Some(&how.info);
        info.dtype == change.info.dtype && change.quantised.as_ref().is_some_and(scales)
    }

    fn one(&self, change: &Change<'_>, info: &TensorInfo, all: &[&Change<'_>]) -> Result<(VerifiedTensor, Figures)> {
        // Codes are compared by the values that they mean with their scales.
        let stored = float_of(info.dtype).unwrap_or(Float::F64);
        let figures = self.comparison.figures(change, stored)?;
        let gains = Gains::of(&figures);
        let rounding = gains.map_or(0.0, |gains| gains.rounding);
        let judged = judge(&figures, change.contributions.len(), self.applied(change));
        let is_settled =
            matches!(&judged, Judgement::Settled((verdict, _)) if verdict.is_merged() || *verdict == Verdict::NotMerged);
        let (said, other) = match judged {
            _ if !is_settled && self.is_peft(change, info)? => {
                let says = "merged: every value is what PEFT's rounding after each adapter gives".to_owned();
                ((Verdict::MergedOtherRounding, says), None)
            }
            Judgement::Settled(said) => (said, None),
            Judgement::Scaled(gain, names) => {
                let again = Alternative { update: change, lay: Lay::AsIs, factor: 2.0 };
                let probes = self.comparison.probe(change, stored, &[again])?;
                let counts = probes.first().map_or((0, 0), |probe| (probe.in_two, probe.at_once));
                // Codes do not tell how often something was rounded: each time they get another scale.
                let (in_two, at_once) = if change.quantised.is_some() { (1, 0) } else { counts };
                (scaled(gain, names, in_two, at_once), None)
            }
            Judgement::Search(said) => {
                let partial = without_one(change);
                let suspects = suspects(change, all, &partial);
                let updates: Vec<Alternative<'_, '_>> = suspects.iter().map(Suspect::alternative).collect();
                let probes = self.comparison.probe(change, stored, &updates)?;
                let fits = suspects.iter().zip(&probes).filter_map(|(suspect, probe)| {
                    let (gain, residual) = probe.gain()?;
                    explains(gain, residual, rounding).then_some((suspect, gain, residual))
                });
                match fits.min_by(|x, y| x.2.total_cmp(&y.2)) {
                    None => (said, None),
                    Some((suspect, gain, _)) => self.convicted(suspect, gain),
                }
            }
        };
        let ratio = |x: f64, y: f64| (y > 0.0).then(|| (x / y).sqrt());
        let tensor = VerifiedTensor {
            tensor: change.name.clone(),
            dtype: info.dtype.to_string(),
            shape: info.shape.dims().to_vec(),
            verdict: said.0,
            says: said.1,
            other,
            values: figures.values,
            relative_norm: ratio(figures.delta, figures.base).filter(|_| gains.is_some()),
            gain: gains.map(|gains| gains.gain),
            gain_error: gains.map(|gains| gains.error),
            gain_expected: gains.map(|gains| gains.expected),
            residual: gains.and_then(|gains| ratio(gains.left, figures.base)),
            residual_of_update: gains.map(|gains| gains.residual),
            ulps: named(figures.ulps),
            nonfinite: figures.nonfinite,
        };
        Ok((tensor, figures))
    }

    /// Is the tensor, bit for bit, what PEFT writes? Rounding after each adapter can leave another share of small updates than rounding once.
    fn is_peft(&self, change: &Change<'_>, info: &TensorInfo) -> Result<bool> {
        if *info != change.info || change.contributions.is_empty() || change.is_scaled() || change.quantised.is_some() {
            return Ok(false);
        }
        Ok(self.comparison.is_rounded(change, Rounding::Peft)? || self.comparison.is_rounded(change, Rounding::PeftSafe)?)
    }

    /// The verdict on an update that explains what was added, and the tensor that it belongs to if that is another one.
    fn convicted(&self, suspect: &Suspect<'_, '_>, gain: f64) -> (Said, Option<String>) {
        let times = times(gain);
        match suspect {
            Suspect::Transposed(_) => ((Verdict::Transposed, format!("the update was added transposed{times}")), None),
            Suspect::Other(other) => {
                let says = format!("the update of {:?} was added instead{times}", other.name);
                ((Verdict::OtherTensor, says), Some(other.name.clone()))
            }
            Suspect::Without(adapter, _) => {
                let label = self.adapters.get(*adapter).map_or("", |weighted| weighted.adapter.label());
                let says = format!("adapter {} ({label:?}) is missing; the rest was added{times}", adapter + 1);
                ((Verdict::AdapterMissing, says), None)
            }
        }
    }

    /// How a tensor with one contribution is scaled; several have no scale in common.
    fn applied(&self, change: &Change<'_>) -> Option<Applied> {
        let [contribution] = &change.contributions[..] else { return None };
        let factor = contribution.right.factor().filter(|_| contribution.gain.is_none())?;
        let scaling = *self.scalings.get(&(contribution.adapter, factor.name()))?;
        Some(Applied { scaling, weight: self.adapters.get(contribution.adapter)?.weight })
    }
}

/// What may have been added instead.
enum Suspect<'p, 'a> {
    /// The update itself, transposed.
    Transposed(&'p Change<'a>),
    /// That of another tensor of the same shape.
    Other(&'p Change<'a>),
    /// The update without the part of one adapter.
    Without(usize, &'p Change<'a>),
}

impl<'p, 'a> Suspect<'p, 'a> {
    fn alternative(&self) -> Alternative<'p, 'a> {
        match self {
            Suspect::Transposed(update) => Alternative { update, lay: Lay::Transposed, factor: 1.0 },
            Suspect::Other(update) | Suspect::Without(_, update) => Alternative { update, lay: Lay::AsIs, factor: 1.0 },
        }
    }
}

fn suspects<'p, 'a>(change: &Change<'_>, all: &[&'p Change<'a>], partial: &'p [(usize, Change<'a>)]) -> Vec<Suspect<'p, 'a>> {
    let square = !change.is_scaled() && change.info.shape.matrix().is_some_and(|(rows, cols)| rows == cols);
    let same_shape = all.iter().filter(|other| !other.contributions.is_empty() && other.info.shape == change.info.shape);
    let found = same_shape.filter_map(|other| match other.name == change.name {
        true => square.then_some(Suspect::Transposed(other)),
        false => Some(Suspect::Other(other)),
    });
    found.chain(partial.iter().map(|(adapter, update)| Suspect::Without(*adapter, update))).collect()
}

/// For each of several adapters, the change without its part.
fn without_one<'a>(change: &Change<'a>) -> Vec<(usize, Change<'a>)> {
    let several = change.contributions.iter().filter(|_| change.contributions.len() > 1);
    several
        .map(|left_out| {
            let mut rest = change.clone();
            // They belong to the contributions that were there.
            rest.norms = Norms::default();
            rest.contributions.retain(|contribution| contribution.adapter != left_out.adapter);
            (left_out.adapter, rest)
        })
        .collect()
}

/// The buckets by their names in the report.
pub(super) fn named(ulps: [u64; 6]) -> Ulps {
    let [none, one, two, to_4, to_16, more] = ulps;
    Ulps { none, one, two, to_4, to_16, more }
}

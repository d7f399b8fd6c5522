//! Which version of a part the result has, or their mean: what the policy decides, and what is plain without one.

use super::version::Version;
use super::{Mixer, Named, narrowed};
use crate::error::{Diagnostic, Result};
use crate::exec::float_of;
use crate::op::combine::options::PartsPolicy;
use crate::op::combine::stacked::common_dtype;
use crate::rules;
use crate::tensor::TensorInfo;

/// Values that are read and mixed at a time.
const PIECE: u64 = 1 << 17;

/// What is taken of several versions.
pub(super) enum Choice {
    /// That with this place among them.
    One(usize),
    Mean,
}

impl Mixer<'_> {
    /// One of the versions, or their mean; `None` if it is refused.
    pub(super) fn mixed(
        &mut self,
        what: &'static str,
        tensor: &str,
        part: &str,
        versions: &[Version<'_>],
    ) -> Result<Option<Named>> {
        match self.choose(what, tensor, versions)? {
            None => Ok(None),
            Some(Choice::One(place)) => Ok(versions.get(place).map(|version| Named::Factor(version.factor.clone()))),
            Some(Choice::Mean) => self.mean(what, tensor, part, versions),
        }
    }

    pub(super) fn mean(&mut self, what: &str, tensor: &str, part: &str, versions: &[Version<'_>]) -> Result<Option<Named>> {
        let Some(first) = versions.first() else { return Ok(None) };
        let shape = &first.factor.info().shape;
        if let Some(other) = versions.iter().find(|version| version.factor.info().shape.elements() != shape.elements()) {
            let message = format!(
                "the {what} of {tensor:?} is {} here and {shape} elsewhere: they have no mean",
                other.factor.info().shape
            );
            let diagnostic = Diagnostic::new(rules::SHAPE_FITS, message).file(self.adapters[other.adapter].label());
            self.problems.push(diagnostic.tensor(tensor).help("give --parts first"));
            return Ok(None);
        }
        if versions.iter().map(|version| version.weight).sum::<f64>() == 0.0 {
            self.refuse(what, tensor, "the weights of those that have it add up to 0, so that they have no mean");
            return Ok(None);
        }
        let dtype = common_dtype(versions.iter().map(|version| version.factor));
        let float = float_of(dtype).unwrap_or_else(|| unreachable!("adapters hold plain floats only"));
        let name = format!("{part} of {tensor}");
        let place = self.spool.reserve(&name, TensorInfo { dtype, shape: shape.clone() });
        let total = shape.elements();
        for from in (0..total).step_by(PIECE as usize) {
            let values = self.values(&Choice::Mean, versions, from, PIECE.min(total - from))?;
            self.spool.put(place, from * float.size() as u64, &narrowed(&values, float, tensor)?)?;
        }
        Ok(Some(Named::Spooled(name)))
    }

    /// Some values of what was chosen, summed in the order of the adapters.
    pub(super) fn values(&self, choice: &Choice, versions: &[Version<'_>], from: u64, count: u64) -> Result<Vec<f64>> {
        if let Choice::One(place) = choice {
            return versions.get(*place).map_or(Ok(Vec::new()), |version| version.read(from, count));
        }
        let (mut sum, mut weight) = (vec![0.0; count as usize], 0.0);
        for place in self.order {
            for version in versions.iter().filter(|version| version.adapter == *place) {
                weight += version.weight;
                let values = version.read(from, count)?;
                sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += version.weight * value);
            }
        }
        sum.iter_mut().for_each(|sum| *sum /= weight);
        Ok(sum)
    }

    /// What it has to be, if that is plain; what the policy says otherwise. `None` if it is refused.
    pub(super) fn choose(&mut self, what: &'static str, tensor: &str, versions: &[Version<'_>]) -> Result<Option<Choice>> {
        let total: f64 = versions.iter().map(|version| version.weight).sum();
        let is_one = (total - 1.0).abs() <= 1e-12;
        if let [first, rest @ ..] = versions
            && is_one
        {
            let mut same = true;
            for other in rest {
                same = same && first.equals(other)?;
            }
            if same {
                return Ok(Some(Choice::One(0)));
            }
        }
        match self.policy {
            PartsPolicy::Refuse => {
                let why = match versions {
                    [one] => {
                        format!("one adapter has it, with weight {}, and what it adds to the base is not in its file", one.weight)
                    }
                    _ if is_one => "the adapters have different ones".to_owned(),
                    _ => format!("{} adapters have it, with weights that add up to {total}", versions.len()),
                };
                self.refuse(what, tensor, &why);
                return Ok(None);
            }
            PartsPolicy::First => *self.decided.entry(what).or_default() += 1,
            PartsPolicy::Average if total == 0.0 => {
                self.refuse(what, tensor, "the weights of those that have it add up to 0, so that they have no mean");
                return Ok(None);
            }
            PartsPolicy::Average => {
                *self.decided.entry(what).or_default() += 1;
                return Ok(Some(Choice::Mean));
            }
        }
        Ok(Some(Choice::One(0)))
    }

    pub(super) fn refuse(&mut self, what: &str, tensor: &str, why: &str) {
        let message = format!("the {what} of {tensor:?} has no sum: {why}");
        let help = match self.policy {
            PartsPolicy::Average => "give --parts first, or take it out of the adapters first",
            _ => "give --parts first or --parts average, or take it out of the adapters first",
        };
        self.problems.push(Diagnostic::new(rules::METHOD_SUPPORTED, message).tensor(tensor).help(help));
    }
}

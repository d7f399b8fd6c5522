//! What adapters hold beside low-rank updates: full tensors, rows, multipliers and magnitudes. A sum of them means something only where it
//! can be told without the base; elsewhere the policy decides, and nothing is dropped. Updates of biases are updates, and add up.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::align::Sum;
use super::options::PartsPolicy;
use super::stacked::common_dtype;
use super::weights::Weights;
use crate::adapter::{Adapter, BiasDelta, Factor, Replacement, Rescaling, RowReplacement};
use crate::error::{Diagnostic, Error, Result};
use crate::exec::float_of;
use crate::op::spool::Spool;
use crate::report::text::plural;
use crate::rules;
use crate::tensor::{Dtype, Shape, TensorInfo, TensorSource};

/// Values that are read and mixed at a time.
const PIECE: u64 = 1 << 17;

/// What stands beside the low-rank updates of the result.
pub(super) struct Mixed {
    pub(super) replacements: Vec<Replacement>,
    pub(super) rows: Vec<RowReplacement>,
    pub(super) rescalings: Vec<Rescaling>,
    /// By the tensor of the target. They are scaled already.
    pub(super) biases: BTreeMap<String, BiasDelta>,
    pub(super) magnitudes: BTreeMap<String, Factor>,
    /// What the policy decided.
    pub(super) decided: Vec<Diagnostic>,
}

/// One adapter's version of something.
#[derive(Clone)]
struct Version<'a> {
    /// The adapter's place among those that were given.
    adapter: usize,
    weight: f64,
    factor: &'a Factor,
    /// The first of its values that count, and how many do.
    first: u64,
    count: u64,
}

impl<'a> Version<'a> {
    fn whole(adapter: usize, weight: f64, factor: &'a Factor) -> Self {
        Version { adapter, weight, factor, first: 0, count: factor.info().shape.elements() }
    }

    fn read(&self, from: u64, count: u64) -> Result<Vec<f64>> {
        let float = float_of(self.factor.info().dtype).unwrap_or_else(|| unreachable!("adapters hold plain floats only"));
        let size = float.size() as u64;
        let mut raw = vec![0; (count * size) as usize];
        self.factor.read((self.first + from) * size, &mut raw)?;
        let mut values = vec![0.0f64; count as usize];
        float.widen(&raw, &mut values);
        match values.iter().all(|value| value.is_finite()) {
            true => Ok(values),
            false => {
                let message = format!("{:?} holds a value that is not finite", self.factor.name());
                Err(Error::new(rules::FACTORS_FINITE, message).file(self.factor.source().label()).tensor(self.factor.name()))
            }
        }
    }

    fn equals(&self, other: &Version<'_>) -> Result<bool> {
        if self.count == self.factor.info().shape.elements() && other.count == other.factor.info().shape.elements() {
            return self.factor.equals(other.factor);
        }
        Ok(self.count == other.count && self.read(0, self.count)? == other.read(0, other.count)?)
    }
}

/// What is taken of several versions.
enum Choice {
    /// That with this place among them.
    One(usize),
    Mean,
}

/// Where the versions are from, in the order that was given and in that of sums.
struct Mixer<'m> {
    adapters: &'m [&'m Adapter],
    order: &'m [usize],
    weights: &'m Weights<'m>,
    policy: PartsPolicy,
    spool: Spool,
    problems: Vec<Diagnostic>,
    /// How many parts of each sort the policy decided on.
    decided: BTreeMap<&'static str, u64>,
}

/// Mixes what is not low rank. `sums` are the low-rank updates, some of which have magnitudes and bias updates.
///
/// # Errors
/// `A-010` for everything that the policy refuses, at once; `A-008` if a value is not finite; `E-001`, `E-002`, `E-004`.
pub(super) fn mix(
    adapters: &[&Adapter],
    order: &[usize],
    sums: &[Sum],
    weights: &Weights<'_>,
    policy: PartsPolicy,
    spool: Spool,
) -> Result<Mixed> {
    let mut mixer = Mixer { adapters, order, weights, policy, spool, problems: Vec::new(), decided: BTreeMap::new() };
    let whole = mixer.wholes()?;
    let rows = mixer.rows(&whole)?;
    let rescaled = mixer.rescaled()?;
    let magnitudes = mixer.magnitudes(sums)?;
    let biases = mixer.biases(sums)?;
    Error::check(mixer.problems)?;
    let of = |(what, count): (&&str, &u64)| {
        let how = match policy {
            PartsPolicy::First => "that of the first adapter that has it is taken",
            PartsPolicy::Average => "the mean by weight of those that have it is taken",
            PartsPolicy::Refuse => "taken as it is",
        };
        Diagnostic::new(rules::METHOD_SUPPORTED, format!("{}: {how}", plural(*count, what)))
    };
    let decided = mixer.decided.iter().map(of).collect();
    let source: Arc<dyn TensorSource> = Arc::new(mixer.spool.finish());
    let made = |named: Named| -> Result<Factor> {
        match named {
            Named::Factor(factor) => Ok(factor),
            Named::Spooled(name) => {
                Factor::new(&source, &name).ok_or_else(|| Error::new(rules::READ, "a computed tensor is missing").tensor(name))
            }
        }
    };
    let mut mixed = Mixed {
        replacements: Vec::new(),
        rows: Vec::new(),
        rescalings: Vec::new(),
        biases: BTreeMap::new(),
        magnitudes: BTreeMap::new(),
        decided,
    };
    for (first, with) in whole {
        mixed.replacements.push(Replacement { with: made(with)?, ..first.clone() });
    }
    for (tensor, rows, with) in rows {
        mixed.rows.push(RowReplacement { tensor, rows, with: made(with)? });
    }
    for (first, by) in rescaled {
        mixed.rescalings.push(Rescaling { by: made(by)?, ..first.clone() });
    }
    for (tensor, magnitude) in magnitudes {
        mixed.magnitudes.insert(tensor, made(magnitude)?);
    }
    for (tensor, bias, delta) in biases {
        mixed.biases.insert(tensor, BiasDelta { tensor: bias, delta: made(delta)? });
    }
    Ok(mixed)
}

/// A tensor of the result before the spool is read.
enum Named {
    Factor(Factor),
    Spooled(String),
}

impl<'m> Mixer<'m> {
    /// Those that have a weight, in the order that was given.
    fn weighted<T>(&self, tensor: &str, all: impl Iterator<Item = (usize, T)>) -> Vec<(usize, f64, T)> {
        let weigh = |(place, it)| (place, self.weights.of(place, tensor), it);
        all.map(weigh).filter(|(_, weight, _)| *weight != 0.0).collect()
    }

    fn wholes(&mut self) -> Result<Vec<(&'m Replacement, Named)>> {
        let mut all: BTreeMap<&str, Vec<(usize, &'m Replacement)>> = BTreeMap::new();
        for (place, adapter) in self.adapters.iter().enumerate() {
            adapter.replacements().iter().for_each(|it| all.entry(&it.tensor).or_default().push((place, it)));
        }
        let mut taken = Vec::new();
        for (tensor, all) in all {
            let all = self.weighted(tensor, all.into_iter());
            let versions: Vec<_> = all.iter().map(|(place, weight, it)| Version::whole(*place, *weight, &it.with)).collect();
            let Some((_, _, first)) = all.first() else { continue };
            if let Some(with) = self.mixed("full tensor", tensor, "whole", &versions)? {
                taken.push((*first, with));
            }
        }
        Ok(taken)
    }

    fn rescaled(&mut self) -> Result<Vec<(&'m Rescaling, Named)>> {
        let mut all: BTreeMap<&str, Vec<(usize, &'m Rescaling)>> = BTreeMap::new();
        for (place, adapter) in self.adapters.iter().enumerate() {
            adapter.rescalings().iter().for_each(|it| all.entry(&it.tensor).or_default().push((place, it)));
        }
        let mut taken = Vec::new();
        for (tensor, all) in all {
            let all = self.weighted(tensor, all.into_iter());
            let Some((_, _, first)) = all.first() else { continue };
            if let Some((place, ..)) = all.iter().find(|(_, _, it)| (it.axis, it.orientation) != (first.axis, first.orientation))
            {
                let message = format!(
                    "{tensor:?} is multiplied along {:?} here and along {:?} elsewhere",
                    it_axis(&all, *place),
                    first.axis
                );
                self.problems
                    .push(Diagnostic::new(rules::ORIENTATION, message).file(self.adapters[*place].label()).tensor(tensor));
                continue;
            }
            let versions: Vec<_> = all.iter().map(|(place, weight, it)| Version::whole(*place, *weight, &it.by)).collect();
            if let Some(by) = self.mixed("multiplier", tensor, "by", &versions)? {
                taken.push((*first, by));
            }
        }
        Ok(taken)
    }

    /// Row by row, as each may be trained by others.
    fn rows(&mut self, whole: &[(&'m Replacement, Named)]) -> Result<Vec<(String, Vec<u64>, Named)>> {
        let mut all: BTreeMap<&str, Vec<(usize, &'m RowReplacement)>> = BTreeMap::new();
        for (place, adapter) in self.adapters.iter().enumerate() {
            adapter.rows().iter().for_each(|it| all.entry(&it.tensor).or_default().push((place, it)));
        }
        let mut taken = Vec::new();
        for (tensor, all) in all {
            let all = self.weighted(tensor, all.into_iter());
            let Some((_, _, first)) = all.first() else { continue };
            let row_shape = |it: &RowReplacement| it.with.info().shape.dims().iter().skip(1).copied().collect::<Vec<u64>>();
            let inner = row_shape(first);
            if let Some((place, ..)) = all.iter().find(|(_, _, it)| row_shape(it) != inner) {
                let message = format!("rows of {tensor:?} have another size here than elsewhere");
                self.problems
                    .push(Diagnostic::new(rules::SHAPE_FITS, message).file(self.adapters[*place].label()).tensor(tensor));
                continue;
            }
            let replaced = whole.iter().any(|(it, _)| it.tensor == tensor);
            if replaced && self.policy == PartsPolicy::Refuse && all.len() < self.owners(tensor) {
                self.refuse("row", tensor, "one adapter replaces the tensor, and another one rows of it");
                continue;
            }
            let len: u64 = inner.iter().product();
            let mut by_row: BTreeMap<u64, Vec<Version<'_>>> = BTreeMap::new();
            for (place, weight, it) in &all {
                for (i, row) in it.rows.iter().enumerate() {
                    let version =
                        Version { adapter: *place, weight: *weight, factor: &it.with, first: i as u64 * len, count: len };
                    by_row.entry(*row).or_default().push(version);
                }
            }
            let dtype = common_dtype(all.iter().map(|(_, _, it)| &it.with));
            let rows: Vec<u64> = by_row.keys().copied().collect();
            let dims = std::iter::once(rows.len() as u64).chain(inner).collect();
            let info = TensorInfo { dtype, shape: Shape::new(dims).unwrap_or_default() };
            let name = format!("rows of {tensor}");
            let place = self.spool.reserve(&name, info);
            let float = float_of(dtype).unwrap_or_else(|| unreachable!("adapters hold plain floats only"));
            for (i, versions) in by_row.values().enumerate() {
                let Some(choice) = self.choose("row", tensor, versions)? else { continue };
                let values = self.values(&choice, versions, 0, len)?;
                let mut raw = vec![0; values.len() * float.size()];
                float.narrow(&values, &mut raw);
                self.spool.put(place, (i * raw.len()) as u64, &raw)?;
            }
            taken.push((tensor.to_owned(), rows, Named::Spooled(name)));
        }
        Ok(taken)
    }

    /// How many adapters replace a tensor, or rows of it.
    fn owners(&self, tensor: &str) -> usize {
        let has = |adapter: &&&Adapter| {
            adapter.replacements().iter().any(|it| it.tensor == tensor) || adapter.rows().iter().any(|it| it.tensor == tensor)
        };
        self.adapters.iter().filter(has).count()
    }

    /// Magnitudes make an update something else than a term of a sum, but where it is the only one.
    fn magnitudes(&mut self, sums: &[Sum]) -> Result<Vec<(String, Named)>> {
        let mut taken = Vec::new();
        for sum in sums {
            let mut parts: Vec<_> = sum.parts.iter().collect();
            parts.sort_by_key(|part| part.adapter);
            let of = |part: &&super::align::Part| part.target.magnitude.is_some();
            let Some(first) = parts.iter().find(|part| of(part)) else { continue };
            let Some(magnitude) = &first.target.magnitude else { continue };
            if sum.parts.len() == 1 && first.weight == 1.0 {
                taken.push((sum.tensor.clone(), Named::Factor(magnitude.clone())));
                continue;
            }
            if self.policy == PartsPolicy::Refuse {
                let why = "with magnitudes (DoRA) the update is not a term of a sum";
                self.refuse("magnitude", &sum.tensor, why);
                continue;
            }
            let versions: Vec<Version<'_>> = parts
                .iter()
                .filter_map(|part| Some(Version::whole(part.adapter, part.weight, part.target.magnitude.as_ref()?)))
                .collect();
            *self.decided.entry("magnitude").or_default() += 1;
            let named = match self.policy {
                PartsPolicy::Average => self.mean("magnitude", &sum.tensor, "magnitude", &versions)?,
                _ => Some(Named::Factor(magnitude.clone())),
            };
            taken.extend(named.map(|named| (sum.tensor.clone(), named)));
        }
        Ok(taken)
    }

    /// Σ wₜ·sₜ·bₜ, in f64 and rounded once to F32.
    fn biases(&mut self, sums: &[Sum]) -> Result<Vec<(String, String, Named)>> {
        let mut taken = Vec::new();
        for sum in sums {
            let parts: Vec<_> = sum.parts.iter().filter_map(|part| Some((part, part.target.bias.as_ref()?))).collect();
            let Some((_, first)) = parts.first() else { continue };
            let (out, _) = sum.out_in();
            let mut total = vec![0.0; out as usize];
            for (part, bias) in &parts {
                let values = Version::whole(part.adapter, part.weight, &bias.delta).read(0, out)?;
                total.iter_mut().zip(values).for_each(|(total, value)| *total += part.scale() * value);
            }
            let shape = Shape::new(vec![out]).unwrap_or_default();
            let dtype =
                if common_dtype(parts.iter().map(|(_, bias)| &bias.delta)) == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
            let name = format!("bias of {}", sum.tensor);
            let place = self.spool.reserve(&name, TensorInfo { dtype, shape });
            let float = float_of(dtype).unwrap_or_else(|| unreachable!("one of two"));
            let mut raw = vec![0; total.len() * float.size()];
            float.narrow(&total, &mut raw);
            self.spool.put(place, 0, &raw)?;
            taken.push((sum.tensor.clone(), first.tensor.clone(), Named::Spooled(name)));
        }
        Ok(taken)
    }

    /// One of the versions, or their mean; `None` if it is refused.
    fn mixed(&mut self, what: &'static str, tensor: &str, part: &str, versions: &[Version<'_>]) -> Result<Option<Named>> {
        match self.choose(what, tensor, versions)? {
            None => Ok(None),
            Some(Choice::One(place)) => Ok(versions.get(place).map(|version| Named::Factor(version.factor.clone()))),
            Some(Choice::Mean) => self.mean(what, tensor, part, versions),
        }
    }

    fn mean(&mut self, what: &str, tensor: &str, part: &str, versions: &[Version<'_>]) -> Result<Option<Named>> {
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
            let mut raw = vec![0; values.len() * float.size()];
            float.narrow(&values, &mut raw);
            self.spool.put(place, from * float.size() as u64, &raw)?;
        }
        Ok(Some(Named::Spooled(name)))
    }

    /// Some values of what was chosen, summed in the order of the adapters.
    fn values(&self, choice: &Choice, versions: &[Version<'_>], from: u64, count: u64) -> Result<Vec<f64>> {
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
    fn choose(&mut self, what: &'static str, tensor: &str, versions: &[Version<'_>]) -> Result<Option<Choice>> {
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

    fn refuse(&mut self, what: &str, tensor: &str, why: &str) {
        let message = format!("the {what} of {tensor:?} has no sum: {why}");
        let help = "give --parts first or --parts average, or take it out of the adapters first";
        self.problems.push(Diagnostic::new(rules::METHOD_SUPPORTED, message).tensor(tensor).help(help));
    }
}

/// What an adapter multiplies along.
fn it_axis(all: &[(usize, f64, &Rescaling)], place: usize) -> Option<crate::adapter::Axis> {
    all.iter().find(|(owner, ..)| *owner == place).map(|(_, _, it)| it.axis)
}

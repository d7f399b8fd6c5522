//! What adapters hold beside low-rank updates: full tensors, rows, multipliers and magnitudes. A sum of them means something only where it
//! can be told without the base; elsewhere the policy decides, and nothing is dropped. Updates of biases are updates, and add up.

mod choice;
mod version;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::align::Sum;
use super::options::{CombineOptions, PartsPolicy};
use super::stacked::common_dtype;
use super::weights::Weights;
use crate::adapter::{Adapter, BiasDelta, Factor, Replacement, Rescaling, RowReplacement};
use crate::error::{Diagnostic, Error, Result};
use crate::exec::float_of;
use crate::kernel::Float;
use crate::op::spool::Spool;
use crate::report::text::plural;
use crate::rules;
use crate::tensor::{Dtype, Shape, TensorInfo, TensorSource};
use version::Version;

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

/// Where the versions are from, in the order that was given and in that of sums.
struct Mixer<'m> {
    adapters: &'m [&'m Adapter],
    order: &'m [usize],
    weights: &'m Weights<'m>,
    policy: PartsPolicy,
    /// The method leaves an update that is the only one as it is.
    keeps: bool,
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
    options: &CombineOptions,
    spool: Spool,
) -> Result<Mixed> {
    let (policy, keeps) = (options.parts, options.method.keeps_single_updates());
    let mut mixer = Mixer { adapters, order, weights, policy, keeps, spool, problems: Vec::new(), decided: BTreeMap::new() };
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

/// What the adapters have of one sort, each with its place among them, by the tensor that it is for.
fn by_tensor<'m, T>(
    adapters: &[&'m Adapter],
    of: impl Fn(&'m Adapter) -> &'m [T],
    tensor: impl Fn(&'m T) -> &'m str,
) -> BTreeMap<&'m str, Vec<(usize, &'m T)>> {
    let mut all: BTreeMap<&str, Vec<(usize, &T)>> = BTreeMap::new();
    for (place, adapter) in adapters.iter().copied().enumerate() {
        of(adapter).iter().for_each(|it| all.entry(tensor(it)).or_default().push((place, it)));
    }
    all
}

/// Values as they are stored.
///
/// # Errors
/// `A-031`.
fn narrowed(values: &[f64], float: Float, tensor: &str) -> Result<Vec<u8>> {
    let mut raw = vec![0; values.len() * float.size()];
    float.narrow(values, &mut raw);
    let mut back = vec![0.0f64; values.len()];
    float.widen(&raw, &mut back);
    if back.iter().all(|value| value.is_finite()) {
        return Ok(raw);
    }
    let message = format!("what is stored beside the update of {tensor:?} leaves the range of {float:?}");
    Err(Error::new(rules::RESULT_FINITE, message).tensor(tensor).help("give smaller weights"))
}

/// A tensor of the result before the spool is read.
#[derive(Clone)]
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
        let mut taken = Vec::new();
        for (tensor, all) in by_tensor(self.adapters, Adapter::replacements, |it| &it.tensor) {
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
        let (mut taken, mut known) = (Vec::new(), BTreeMap::<_, Option<Named>>::new());
        for (tensor, all) in by_tensor(self.adapters, Adapter::rescalings, |it| &it.tensor) {
            let all = self.weighted(tensor, all.into_iter());
            let Some((_, _, first)) = all.first() else { continue };
            let along = |it: &Rescaling| (it.axis, it.orientation);
            if let Some((place, _, it)) = all.iter().find(|(_, _, it)| along(it) != along(first)) {
                let (here, there) = (it.axis, first.axis);
                let message = format!("{tensor:?} is multiplied along {here:?} here and along {there:?} elsewhere");
                self.problems
                    .push(Diagnostic::new(rules::ORIENTATION, message).file(self.adapters[*place].label()).tensor(tensor));
                continue;
            }
            let versions: Vec<_> = all.iter().map(|(place, weight, it)| Version::whole(*place, *weight, &it.by)).collect();
            // Weight and bias of a layer have their multiplier in common.
            let key: Vec<_> = all.iter().map(|(place, weight, it)| (*place, weight.to_bits(), it.by.name())).collect();
            let by = match known.get(&key) {
                Some(by) => by.clone(),
                None => self.mixed("multiplier", tensor, "by", &versions)?,
            };
            taken.extend(by.clone().map(|by| (*first, by)));
            known.insert(key, by);
        }
        Ok(taken)
    }

    /// Row by row, as each may be trained by others.
    fn rows(&mut self, whole: &[(&'m Replacement, Named)]) -> Result<Vec<(String, Vec<u64>, Named)>> {
        let mut taken = Vec::new();
        for (tensor, all) in by_tensor(self.adapters, Adapter::rows, |it| &it.tensor) {
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
                let raw = narrowed(&values, float, tensor)?;
                self.spool.put(place, (i * raw.len()) as u64, &raw)?;
            }
            taken.push((tensor.to_owned(), rows, Named::Spooled(name)));
        }
        Ok(taken)
    }

    /// How many adapters replace a tensor, or rows of it.
    fn owners(&self, tensor: &str) -> usize {
        let has = |(place, adapter): &(usize, &&Adapter)| {
            let mut whole = adapter.replacements().iter().map(|it| &it.tensor).chain(adapter.rows().iter().map(|it| &it.tensor));
            self.weights.of(*place, tensor) != 0.0 && whole.any(|it| it == tensor)
        };
        self.adapters.iter().enumerate().filter(has).count()
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
            if self.keeps && sum.parts.len() == 1 && first.weight == 1.0 {
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
            self.spool.put(place, 0, &narrowed(&total, float, &sum.tensor)?)?;
            taken.push((sum.tensor.clone(), first.tensor.clone(), Named::Spooled(name)));
        }
        Ok(taken)
    }
}

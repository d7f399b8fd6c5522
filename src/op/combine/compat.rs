//! `add_weighted_adapter` of PEFT 0.21.2 (`peft/tuners/lora/model.py`), for those who have to reproduce or to compare what it made: the same
//! steps in the same order and precision. Five of its eleven types work on A and B by themselves, so that their results are no sums of
//! updates; the report says how far they are from it. Where PEFT writes a wrong scale or a rank that cannot be loaded, the scale and the rank
//! that it means are written.

use std::sync::Arc;

use super::align::{Part, Sum};
use super::made::{Each, Made};
use super::mixed::Mixed;
use super::options::CombineOptions;
use super::peft::{PeftCombination, PeftKind};
use super::wanted::{name, shapes, targets};
use crate::adapter::{Adapter, AdapterParts};
use crate::error::{Error, Result};
use crate::exec::{self, Progress, read_factors};
use crate::kernel::fusion::key;
use crate::kernel::fusion::peft::{disjoint_merge, prune_by_chance, prune_by_magnitude, task_arithmetic};
use crate::kernel::{Dice, Float};
use crate::op::crew;
use crate::op::spool::Spool;
use crate::rules;
use crate::tensor::{Dtype, TensorInfo, TensorSource};

/// With a single adapter PEFT does `linear`, whatever was asked for (`_check_add_weighted_adapter`).
pub(super) fn settled(peft: PeftCombination, adapters: usize) -> PeftCombination {
    if adapters == 1 { PeftCombination { kind: PeftKind::Linear, ..peft } } else { peft }
}

/// What the types that work on factors are made with.
pub(super) struct Factors<'f> {
    pub(super) peft: PeftCombination,
    pub(super) mixed: &'f Mixed,
    pub(super) roots: &'f [String],
    pub(super) options: &'f CombineOptions,
    pub(super) progress: &'f dyn Progress,
}

impl Factors<'_> {
    /// The adapter that is stored; `parts` are those without targets.
    ///
    /// # Errors
    /// `A-002` for a tensor whose factors have different ranks; `A-008`, `A-031`, `E-001`, `E-002`, `E-004`, `E-006`.
    pub(super) fn made(&self, sums: &[Sum], parts: AdapterParts, spool: Spool) -> Result<Made> {
        for sum in sums {
            same_ranks(sum, self.peft.kind)?;
        }
        let sizes: Vec<u64> = sums.iter().map(|sum| sum.rank() * (sum.out_in().0 + sum.out_in().1) * sum.experts()).collect();
        exec::on_threads(&self.options.exec, || {
            crew::each(&sizes, |i| {
                if self.progress.cancelled() {
                    return Err(exec::interrupted());
                }
                self.one(&sums[i], &spool)
            })
        })?;
        let source: Arc<dyn TensorSource> = Arc::new(spool.finish());
        let ranks = sums.iter().map(|sum| (rank(sum), 1.0));
        let targets = targets(sums, ranks, &source, self.mixed)?;
        let each = sums.iter().map(|sum| Each::of_sum(sum, rank(sum), 0.0, 0.0)).collect();
        let adapter = Adapter::new(AdapterParts { targets, ..parts }, &self.options.limits)?;
        Ok(Made { adapter, each, warnings: Vec::new() })
    }

    fn one(&self, sum: &Sum, spool: &Spool) -> Result<()> {
        let (shape_a, shape_b) = shapes(sum, rank(sum))?;
        let place_a = spool.reserve(&name(sum, "A"), TensorInfo { dtype: Dtype::F32, shape: shape_a });
        let place_b = spool.reserve(&name(sum, "B"), TensorInfo { dtype: Dtype::F32, shape: shape_b });
        let mut parts: Vec<&Part> = sum.parts.iter().collect();
        parts.sort_by_key(|part| part.adapter);
        for expert in 0..sum.experts() {
            let (mut all_a, mut all_b) = (Vec::new(), Vec::new());
            for part in &parts {
                let (b, a) = read_factors(&part.target, expert, 0..sum.out_in().0)?;
                let narrow = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect::<Vec<f32>>();
                all_a.push(narrow(a));
                all_b.push(narrow(b));
            }
            let roots: Vec<f64> = parts.iter().map(|part| part.scale().abs().sqrt()).collect();
            let weights_b: Vec<f32> = roots.iter().map(|root| *root as f32).collect();
            let sign = |part: &&Part| if part.scale() >= 0.0 { 1.0 } else { -1.0 };
            let weights_a: Vec<f32> = parts.iter().zip(&roots).map(|(part, root)| (root * sign(part)) as f32).collect();
            for (place, all, weights, which) in [(place_a, all_a, weights_a, 0), (place_b, all_b, weights_b, 1)] {
                let merged = self.merged(all, &weights, |t, index| {
                    let root = self.roots.get(parts[t].adapter).map_or("", String::as_str);
                    let key = key(self.peft.seed, &sum.tensor, 2 * expert + which, root);
                    Dice::unit(key, index) < self.peft.density
                });
                if merged.iter().any(|value| !value.is_finite()) {
                    let message = format!("a factor of {:?} leaves the range of F32", sum.tensor);
                    return Err(Error::new(rules::RESULT_FINITE, message).tensor(&sum.tensor));
                }
                let wide: Vec<f64> = merged.iter().map(|value| f64::from(*value)).collect();
                let mut raw = vec![0; 4 * wide.len()];
                Float::F32.narrow(&wide, &mut raw);
                spool.put(place, expert * raw.len() as u64, &raw)?;
            }
        }
        Ok(())
    }

    /// One factor of all adapters; `keeps` says which values of the t-th chance leaves.
    fn merged(&self, mut tensors: Vec<Vec<f32>>, weights: &[f32], keeps: impl Fn(usize, u64) -> bool) -> Vec<f32> {
        let PeftCombination { kind, density, majority, .. } = self.peft;
        for (t, tensor) in tensors.iter_mut().enumerate() {
            match kind {
                _ if kind.takes_seed() => prune_by_chance(tensor, density, |index| keeps(t, index)),
                _ if kind.takes_density() => prune_by_magnitude(tensor, density),
                _ => {}
            }
        }
        if kind.takes_majority() {
            disjoint_merge(&tensors, weights, majority.kernel())
        } else {
            task_arithmetic(&tensors, weights)
        }
    }
}

fn rank(sum: &Sum) -> u64 {
    sum.parts.first().map_or(1, |part| part.target.scaling.rank)
}

fn same_ranks(sum: &Sum, kind: PeftKind) -> Result<()> {
    let ranks: Vec<u64> = sum.parts.iter().map(|part| part.target.scaling.rank).collect();
    if ranks.iter().all(|rank| *rank == ranks[0]) {
        return Ok(());
    }
    let message = format!("{} adds A to A and B to B, and those of {:?} have ranks {ranks:?}", kind.name(), sum.tensor);
    Err(Error::new(rules::RANK_AGREES, message)
        .tensor(&sum.tensor)
        .help("PEFT refuses it too; --method linear adds updates of any ranks"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::safetensors::{SafetensorsFile, Strictness};
    use crate::io::ReadMode;
    use crate::limits::Limits;
    use crate::op::combine::peft::MajoritySign;

    fn ulps(x: f32, y: f32) -> u64 {
        let place = |x: f32| if x.is_sign_negative() { -i64::from(x.to_bits() & 0x7fff_ffff) } else { i64::from(x.to_bits()) };
        place(x).abs_diff(place(y))
    }

    /// Every operator of `merge_utils`, chance included: its masks are in the golden.
    #[test]
    fn the_operators_are_those_of_peft() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/goldens/combine/operators.safetensors");
        let file = SafetensorsFile::open(path.as_ref(), ReadMode::Read, Strictness::Strict, &Limits::default()).unwrap();
        let read = |name: &str| -> Vec<f32> {
            let mut raw = vec![0; file.info(name).unwrap().bytes() as usize];
            file.read(name, 0, &mut raw).unwrap();
            raw.as_chunks::<4>().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect()
        };
        let tensors: Vec<Vec<f32>> = (0..3).map(|t| read(&format!("x{t}"))).collect();
        let masks: Vec<Vec<f32>> = (0..3).map(|t| read(&format!("mask{t}"))).collect();
        let (weights, density) = (read("weights"), 0.6);
        let large: Vec<Vec<f32>> = tensors
            .iter()
            .cloned()
            .map(|mut x| {
                prune_by_magnitude(&mut x, density);
                x
            })
            .collect();
        let lucky: Vec<Vec<f32>> = tensors
            .iter()
            .cloned()
            .zip(&masks)
            .map(|(mut x, mask)| {
                prune_by_chance(&mut x, density, |index| mask[index as usize] != 0.0);
                x
            })
            .collect();
        let same = |found: Vec<f32>, name: &str| {
            let wanted = read(name);
            let most = found.iter().zip(&wanted).map(|(x, y)| ulps(*x, *y)).max().unwrap();
            assert!(found.len() == wanted.len() && most <= 2, "{name}: {most} ulps");
        };
        same(task_arithmetic(&tensors, &weights), "task_arithmetic");
        same(task_arithmetic(&large, &weights), "magnitude_prune");
        same(task_arithmetic(&lucky, &weights), "dare_linear");
        for majority in [MajoritySign::Total, MajoritySign::Frequency] {
            same(disjoint_merge(&large, &weights, majority.kernel()), &format!("ties {}", majority.name()));
            same(disjoint_merge(&lucky, &weights, majority.kernel()), &format!("dare_ties {}", majority.name()));
        }
    }
}

//! Methods that look at single values: what they make of each matrix is computed once into a file without a name, from which its largest
//! components are found as those of a weight that is extracted. So the error is known, and memory does not follow the matrix.

use std::sync::Arc;

use super::align::Sum;
use super::blend::Blend;
use super::made::{Each, Made};
use super::method::CombineMethod;
use super::mixed::Mixed;
use super::options::CombineOptions;
use super::wanted::{name, shapes, targets};
use crate::adapter::{Adapter, AdapterParts};
use crate::error::{Diagnostic, Error, Result};
use crate::exec::{self, Difference, Progress, Weight};
use crate::kernel::{Float, Isa};
use crate::op::crew;
use crate::op::extract::{Decomposed, ExtractOptions, Split, Task, bytes, decompose};
use crate::op::rank::RankRule;
use crate::op::spool::Spool;
use crate::report::text::plural;
use crate::rules;
use crate::tensor::{Dtype, Shape, TensorInfo, TensorSource};

/// What is needed besides the sums.
pub(super) struct Site<'s> {
    pub(super) mixed: &'s Mixed,
    pub(super) roots: &'s [String],
    pub(super) options: &'s CombineOptions,
    pub(super) method: CombineMethod,
    /// For ranks; none keeps as many components as the adapters have together.
    pub(super) rule: Option<RankRule>,
    pub(super) split: Split,
    pub(super) progress: &'s dyn Progress,
    /// Makes a spool.
    pub(super) spool: &'s (dyn Fn() -> Result<Spool> + Sync),
}

/// What became of a sum.
struct Stored {
    rank: u64,
    wanted_squared: f64,
    error_squared: f64,
    singular_values: Option<Vec<f64>>,
}

impl Site<'_> {
    /// The adapter that is stored; `parts` are those without targets.
    ///
    /// # Errors
    /// `A-008`, `A-012` if nothing is left, `A-031`, `E-012`, `E-001`, `E-002`, `E-004`, `E-006`.
    pub(super) fn made(&self, sums: &[Sum], parts: AdapterParts) -> Result<Made> {
        let sizes: Vec<u64> = sums.iter().map(|sum| sum.out_in().0 * sum.out_in().1 * sum.experts()).collect();
        self.progress.expect(sizes.iter().sum::<u64>().saturating_mul(4));
        let spool = (self.spool)()?;
        let stored = exec::on_threads(&self.options.exec, || crew::each(&sizes, |i| self.one(&sums[i], &spool)))?;
        let source: Arc<dyn TensorSource> = Arc::new(spool.finish());
        let (mut kept, mut ranks, mut warnings, mut each) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (sum, stored) in sums.iter().zip(&stored) {
            each.push(Each::of_sum(sum, stored.rank, stored.wanted_squared, stored.error_squared));
            if stored.rank > 0 {
                kept.push(sum);
                ranks.push((stored.rank, 1.0));
            }
        }
        if kept.len() < sums.len() {
            let count = plural((sums.len() - kept.len()) as u64, "target");
            warnings.push(Diagnostic::new(rules::ADAPTER_NOT_EMPTY, format!("nothing is left of {count}")));
        }
        let mut targets = targets(kept, ranks.into_iter(), &source, self.mixed)?;
        let values = stored.into_iter().filter(|stored| stored.rank > 0).map(|stored| stored.singular_values);
        targets.iter_mut().zip(values).for_each(|(target, values)| target.singular_values = values);
        let adapter = Adapter::new(AdapterParts { targets, ..parts }, &self.options.limits)?;
        Ok(Made { adapter, each, warnings })
    }

    /// Decomposes one sum into the spool.
    fn one(&self, sum: &Sum, spool: &Spool) -> Result<Stored> {
        let dtype = self.options.dtype.unwrap_or(Dtype::F32);
        let rule = self.rule.unwrap_or(RankRule::Fixed(sum.rank()));
        let extract = ExtractOptions { rank: rule, dtype, split: self.split, ..Default::default() };
        let found = (0..sum.experts()).map(|expert| self.matrix(sum, expert, &extract)).collect::<Result<Vec<_>>>()?;
        // With a magnitude or a bias update it is more than its factors, and stays when these are zero.
        let least = usize::from(self.mixed.biases.contains_key(&sum.tensor) || self.mixed.magnitudes.contains_key(&sum.tensor));
        let rank = found.iter().map(|found| found.rank).max().unwrap_or(0).max(least);
        let total = |of: fn(&Decomposed) -> f64| found.iter().map(of).sum();
        let (wanted_squared, error_squared) = (total(|found| found.norm_squared), total(|found| found.error_squared));
        let stored = Stored { rank: rank as u64, wanted_squared, error_squared, singular_values: None };
        if rank == 0 {
            return Ok(stored);
        }
        let (shape_a, shape_b) = shapes(sum, rank as u64)?;
        let place_a = spool.reserve(&name(sum, "A"), TensorInfo { dtype, shape: shape_a });
        let place_b = spool.reserve(&name(sum, "B"), TensorInfo { dtype, shape: shape_b });
        let (out, inner) = sum.out_in();
        let float = exec::float_of(dtype).unwrap_or(Float::F32);
        for (expert, found) in found.iter().enumerate() {
            let (b, a) = found.factors.as_ref().map_or((None, None), |(b, a)| (Some(b.as_ref()), Some(a.as_ref())));
            let (b, a) = (bytes(b, (out as usize, rank), float), bytes(a, (rank, inner as usize), float));
            spool.put(place_b, (expert * b.len()) as u64, &b)?;
            spool.put(place_a, (expert * a.len()) as u64, &a)?;
        }
        let values = match &found[..] {
            [one] if one.values.len() >= rank && sum.parts.iter().all(|part| part.target.experts().is_none()) => {
                Some(one.values[..rank].to_vec())
            }
            _ => None,
        };
        Ok(Stored { singular_values: values, ..stored })
    }

    /// Decomposes one matrix.
    fn matrix(&self, sum: &Sum, expert: u64, extract: &ExtractOptions) -> Result<Decomposed> {
        let isa = if self.options.exec.portable { Isa::Portable } else { Isa::best() };
        let blend = Blend::new(sum, expert, self.method, self.roots, isa, self.progress)?;
        let scratch = (self.spool)()?;
        let shape = Shape::new(vec![blend.rows as u64, blend.cols as u64]).unwrap_or_default();
        let place = scratch.reserve(&sum.tensor, TensorInfo { dtype: Dtype::F32, shape });
        let mut raw = Vec::new();
        blend.each(|rows, values| {
            raw.resize(4 * values.len(), 0);
            Float::F32.narrow(values, &mut raw);
            let mut back = vec![0.0f32; values.len()];
            Float::F32.widen(&raw, &mut back);
            if back.iter().any(|value| !value.is_finite()) {
                let message = format!("the combined update of {:?} leaves the range of F32", sum.tensor);
                return Err(Error::new(rules::RESULT_FINITE, message).tensor(&sum.tensor).help("give smaller weights"));
            }
            self.progress.advance(raw.len() as u64);
            scratch.put(place, (4 * rows.start * blend.cols) as u64, &raw)
        })?;
        let source = scratch.finish();
        let weight = Weight { source: &source, name: &sum.tensor, float: Float::F32, first: 0 };
        let quiet = Quiet(self.progress);
        let d = Difference::new(weight, None, (blend.rows, blend.cols), isa, &quiet);
        let cap = if let RankRule::Fixed(rank) = extract.rank { rank } else { self.options.limits.rank };
        let task = Task {
            options: extract,
            rule: extract.rank,
            cap: usize::try_from(cap).unwrap_or(usize::MAX),
            key: expert,
            is_transposed: false,
        };
        decompose(&d, &task)
    }
}

/// Sweeps are not what is counted.
struct Quiet<'p>(&'p dyn Progress);

impl Progress for Quiet<'_> {
    fn expect(&self, _: u64) {}

    fn advance(&self, _: u64) {}

    fn cancelled(&self) -> bool {
        self.0.cancelled()
    }
}

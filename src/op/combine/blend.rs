//! One matrix of a result that is made value by value: a few rows of every update are computed from its factors, what the method drops is
//! dropped, and the rest is added up. The updates and the result are never held whole. What is kept depends on all values of an update; that
//! is found first, by reading it several times.
//!
//! A value of an update is scale · Σ b·a in f64, in the order of the rank: products of factors of up to 32 bits are exact, so that it is the
//! same on every machine, and with it what is kept.

use std::ops::Range;

use super::align::{Part, Sum};
use super::method::CombineMethod;
use crate::error::{Error, Result};
use crate::exec::{Progress, interrupted, overflowed, read_factors};
use crate::kernel::fusion::{Keep, Reading, Tally, key};
use crate::kernel::{self, Isa, delta_tile};

/// Values of a tile of one update, about what a cache holds with those of a few others.
const TILE: usize = 1 << 15;

/// One update.
struct Update<'p> {
    /// `(rows, rank)`.
    left: Vec<f64>,
    /// `(rank, cols)`.
    right: Vec<f64>,
    rank: usize,
    scale: f64,
    cols: usize,
    tensor: &'p str,
    isa: Isa,
    progress: &'p dyn Progress,
}

impl Update<'_> {
    fn rows(&self) -> usize {
        self.left.len() / self.rank.max(1)
    }

    /// Some rows of it.
    ///
    /// # Errors
    /// `A-031`.
    fn values(&self, rows: &Range<usize>, out: &mut Vec<f64>) -> Result<()> {
        let left = &self.left[rows.start * self.rank..rows.end * self.rank];
        let part = kernel::Part { left, right: &self.right, rank: self.rank, scale: self.scale };
        out.resize(rows.len() * self.cols, 0.0);
        if delta_tile(self.isa, self.cols, &[part], out) { Ok(()) } else { Err(overflowed(self.tensor)) }
    }
}

/// Rows of a tile of so many columns.
fn height(cols: usize) -> usize {
    (TILE / cols.max(1)).clamp(1, 64)
}

impl Reading for Update<'_> {
    type Error = Error;

    fn each(&self, step: &mut dyn FnMut(u64, &[f64])) -> Result<()> {
        let mut values = Vec::new();
        let rows = self.rows();
        for start in (0..rows).step_by(height(self.cols)) {
            if self.progress.cancelled() {
                return Err(interrupted());
            }
            let tile = start..(start + height(self.cols)).min(rows);
            self.values(&tile, &mut values)?;
            step((start * self.cols) as u64, &values);
        }
        Ok(())
    }
}

/// One of the updates of a matrix.
struct Member<'p> {
    update: Update<'p>,
    keep: Keep,
    /// Multiplies what is kept; 1 where the update has it already.
    weight: f64,
}

/// What is made of several updates of one matrix.
pub(super) struct Blend<'p> {
    members: Vec<Member<'p>>,
    tally: Tally,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl<'p> Blend<'p> {
    /// Reads the factors, and finds out what is kept of each update. `roots` are the content roots of the adapters.
    ///
    /// # Errors
    /// `A-008`, `A-031`, `E-001`, `E-004`, `E-006`.
    pub(super) fn new(
        sum: &'p Sum,
        expert: u64,
        method: CombineMethod,
        roots: &[String],
        isa: Isa,
        progress: &'p dyn Progress,
    ) -> Result<Self> {
        let (out, inner) = sum.out_in();
        let by_value = method.by_value();
        let mut members = Vec::with_capacity(sum.parts.len());
        let mut parts: Vec<&Part> = sum.parts.iter().collect();
        if let CombineMethod::Peft(_) = method {
            parts.sort_by_key(|part| part.adapter);
        }
        for part in parts {
            let (left, right) = read_factors(&part.target, expert, 0..out)?;
            let rank = part.target.scaling.rank as usize;
            let (scale, weight) = match method {
                CombineMethod::Peft(_) => (part.target.scaling.effective(), part.weight),
                _ => (part.scale(), 1.0),
            };
            let update = Update { left, right, rank, scale, cols: inner as usize, tensor: &sum.tensor, isa, progress };
            let root = roots.get(part.adapter).map_or("", String::as_str);
            let keep = by_value.drops.keep(&update, out * inner, |seed| key(seed, &sum.tensor, expert, root))?;
            members.push(Member { update, keep, weight });
        }
        Ok(Blend { members, tally: by_value.tally, rows: out as usize, cols: inner as usize })
    }

    /// Computes all rows, a few at a time, from the first to the last.
    ///
    /// # Errors
    /// `A-031`, `E-006`, and the first of `step`.
    pub(super) fn each(&self, mut step: impl FnMut(Range<usize>, &[f64]) -> Result<()>) -> Result<()> {
        let mut tiles: Vec<Vec<f64>> = vec![Vec::new(); self.members.len()];
        let mut out = Vec::new();
        for start in (0..self.rows).step_by(height(self.cols)) {
            let rows = start..(start + height(self.cols)).min(self.rows);
            for (member, tile) in self.members.iter().zip(&mut tiles) {
                if member.update.progress.cancelled() {
                    return Err(interrupted());
                }
                member.update.values(&rows, tile)?;
                for (row, i) in tile.chunks_exact_mut(self.cols).zip(rows.clone()) {
                    member.keep.row(row, (i * self.cols) as u64, 1);
                }
            }
            out.resize(rows.len() * self.cols, 0.0);
            let terms: Vec<(f64, &[f64])> =
                self.members.iter().zip(&tiles).map(|(member, tile)| (member.weight, &tile[..])).collect();
            self.tally.of(&terms, &mut out);
            step(rows, &out)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Adapter;
    use crate::op::combine::align::align;
    use crate::op::combine::weights::Weights;

    fn adapters() -> Vec<Adapter> {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/adapters");
        ["llama-qv-r8", "llama-all-r4", "llama-rslora"].map(|name| crate::open_adapter(format!("{root}/{name}")).unwrap()).into()
    }

    fn sums(adapters: &[Adapter], weights: &[f64]) -> Vec<Sum> {
        let all: Vec<&Adapter> = adapters.iter().collect();
        let order: Vec<usize> = (0..all.len()).collect();
        align(&all, &order, &Weights::new(weights.to_vec(), &[]).unwrap()).unwrap()
    }

    const ROOTS: [&str; 3] = ["one", "two", "three"];

    fn whole(sum: &Sum, method: CombineMethod, isa: Isa) -> Vec<f64> {
        let blend = Blend::new(sum, 0, method, &ROOTS.map(str::to_owned), isa, &()).unwrap();
        let mut all = Vec::new();
        blend
            .each(|_, values| {
                all.extend_from_slice(values);
                Ok(())
            })
            .unwrap();
        all
    }

    /// The updates by definition: all of each, with the weight.
    fn dense(sum: &Sum) -> Vec<Vec<f64>> {
        let one = |part: &Part| {
            let (out, inner) = part.target.out_in();
            let (b, a) = read_factors(&part.target, 0, 0..out).unwrap();
            let (rank, inner) = (part.target.scaling.rank as usize, inner as usize);
            let at =
                |n: usize| (0..rank).fold(0.0, |sum, k| sum + b[n / inner * rank + k] * a[k * inner + n % inner]) * part.scale();
            (0..out as usize * inner).map(at).collect()
        };
        sum.parts.iter().map(one).collect()
    }

    /// What is left when all but the values with ranks `from..to` by falling size are dropped, by sorting.
    fn sorted(update: &[f64], from: usize, to: usize) -> Vec<f64> {
        let mut order: Vec<usize> = (0..update.len()).collect();
        order.sort_by(|x, y| update[*y].abs().partial_cmp(&update[*x].abs()).unwrap());
        let mut left = vec![0.0; update.len()];
        order[from..to].iter().for_each(|i| left[*i] = update[*i]);
        left
    }

    /// The election of TIES, literally.
    fn elected(updates: &[Vec<f64>]) -> Vec<f64> {
        let at = |i: usize| {
            let sign = if updates.iter().map(|u| u[i]).sum::<f64>() >= 0.0 { 1.0 } else { -1.0 };
            let of: Vec<f64> = updates.iter().map(|u| u[i]).filter(|x| *x != 0.0 && x.signum() == sign).collect();
            if of.is_empty() { 0.0 } else { of.iter().sum::<f64>() / of.len() as f64 }
        };
        (0..updates[0].len()).map(at).collect()
    }

    fn added(updates: &[Vec<f64>]) -> Vec<f64> {
        (0..updates[0].len()).map(|i| updates.iter().map(|u| u[i]).sum()).collect()
    }

    fn same(found: &[f64], wanted: &[f64], what: &str) {
        assert_eq!(found.len(), wanted.len());
        let largest = wanted.iter().fold(0.0f64, |most, x| most.max(x.abs()));
        assert!(largest > 0.0, "{what}: nothing is left");
        for (i, (x, y)) in found.iter().zip(wanted).enumerate() {
            assert!((*x == 0.0) == (*y == 0.0) && (x - y).abs() <= 1e-12 * largest, "{what} at {i}: {x:e} for {y:e}");
        }
    }

    #[test]
    fn what_is_streamed_is_what_sorting_all_values_gives() {
        let adapters = adapters();
        for weights in [[1.0, 1.0, 1.0], [0.7, -0.4, 1.3]] {
            for sum in sums(&adapters, &weights) {
                let updates = dense(&sum);
                let len = updates[0].len();
                for density in [0.03, 0.2, 0.5, 1.0] {
                    let count = (density * len as f64) as usize;
                    let kept: Vec<Vec<f64>> = updates.iter().map(|u| sorted(u, 0, count)).collect();
                    for isa in Isa::available() {
                        same(&whole(&sum, CombineMethod::Ties { density }, isa), &elected(&kept), "ties");
                        same(&whole(&sum, CombineMethod::MagnitudePrune { density }, isa), &added(&kept), "magnitude-prune");
                    }
                    let dropped = ((0.01 * len as f64) as usize).min(len - count);
                    let middle: Vec<Vec<f64>> = updates.iter().map(|u| sorted(u, dropped, dropped + count)).collect();
                    let method = CombineMethod::Breadcrumbs { density, outliers: 0.01 };
                    same(&whole(&sum, method, Isa::best()), &added(&middle), "breadcrumbs");
                }
            }
        }
    }

    /// Chance decides for each adapter by itself: what it leaves of one is found by giving that one alone.
    #[test]
    fn chance_drops_values_of_each_update_and_divides_the_rest() {
        let adapters = adapters();
        let all = sums(&adapters, &[1.0, 1.0, 1.0]);
        let alone: Vec<Vec<Sum>> =
            (0..3).map(|t| sums(&adapters, &[0, 1, 2].map(|other| if other == t { 1.0 } else { 0.0 }))).collect();
        let (density, epsilon, seed) = (0.4, 0.3, 7);
        for sum in all.iter().filter(|sum| sum.parts.len() > 1) {
            let left = |method: CombineMethod| -> Vec<Vec<f64>> {
                let part = |t: usize| alone[t].iter().find(|one| one.tensor == sum.tensor);
                sum.parts.iter().map(|p| whole(part(p.adapter).unwrap(), method, Isa::best())).collect()
            };
            let linear = CombineMethod::DareLinear { density, seed };
            let kept = left(linear);
            for (kept, update) in kept.iter().zip(dense(sum)) {
                let count = kept.iter().filter(|x| **x != 0.0).count() as f64 / kept.len() as f64;
                assert!((count - density).abs() < 5.0 * (density * (1.0 - density) / kept.len() as f64).sqrt());
                assert!(kept.iter().zip(&update).all(|(x, y)| *x == 0.0 || *x == y / density));
            }
            assert_ne!(
                kept[0].iter().map(|x| *x == 0.0).collect::<Vec<_>>(),
                kept[1].iter().map(|x| *x == 0.0).collect::<Vec<_>>()
            );
            same(&whole(sum, linear, Isa::best()), &added(&kept), "dare-linear");
            same(&whole(sum, CombineMethod::DareTies { density, seed }, Isa::best()), &elected(&kept), "dare-ties");
            assert_ne!(whole(sum, linear, Isa::best()), whole(sum, CombineMethod::DareLinear { density, seed: 8 }, Isa::best()));

            let della = CombineMethod::Della { density, epsilon, seed };
            let kept = left(della);
            let (_, inner) = sum.out_in();
            for (kept, update) in kept.iter().zip(dense(sum)) {
                for (kept, row) in kept.chunks_exact(inner as usize).zip(update.chunks_exact(inner as usize)) {
                    for (x, y) in kept.iter().zip(row).filter(|(x, _)| **x != 0.0) {
                        let below = row.iter().filter(|other| other.abs() < y.abs()).count() as f64;
                        let probability = density + epsilon * (below / (inner as f64 - 1.0) - 0.5);
                        assert!((x - y / probability).abs() <= 1e-12 * y.abs() / probability, "{x} of {y}");
                    }
                }
            }
            same(&whole(sum, della, Isa::best()), &elected(&kept), "della");
        }
    }
}

//! What comes out of a method: an adapter that can be stored, and what is known of each of its targets.

use super::align::Sum;
use super::measure;
use super::options::CombineOptions;
use super::wanted::Layout;
use crate::adapter::{Adapter, Target};
use crate::error::{Diagnostic, Result};
use crate::exec::{self, Progress};
use crate::op::crew;
use crate::op::resize::Cut;
use crate::report::CombinedTarget;

/// An adapter that can be stored, and what is known of its targets.
pub(super) struct Made {
    pub(super) adapter: Adapter,
    /// By the order of the sums.
    pub(super) each: Vec<Each>,
    pub(super) warnings: Vec<Diagnostic>,
}

/// What is known of a target. Squares, so that they add up.
pub(super) struct Each {
    tensor: String,
    adapters: u64,
    rank_sum: u64,
    rank: u64,
    /// ‖Σ wₜ·Δₜ‖².
    pub(super) sum_squared: f64,
    /// ‖wanted‖².
    pub(super) wanted_squared: f64,
    /// ‖stored − wanted‖².
    pub(super) error_squared: f64,
    /// ‖stored − Σ wₜ·Δₜ‖².
    pub(super) from_sum_squared: f64,
}

impl Each {
    /// Of a target whose wanted update is the sum, or taken for it until [`Made::away_from`] has measured the distance.
    pub(super) fn of_sum(sum: &Sum, rank: u64, sum_squared: f64, error_squared: f64) -> Self {
        Each {
            tensor: sum.tensor.clone(),
            adapters: sum.parts.len() as u64,
            rank_sum: sum.rank(),
            rank,
            sum_squared,
            wanted_squared: sum_squared,
            error_squared,
            from_sum_squared: error_squared,
        }
    }

    pub(super) fn report(self) -> CombinedTarget {
        CombinedTarget {
            norm: self.sum_squared.sqrt(),
            error: share(self.error_squared, self.wanted_squared),
            from_sum: share(self.from_sum_squared, self.sum_squared),
            tensor: self.tensor,
            adapters: self.adapters,
            rank_sum: self.rank_sum,
            rank: self.rank,
        }
    }
}

/// The quotient of two norms, by their squares; of nothing the norm itself.
pub(super) fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { (part / whole).sqrt() } else { part.sqrt() }
}

impl Made {
    /// Sums with a lower rank, or with another form.
    pub(super) fn cut(sums: &[Sum], cut: Cut) -> Self {
        let each = sums
            .iter()
            .zip(&cut.resized)
            .map(|(sum, resized)| Each::of_sum(sum, resized.report.rank, resized.norm_squared, resized.error_squared));
        Made { each: each.collect(), adapter: cut.adapter, warnings: cut.warnings }
    }

    /// Measures how far the stored updates are from `exact` sums, where the method wants something else.
    ///
    /// # Errors
    /// `A-008`, `A-031`, `E-001`, `E-004`, `E-006`.
    pub(super) fn away_from(mut self, exact: &[Target], options: &CombineOptions, progress: &dyn Progress) -> Result<Self> {
        let sizes: Vec<u64> = exact.iter().map(|target| target.a.info().bytes() + target.b.info().bytes()).collect();
        let stored = |exact: &Target| {
            let place = self.adapter.targets().binary_search_by(|target| target.tensor.cmp(&exact.tensor));
            place.ok().and_then(|place| self.adapter.targets().get(place))
        };
        let found = exec::on_threads(&options.exec, || {
            crew::each(&sizes, |i| {
                if progress.cancelled() {
                    return Err(exec::interrupted());
                }
                measure::norm_and_distance(&exact[i], stored(&exact[i]))
            })
        })?;
        for (each, (sum, from_sum)) in self.each.iter_mut().zip(found) {
            (each.sum_squared, each.from_sum_squared) = (sum, from_sum);
        }
        Ok(self)
    }
}

/// Norms, and what the rounding of factors that are side by side costs.
pub(super) fn measured(
    sums: &[Sum],
    exact: &[Target],
    stored: &[Target],
    layout: &Layout,
    options: &CombineOptions,
    progress: &dyn Progress,
) -> Result<Vec<Each>> {
    let sizes: Vec<u64> = exact.iter().map(|target| target.a.info().bytes() + target.b.info().bytes()).collect();
    progress.expect(sizes.iter().sum());
    exec::on_threads(&options.exec, || {
        crew::each(&sizes, |i| {
            progress.advance(sizes[i]);
            if progress.cancelled() {
                return Err(exec::interrupted());
            }
            let (norm, error) = layout.measured(&sums[i], i, &exact[i], &stored[i])?;
            Ok(Each::of_sum(&sums[i], sums[i].rank(), norm, error))
        })
    })
}

//! One matrix: its change, the components that are wanted of it, the two factors, and what is known of their error.

use faer::Mat;

use super::options::{ExtractOptions, Method, Split};
use crate::error::{Error, Result};
use crate::exec::{Difference, Weight, float_of};
use crate::kernel::Float;
use crate::kernel::lowrank::{Failure, Found, Goal, STEP, Share, Sweeps, Want, factors, iterate};
use crate::op::rank::RankRule;
use crate::rules;

/// Columns of a Krylov block at most: beyond, more blocks are better than wider ones.
const WIDEST: usize = 64;
/// Blocks at most.
const BLOCKS: usize = 24;
/// Values of the largest matrix that is decomposed exactly without being asked to: 256 MiB in f64.
const EXACT: usize = 1 << 25;
/// The smaller side up to which an exact decomposition is as quick as an iteration.
const SMALL: usize = 6 * STEP;
/// Singular values below this share of the largest are the rounding of f32, and have no vectors.
const RESOLUTION: f64 = 1.0 / (1u64 << 22) as f64;
/// Below this share of ‖D‖² the error is summed value by value, because in the difference of the norms it would be rounding.
const CANCELLED: f64 = 1e-4;
/// A difference of squares of norms, of products in f32, is uncertain by this share of ‖D‖².
const UNCERTAIN: f64 = 1e-5;
/// Below this share of the difference that survived rounding, what is left is not the difference.
pub(super) const SURVIVES: f64 = 0.9;

/// What is to be found of a matrix.
#[derive(Clone, Copy)]
pub(in super::super) struct Task<'o> {
    pub(in super::super) options: &'o ExtractOptions,
    /// The rule for this matrix: that of the options, or a rank that a budget has given it.
    pub(in super::super) rule: RankRule,
    pub(in super::super) cap: usize,
    /// Of the random start.
    pub(in super::super) key: u64,
    /// The stored matrix is `(in, out)`: its left factor is Aᵀ.
    pub(in super::super) is_transposed: bool,
}

/// How the components were found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Krylov,
    Exact,
}

/// What was found.
pub(in super::super) struct Decomposed {
    /// ‖D‖².
    pub(in super::super) norm_squared: f64,
    /// ‖W‖² of the base.
    pub(super) base_squared: f64,
    /// All singular values that are known, largest first; the first `rank` of them are those of the factors before they are rounded. With a
    /// metric they are those in it, and not those of the factors.
    pub(in super::super) values: Vec<f64>,
    /// Components that are kept; 0 if nothing is.
    pub(in super::super) rank: usize,
    /// `(rows, rank)` and `(rank, cols)`, in values of the factors' dtype; none if the rank is 0.
    pub(in super::super) factors: Option<(Mat<f64>, Mat<f64>)>,
    /// ‖D - B·A‖² after rounding.
    pub(in super::super) error_squared: f64,
    /// Estimated excess of the error before rounding over the smallest possible one, as a share of it.
    pub(super) excess: f64,
    /// An upper bound of ‖D - B·A‖₂.
    pub(super) spectral: f64,
    pub(super) method: Way,
    /// Krylov blocks.
    pub(super) blocks: usize,
    /// The largest singular value that rounding noise has; 0 if it was not asked for.
    pub(super) edge: f64,
    /// The share of the difference that survived rounding; 1 if it was not asked for.
    pub(super) gain: f64,
    /// With a metric: the relative error that was made small. The excess is that of this error.
    pub(super) weighted: Option<f64>,
}

impl Decomposed {
    /// A matrix of which nothing is kept.
    pub(super) fn nothing(norm_squared: f64, base_squared: f64) -> Self {
        Decomposed {
            norm_squared,
            base_squared,
            values: Vec::new(),
            rank: 0,
            factors: None,
            error_squared: norm_squared,
            excess: 0.0,
            spectral: norm_squared.sqrt(),
            method: Way::Krylov,
            blocks: 0,
            edge: 0.0,
            gain: 1.0,
            weighted: None,
        }
    }

    /// Rounding has destroyed the difference.
    pub(super) fn is_unrecoverable(&self) -> bool {
        self.gain < SURVIVES
    }
}

/// Decomposes the difference, and rounds the factors to the dtype of the options.
///
/// # Errors
/// `A-030` if a value is not finite, `A-031` if a factor is not in its dtype; `E-012` if no decomposition was found; `E-001`, `E-004`,
/// `E-006`.
pub(in super::super) fn decompose(d: &Difference<'_>, task: &Task<'_>) -> Result<Decomposed> {
    let width = task.width(d.rows.min(d.cols));
    let seen = d.first(width, task.key, task.rule == RankRule::Auto)?;
    let (edge, gain) = seen.noise.as_ref().map_or((0.0, 1.0), |noise| (noise.edge(), noise.gain()));
    let nothing = Decomposed { edge, gain, ..Decomposed::nothing(seen.norm_squared, seen.base_squared) };
    if seen.norm_squared == 0.0 || nothing.is_unrecoverable() {
        return Ok(nothing);
    }
    let matrix = Matrix { sweeps: d, dense: &|| d.dense(), tuned: d.tuned, norm_squared: seen.norm_squared, edge };
    let Components { found, rank, method } = matrix.components(&seen.start, task)?;
    drop(seen.start);
    let values = found.values().to_vec();
    let outside = (seen.norm_squared - found.captured()).max(0.0) + UNCERTAIN * seen.norm_squared;
    let next = values.get(rank).copied().unwrap_or(0.0);
    // The right spaces of the two parts are orthogonal to each other, so that their squares add up at most.
    let spectral = (next * next + outside).sqrt();
    let nothing = Decomposed { values, excess: found.excess, spectral, method, blocks: found.blocks, ..nothing };
    if rank == 0 {
        return Ok(nothing);
    }
    let made = factors(&found, rank, share(task.options.split, task.is_transposed), task.float(), seen.norm_squared);
    task.check_finite(d, &[&made.left, &made.right])?;
    let error_squared = match made.error_squared < CANCELLED * seen.norm_squared {
        true => d.distance_squared(&made.left, &made.right)?,
        false => made.error_squared,
    };
    let spectral = (spectral + made.rounding).min(error_squared.sqrt() * (1.0 + 1e-6));
    Ok(Decomposed { rank, factors: Some((made.left, made.right)), error_squared, spectral, ..nothing })
}

impl Task<'_> {
    /// Columns of a Krylov block for a matrix with this smaller side.
    pub(super) fn width(&self, smaller: usize) -> usize {
        let first = match self.rule {
            RankRule::Fixed(rank) => usize::try_from(rank).unwrap_or(smaller).min(smaller),
            _ => 2 * STEP,
        };
        first.next_multiple_of(STEP).clamp(STEP, WIDEST)
    }

    /// What the factors are stored as.
    pub(super) fn float(&self) -> Float {
        float_of(self.options.dtype).unwrap_or_else(|| unreachable!("the options were checked"))
    }

    /// # Errors
    /// `A-031` if a factor has left the range of its dtype.
    pub(super) fn check_finite(&self, d: &Difference<'_>, factors: &[&Mat<f64>]) -> Result<()> {
        let is_finite = |m: &Mat<f64>| (0..m.ncols()).all(|j| (0..m.nrows()).all(|i| m[(i, j)].is_finite()));
        if factors.iter().all(|factor| is_finite(factor)) {
            return Ok(());
        }
        let message = format!("the factors of {:?} leave the range of {}", d.tuned.name, self.options.dtype);
        Err(Error::new(rules::RESULT_FINITE, message).tensor(d.tuned.name).help("store them as f32 or bf16"))
    }
}

/// A matrix whose largest components are wanted.
pub(super) struct Matrix<'m, S> {
    pub(super) sweeps: &'m S,
    /// All of it.
    pub(super) dense: &'m dyn Fn() -> Result<Mat<f64>>,
    pub(super) tuned: Weight<'m>,
    /// The square of its norm.
    pub(super) norm_squared: f64,
    /// The largest singular value of noise in it.
    pub(super) edge: f64,
}

pub(super) struct Components {
    pub(super) found: Found,
    /// How many of them are kept.
    pub(super) rank: usize,
    pub(super) method: Way,
}

impl<S: Sweeps<Error = Error>> Matrix<'_, S> {
    /// The components that the rule asks for, and that are more than rounding.
    ///
    /// # Errors
    /// `E-012` if no decomposition was found; those of the products.
    pub(super) fn components(&self, start: &[f32], task: &Task<'_>) -> Result<Components> {
        let (rows, cols) = self.sweeps.shape();
        let (smaller, width) = (rows.min(cols), start.len() / cols.max(1));
        let cap = task.cap.min(smaller);
        let want = |values: &[f64]| task.rule.want(values, self.norm_squared, self.edge, cap).unwrap_or(Want::Rank(cap));
        let goal = Goal {
            width,
            tolerance: task.options.tolerance,
            most: (smaller / 2).min(BLOCKS * width),
            norm_squared: self.norm_squared,
            want: &want,
        };
        let (found, method) = self.find(start, &goal, task.options.method)?;
        let least = RESOLUTION * found.values().first().copied().unwrap_or(0.0);
        let rank = found.rank.min(found.values().iter().take_while(|value| **value > least).count());
        Ok(Components { found, rank, method })
    }

    /// By iteration, or exactly.
    fn find(&self, start: &[f32], goal: &Goal<'_>, method: Method) -> Result<(Found, Way)> {
        let (rows, cols) = self.sweeps.shape();
        let exactly = || {
            let none = || {
                let message = format!("no singular value decomposition of {:?} was found: it does not converge", self.tuned.name);
                Error::new(rules::DECOMPOSED, message)
                    .file(self.tuned.source.label())
                    .tensor(self.tuned.name)
                    .help("leave the tensor out with --exclude, and report the case")
            };
            Ok((Found::exact(&(self.dense)()?, goal.want).ok_or_else(none)?, Way::Exact))
        };
        if method == Method::Exact || rows.min(cols) <= SMALL {
            return exactly();
        }
        match iterate(self.sweeps, start, goal) {
            Ok(found) => Ok((found, Way::Krylov)),
            Err(Failure::Product(error)) => Err(error),
            Err(Failure::Slow(Some(found))) if rows.saturating_mul(cols) > EXACT => Ok((*found, Way::Krylov)),
            Err(Failure::Slow(_) | Failure::Diverged) => exactly(),
        }
    }
}

/// Which factor of a stored matrix takes the singular values; of a transposed one the left factor is Aᵀ.
pub(in super::super) fn share(split: Split, is_transposed: bool) -> Share {
    match (split, is_transposed) {
        (Split::Sqrt, _) => Share::Both,
        (Split::B, false) | (Split::A, true) => Share::Left,
        (Split::A, false) | (Split::B, true) => Share::Right,
    }
}

//! One target: its singular values, and its factors at another rank. A stack of experts has one rank for all of its parts.

use super::options::ResizeOptions;
use faer::{Mat, MatRef};

use crate::adapter::{Kind, Scaling, Target};
use crate::error::{Error, Result};
use crate::exec::{float_of, read_factors};
use crate::kernel::lowrank::{Found, Want, factors};
use crate::kernel::{Float, product_norm};
use crate::op::extract::{Split, bytes, share};
use crate::op::rank::RankRule;
use crate::op::spool::{Place, Spool};
use crate::report::ResizedTarget;
use crate::rules;
use crate::tensor::{Dtype, Shape, TensorInfo, pieces};

/// Singular values below this share of the largest are the rounding of f64.
const RESOLUTION: f64 = 1e-14;

/// A component may be off by so much of the singular value that the file states for it: what rounding to bf16 does.
const STATED: f64 = 0.01;

/// What is known of a target before its rank is.
pub(super) struct Known {
    /// The singular values of each part that are not zero, largest first.
    parts: Vec<Vec<f64>>,
    /// Of all parts together.
    pub(super) together: Vec<f64>,
}

/// What became of a target.
pub(in super::super) struct Resized {
    pub(in super::super) report: ResizedTarget,
    pub(in super::super) norm_squared: f64,
    pub(in super::super) error_squared: f64,
    /// `None` if nothing of it is left.
    pub(super) scaling: Option<Scaling>,
    /// The singular values that its factors hold; of a stack none.
    pub(super) singular_values: Option<Vec<f64>>,
}

/// The name of a factor in the spool.
pub(super) fn name(target: &Target, part: &str) -> String {
    format!("{}:{part}", target.tensor)
}

/// The decomposition of one part of the update, scale included.
fn decomposed(target: &Target, expert: u64) -> Result<Found> {
    let (out, _) = target.out_in();
    let (b, a) = read_factors(target, expert, 0..out)?;
    Found::of_product(&b, &a, target.scaling.rank as usize, target.scaling.effective()).ok_or_else(|| {
        let message = format!("no singular value decomposition of {:?} was found: it does not converge", target.tensor);
        Error::new(rules::DECOMPOSED, message).file(target.a.source().label()).tensor(target.a.name())
    })
}

/// The values that are not zero.
fn nonzero(values: &[f64]) -> Vec<f64> {
    let least = RESOLUTION * values.first().copied().unwrap_or(0.0);
    values.iter().copied().take_while(|value| *value > least).collect()
}

impl Known {
    /// Decomposes a target to know its singular values.
    ///
    /// # Errors
    /// `A-008`, `E-012`, `E-001`, `E-004`.
    pub(super) fn of(target: &Target) -> Result<Known> {
        let parts = (0..target.experts().unwrap_or(1)).map(|expert| Ok(nonzero(decomposed(target, expert)?.values())));
        Ok(Known::from(parts.collect::<Result<_>>()?))
    }

    fn from(parts: Vec<Vec<f64>>) -> Known {
        let longest = parts.iter().map(Vec::len).max().unwrap_or(0);
        let at = |k: usize| parts.iter().filter_map(|values| values.get(k)).map(|value| value * value).sum::<f64>().sqrt();
        let together = (0..longest).map(at).collect();
        Known { parts, together }
    }

    /// The highest rank that any part has.
    pub(super) fn most(&self) -> u64 {
        self.together.len() as u64
    }

    /// The rank by a rule for one target: the highest that a part asks for.
    pub(super) fn rank(&self, rule: RankRule) -> u64 {
        let of = |values: &Vec<f64>| {
            let norm_squared = values.iter().map(|value| value * value).sum();
            match rule.want(values, norm_squared, 0.0, values.len()) {
                Some(Want::Rank(rank)) => rank.min(values.len()),
                _ => values.len(),
            }
        };
        self.parts.iter().map(of).max().unwrap_or(0) as u64
    }
}

/// Factors of the rank that a rule gives to this target alone.
///
/// # Errors
/// As [`resize`].
pub(super) fn by_rule(target: &Target, options: &ResizeOptions, spool: &Spool) -> Result<Resized> {
    if target.experts().unwrap_or(1) > 1 {
        let known = Known::of(target)?;
        return resize(target, &known, known.rank(options.rank).max(least(target)), options, spool);
    }
    let rank = |known: &Known| known.rank(options.rank).max(least(target));
    if let Some(values) = in_singular_form(target, options)? {
        let known = Known::from(vec![nonzero(&values)]);
        return Site::new(target, &known, rank(&known), options, spool).cut();
    }
    let found = decomposed(target, 0)?;
    let known = Known::from(vec![nonzero(found.values())]);
    let site = Site::new(target, &known, rank(&known), options, spool);
    if site.is_as_before() {
        return site.copy();
    }
    site.finish(vec![site.part(0, found)?])
}

/// The lowest rank that a target can have: with magnitudes or a bias update it is more than its factors, and stays when these are zero.
pub(super) fn least(target: &Target) -> u64 {
    u64::from(target.magnitude.is_some() || target.bias.is_some())
}

/// Factors of rank `rank`, into the spool.
///
/// # Errors
/// `A-008`, `A-031`, `E-012`, `E-001`, `E-002`, `E-004`.
pub(super) fn resize(target: &Target, known: &Known, rank: u64, options: &ResizeOptions, spool: &Spool) -> Result<Resized> {
    let site = Site::new(target, known, rank, options, spool);
    if site.is_as_before() {
        return site.copy();
    }
    let parts = (0..known.parts.len()).map(|expert| site.part(expert, decomposed(target, expert as u64)?));
    site.finish(parts.collect::<Result<_>>()?)
}

/// A target whose rank is known.
struct Site<'s> {
    target: &'s Target,
    known: &'s Known,
    rank: u64,
    options: &'s ResizeOptions,
    spool: &'s Spool,
    dtype: Dtype,
    /// The same rule as before, and nearly the same scale.
    scaling: Scaling,
    /// Of A and B; none if nothing is left.
    places: Option<(Place, Place)>,
}

impl<'s> Site<'s> {
    fn new(target: &'s Target, known: &'s Known, rank: u64, options: &'s ResizeOptions, spool: &'s Spool) -> Self {
        let dtype = options.dtype.unwrap_or(match target.a.info().dtype {
            Dtype::F64 => Dtype::F32,
            own => own,
        });
        let one = Scaling { rank: rank.max(1), alpha: 1.0, ..target.scaling };
        let scaling = Scaling { alpha: target.scaling.effective() / one.effective(), ..one };
        let places = (rank > 0).then(|| reserve(target, rank, dtype, spool));
        Site { target, known, rank, options, spool, dtype, scaling, places }
    }

    /// The rank, the dtype and the split stay, so that nothing is to be computed, nor rounded again.
    fn is_as_before(&self) -> bool {
        let own = [&self.target.a, &self.target.b].into_iter().all(|factor| factor.info().dtype == self.dtype);
        own && self.rank == self.target.scaling.rank && self.options.split == Split::Sqrt
    }

    /// The factors as they are.
    fn copy(mut self) -> Result<Resized> {
        let Some((a, b)) = self.places else { return self.finish(vec![self.norm_squared()]) };
        for (place, factor) in [(a, &self.target.a), (b, &self.target.b)] {
            pieces(factor.info().bytes(), |offset, piece| {
                factor.read(offset, piece)?;
                self.spool.put(place, offset, piece)
            })?;
        }
        self.scaling = self.target.scaling;
        let singular_values = self.target.singular_values.clone();
        Ok(Resized { singular_values, ..self.finish(vec![0.0])? })
    }

    /// Puts the factors of one part into the spool; gives the square of what is lost of it.
    fn part(&self, expert: usize, found: Found) -> Result<f64> {
        let values = self.known.parts.get(expert).map_or(&[][..], Vec::as_slice);
        let own: f64 = values.iter().map(|value| value * value).sum();
        let Some((a, b)) = self.places else { return Ok(own) };
        let float = float_of(self.dtype).unwrap_or(Float::F32);
        let kept = (self.rank as usize).min(values.len());
        let scale = self.scaling.effective();
        let (out, inner) = self.target.out_in();
        let (out, inner, rank) = (out as usize, inner as usize, self.rank as usize);
        if kept == 0 {
            self.put(b, expert, None, (out, rank), float)?;
            self.put(a, expert, None, (rank, inner), float)?;
            return Ok(own);
        }
        let made = factors(&found.scaled(1.0 / scale), kept, share(self.options.split, false), float, own / (scale * scale));
        self.put(b, expert, Some(made.left.as_ref()), (out, rank), float)?;
        self.put(a, expert, Some(made.right.as_ref()), (rank, inner), float)?;
        Ok(made.error_squared * scale * scale)
    }

    fn put(
        &self,
        place: Place,
        expert: usize,
        matrix: Option<MatRef<'_, f64>>,
        shape: (usize, usize),
        float: Float,
    ) -> Result<()> {
        if matrix.is_some_and(|m| (0..m.ncols()).any(|j| (0..m.nrows()).any(|i| !m[(i, j)].is_finite()))) {
            let message = format!("the factors of {:?} leave the range of {}", self.target.tensor, self.dtype);
            return Err(Error::new(rules::RESULT_FINITE, message).tensor(&self.target.tensor).help("give --dtype f32"));
        }
        let raw = bytes(matrix, shape, float);
        self.spool.put(place, (expert * raw.len()) as u64, &raw)
    }

    fn finish(&self, lost: Vec<f64>) -> Result<Resized> {
        let norm_squared: f64 = self.known.parts.iter().flatten().map(|value| value * value).sum();
        let error_squared: f64 = lost.into_iter().sum();
        let report = ResizedTarget {
            tensor: self.target.tensor.clone(),
            rank_before: self.target.scaling.rank,
            rank: self.rank,
            norm: norm_squared.sqrt(),
            error: if norm_squared > 0.0 { (error_squared / norm_squared).sqrt() } else { 0.0 },
            singular_values: self.known.together.clone(),
        };
        let whole = self.rank > 0 && self.target.experts().is_none();
        let kept = self.known.together.iter().copied().take(self.rank as usize).collect::<Vec<f64>>();
        Ok(Resized {
            report,
            norm_squared,
            error_squared,
            scaling: (self.rank > 0).then_some(self.scaling),
            singular_values: whole.then_some(kept).filter(|kept| kept.len() as u64 == self.rank),
        })
    }

    /// The first columns of B and rows of A as they are: what is lost is the product of the others.
    fn cut(&self) -> Result<Resized> {
        let Some((place_a, place_b)) = self.places else { return self.finish(vec![self.norm_squared()]) };
        let float = float_of(self.dtype).unwrap_or(Float::F32);
        let (out, inner) = self.target.out_in();
        let (b, a) = read_factors(self.target, 0, 0..out)?;
        let (out, inner, kept, all) = (out as usize, inner as usize, self.rank as usize, self.target.scaling.rank as usize);
        let (b, a) = (MatRef::from_row_major_slice(&b, out, all), MatRef::from_row_major_slice(&a, all, inner));
        self.put(place_b, 0, Some(b.subcols(0, kept)), (out, kept), float)?;
        self.put(place_a, 0, Some(a.subrows(0, kept)), (kept, inner), float)?;
        let rest = |matrix: MatRef<'_, f64>| -> Vec<f64> {
            (0..matrix.nrows()).flat_map(|i| (0..matrix.ncols()).map(move |j| (i, j))).map(|at| matrix[at]).collect()
        };
        let (left, right) = (rest(b.subcols(kept, all - kept)), rest(a.subrows(kept, all - kept)));
        let lost = if all > kept { self.target.scaling.effective() * product_norm(&left, &right, all - kept) } else { 0.0 };
        self.finish(vec![lost * lost])
    }

    fn norm_squared(&self) -> f64 {
        self.known.together.iter().map(|value| value * value).sum()
    }
}

/// The singular values of a target whose factors are stored component by component and need only be cut: the file says so, the components have
/// the sizes that it says and are orthogonal to each other on both sides, and neither the dtype nor the split is to change.
fn in_singular_form(target: &Target, options: &ResizeOptions) -> Result<Option<Vec<f64>>> {
    let own = target.a.info().dtype;
    let same = options.dtype.is_none_or(|dtype| dtype == own) && target.b.info().dtype == own && own != Dtype::F64;
    let Some(values) = target.singular_values.as_ref().filter(|_| same && options.split == Split::Sqrt) else { return Ok(None) };
    let (out, inner) = target.out_in();
    let (b, a) = read_factors(target, 0, 0..out)?;
    let (rank, scale) = (target.scaling.rank as usize, target.scaling.effective());
    let (b, a) = (MatRef::from_row_major_slice(&b, out as usize, rank), MatRef::from_row_major_slice(&a, rank, inner as usize));
    let (of_b, of_a) = (b.transpose() * b, a * a.transpose());
    let size = |gram: &Mat<f64>, k: usize| gram[(k, k)].sqrt();
    let found: Vec<f64> = (0..rank).map(|k| scale * size(&of_b, k) * size(&of_a, k)).collect();
    let near = |x: f64, y: f64| (x - y).abs() <= STATED * y;
    let is_stated = values
        .iter()
        .zip(&found)
        .enumerate()
        .all(|(k, (stated, found))| near(*found, *stated) && near(size(&of_b, k), size(&of_a, k)));
    let are_orthogonal = [&of_b, &of_a].into_iter().all(|gram| {
        let mut pairs = (0..rank).flat_map(|i| (0..i).map(move |j| (i, j)));
        pairs.all(|(i, j)| gram[(i, j)].abs() <= STATED * size(gram, i) * size(gram, j))
    });
    // What they are, and not what is stated of them.
    Ok((is_stated && are_orthogonal && found.is_sorted_by(|x, y| x >= y)).then_some(found))
}

fn reserve(target: &Target, rank: u64, dtype: Dtype, spool: &Spool) -> (Place, Place) {
    let (a, b) = (target.a.info().shape.dims(), target.b.info().shape.dims());
    let at = if matches!(target.kind, Kind::Experts(_)) { (1, 2) } else { (0, 1) };
    let with = |dims: &[u64], at: usize| {
        let dims = dims.iter().enumerate().map(|(i, dim)| if i == at { rank } else { *dim }).collect();
        TensorInfo { dtype, shape: Shape::new(dims).unwrap_or_default() }
    };
    (spool.reserve(&name(target, "A"), with(a, at.0)), spool.reserve(&name(target, "B"), with(b, at.1)))
}

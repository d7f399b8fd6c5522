//! Methods that work on singular vectors, in the space that all updates share: with the factors side by side, `[B₁ … Bₙ] = Q·[R₁ … Rₙ]`
//! and `[A₁; …; Aₙ]ᵀ = P·[T₁ … Tₙ]`, an update is Δₜ = Q·Mₜ·Pᵀ with the small core Mₜ = Rₜ·Tₜᵀ. Whatever is done to singular vectors of updates
//! is done to those of their cores, because Q and P have orthonormal columns; no matrix of full size is formed. All in f64.

use faer::{Mat, MatRef};

use super::super::lowrank::{Triangle, product};
use super::ties::ties;

/// Singular values below this share of the largest are the rounding of f64, and have no vectors.
const RESOLUTION: f64 = 1e-13;

/// An update B·A with its weight and its scale: B `(out, rank)`, A `(rank, in)`, row-major.
pub(crate) struct Term<'a> {
    pub(crate) b: &'a [f64],
    pub(crate) a: &'a [f64],
    pub(crate) rank: usize,
}

/// A product of two thin matrices, `(out, rank)` and `(rank, in)`.
pub(crate) struct Product {
    pub(crate) b: Mat<f64>,
    pub(crate) a: Mat<f64>,
}

/// The updates as cores between two bases.
pub(super) struct Shared {
    /// Q `(out, d)`.
    left: Mat<f64>,
    /// P `(in, e)`.
    right: Mat<f64>,
    /// Mₜ `(d, e)`.
    pub(super) cores: Vec<Mat<f64>>,
}

/// Singular components that are not rounding: u·diag(s)·vᵀ.
pub(super) struct Svd {
    pub(super) u: Mat<f64>,
    pub(super) s: Vec<f64>,
    pub(super) v: Mat<f64>,
}

impl Svd {
    /// `None` if none was found.
    pub(super) fn of(matrix: MatRef<'_, f64>) -> Option<Svd> {
        Svd::of_size(matrix, 0.0)
    }

    /// Of a matrix that is a sum of terms of this size, which may cancel. `None` if none was found.
    fn of_size(matrix: MatRef<'_, f64>, size: f64) -> Option<Svd> {
        let svd = matrix.thin_svd().ok()?;
        let all: Vec<f64> = (0..svd.S().dim()).map(|i| svd.S()[i]).collect();
        let largest = all.first().copied().unwrap_or(0.0);
        if !largest.is_finite() {
            return None;
        }
        let s: Vec<f64> = all.into_iter().take_while(|value| *value > RESOLUTION * largest.max(size)).collect();
        Some(Svd { u: svd.U().subcols(0, s.len()).to_owned(), v: svd.V().subcols(0, s.len()).to_owned(), s })
    }
}

impl Shared {
    pub(super) fn of(terms: &[Term<'_>]) -> Shared {
        let rank: usize = terms.iter().map(|term| term.rank).sum();
        let (out, inner) = terms.first().map_or((0, 0), |term| (term.b.len() / term.rank, term.a.len() / term.rank));
        let (mut b, mut a) = (Mat::zeros(out, rank), Mat::zeros(inner, rank));
        let mut at = 0;
        for term in terms {
            b.subcols_mut(at, term.rank).copy_from(MatRef::from_row_major_slice(term.b, out, term.rank));
            a.subcols_mut(at, term.rank).copy_from(MatRef::from_row_major_slice(term.a, term.rank, inner).transpose());
            at += term.rank;
        }
        let ((left, r), (right, t)) = (Triangle::columns(b), Triangle::columns(a));
        let mut at = 0;
        let cores = terms.iter().map(|term| {
            let part = at..at + term.rank;
            at = part.end;
            product(r.subcols(part.start, term.rank), t.subcols(part.start, term.rank).transpose())
        });
        let cores = cores.collect();
        Shared { left, right, cores }
    }

    fn sum(&self) -> Mat<f64> {
        let (d, e) = (self.left.ncols(), self.right.ncols());
        self.cores.iter().fold(Mat::zeros(d, e), |sum, core| sum + core)
    }

    /// Q·x·yᵀ·Pᵀ for x `(d, k)` and y `(e, k)`.
    fn product(&self, x: &Mat<f64>, y: &Mat<f64>) -> Product {
        Product { b: product(self.left.as_ref(), x.as_ref()), a: product(y.transpose(), self.right.transpose()) }
    }
}

/// X with its columns multiplied.
fn scaled(x: &Mat<f64>, by: impl Fn(usize) -> f64) -> Mat<f64> {
    Mat::from_fn(x.nrows(), x.ncols(), |i, j| x[(i, j)] * by(j))
}

fn beside<'m>(rows: usize, parts: impl Iterator<Item = &'m Mat<f64>> + Clone) -> Mat<f64> {
    let mut all = Mat::zeros(rows, parts.clone().map(Mat::ncols).sum());
    let mut at = 0;
    for part in parts {
        all.subcols_mut(at, part.ncols()).copy_from(part);
        at += part.ncols();
    }
    all
}

/// Iso-C (Marczak et al. 2025, section 4.1): the sum with all of its singular values replaced by their mean, over those that are not zero.
/// `None` if no decomposition was found.
pub(crate) fn iso_c(terms: &[Term<'_>]) -> Option<Product> {
    let shared = Shared::of(terms);
    let size = shared.cores.iter().map(Mat::norm_l2).sum();
    let svd = Svd::of_size(shared.sum().as_ref(), size)?;
    let mean = svd.s.iter().sum::<f64>() / svd.s.len().max(1) as f64;
    Some(shared.product(&scaled(&svd.u, |_| mean), &svd.v))
}

/// TSV-M (Gargiulo et al. 2024, section 3.3): the singular vectors of all updates side by side, made orthonormal by their polar factors, which
/// are the nearest orthonormal matrices (equation 8), times the singular values. If there are more than the matrix has room for, each
/// update keeps an equal share. `None` if no decomposition was found.
pub(crate) fn tsv(terms: &[Term<'_>]) -> Option<Product> {
    let shared = Shared::of(terms);
    let room = shared.left.nrows().min(shared.right.nrows());
    let mut parts = Vec::with_capacity(terms.len());
    for core in &shared.cores {
        parts.push(Svd::of(core.as_ref())?);
    }
    if parts.iter().map(|part| part.s.len()).sum::<usize>() > room {
        let share = (room / parts.len().max(1)).max(1);
        for part in &mut parts {
            part.s.truncate(share);
            let kept = part.s.len();
            (part.u, part.v) = (part.u.subcols(0, kept).to_owned(), part.v.subcols(0, kept).to_owned());
        }
    }
    let s: Vec<f64> = parts.iter().flat_map(|part| part.s.iter().copied()).collect();
    let u = polar(&beside(shared.left.ncols(), parts.iter().map(|part| &part.u)))?;
    let v = polar(&beside(shared.right.ncols(), parts.iter().map(|part| &part.v)))?;
    Some(shared.product(&scaled(&u, |k| s[k]), &v))
}

/// The nearest matrix with orthonormal columns: P·Qᵀ of X = P·D·Qᵀ. Where columns of X are dependent it is that on their span.
fn polar(x: &Mat<f64>) -> Option<Mat<f64>> {
    let svd = Svd::of(x.as_ref())?;
    Some(product(svd.u.as_ref(), svd.v.transpose()))
}

/// KnOTS with TIES (Stoica et al. 2024, section 4): `[Δ₁ … Δₙ] = U·S·[V₁ … Vₙ]ᵀ`, then U·S·ties(V₁, …, Vₙ)ᵀ. `None` if no decomposition was
/// found.
pub(crate) fn knots(terms: &[Term<'_>], density: f64) -> Option<Product> {
    let shared = Shared::of(terms);
    let (d, e) = (shared.left.ncols(), shared.right.ncols());
    // U and S of [M₁ … Mₙ], which are those of the whole but for Q.
    let svd = Svd::of(beside(d, shared.cores.iter()).as_ref())?;
    let inner = shared.right.nrows();
    let mut each = Vec::with_capacity(terms.len());
    for t in 0..terms.len() {
        // Row k of v is the k-th vector of the whole: its part for t, back in full size, is P·vₜ.
        let part = svd.v.subrows(t * e, e);
        let full = product(shared.right.as_ref(), part);
        each.push((0..inner).flat_map(|i| (0..full.ncols()).map(move |k| (i, k))).map(|at| full[at]).collect::<Vec<f64>>());
    }
    let merged = ties(each, density);
    let count = svd.s.len();
    Some(Product {
        b: product(shared.left.as_ref(), scaled(&svd.u, |k| svd.s[k]).as_ref()),
        a: Mat::from_fn(count, inner, |k, i| merged[i * count + k]),
    })
}

/// Core Space with TIES (Panariello et al. 2025, section 3.2): Mₜ = Uᵀ·Δₜ·V with U the left singular vectors of [B₁ … Bₙ] and V the right ones
/// of [A₁; …; Aₙ], then U·ties(M₁, …, Mₙ)·Vᵀ. The factors are those in which both take the square roots of the singular values, as these
/// vectors depend on the factors and the result must not. `None` if no decomposition was found.
pub(crate) fn core_space(terms: &[Term<'_>], density: f64) -> Option<Product> {
    let shared = Shared::of(terms);
    let mut parts = Vec::with_capacity(terms.len());
    for core in &shared.cores {
        parts.push(Svd::of(core.as_ref())?);
    }
    let root = |side: fn(&Svd) -> &Mat<f64>| -> Vec<Mat<f64>> {
        parts.iter().map(|part| scaled(side(part), |k| part.s[k].sqrt())).collect()
    };
    let u = Svd::of(beside(shared.left.ncols(), root(|part| &part.u).iter()).as_ref())?.u;
    let v = Svd::of(beside(shared.right.ncols(), root(|part| &part.v).iter()).as_ref())?.u;
    let (rows, cols) = (u.ncols(), v.ncols());
    let each: Vec<Vec<f64>> = shared
        .cores
        .iter()
        .map(|core| {
            let small = product(product(u.transpose(), core.as_ref()).as_ref(), v.as_ref());
            (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))).map(|at| small[at]).collect()
        })
        .collect();
    let merged = ties(each, density);
    let merged = MatRef::from_row_major_slice(&merged, rows, cols);
    Some(shared.product(&product(u.as_ref(), merged), &v))
}

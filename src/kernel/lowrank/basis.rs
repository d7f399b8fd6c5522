//! Orthonormal columns: what a new block of a Krylov basis becomes before it is multiplied again.

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::triangular_inverse::invert_upper_triangular;
use faer::{Accum, Mat, MatRef, Par, Side};

/// A diagonal value of the Cholesky factor below this share of the largest means that columns are nearly dependent: CholeskyQR2 needs a
/// condition below 1/sqrt(unit roundoff) (Yamamoto, Nakatsukasa, Yanagisawa and Fukaya 2015, section 2).
const DEPENDENT: f64 = 1e-7;

/// Aᵀ·B.
pub(super) fn inner(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut out = Mat::zeros(a.ncols(), b.ncols());
    matmul(out.as_mut(), Accum::Replace, a.transpose(), b, 1.0, Par::Seq);
    out
}

/// The lower half of Aᵀ·A; the upper one is 0.
pub(super) fn gram(a: MatRef<'_, f64>) -> Mat<f64> {
    let mut out = Mat::zeros(a.ncols(), a.ncols());
    let (lower, whole) = (BlockStructure::TriangularLower, BlockStructure::Rectangular);
    triangular::matmul(out.as_mut(), lower, Accum::Replace, a.transpose(), whole, a, whole, 1.0, Par::Seq);
    out
}

/// A·B.
pub(crate) fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut out = Mat::zeros(a.nrows(), b.ncols());
    matmul(out.as_mut(), Accum::Replace, a, b, 1.0, Par::Seq);
    out
}

/// An orthonormal basis of what the columns of `z` add to those of `basis`, which are orthonormal. What they do not determine, because
/// they are dependent, is filled up with other directions.
pub(super) fn orthonormal(basis: &Mat<f64>, z: Mat<f64>) -> Mat<f64> {
    let z = outside(basis, outside(basis, z));
    let q = cholesky_qr(&z).and_then(|q| cholesky_qr(&q)).unwrap_or_else(|| householder(&z));
    // Where columns cancelled, what is left was rounding: once more, and it is orthogonal ("twice is enough", Giraud et al. 2005).
    let q = outside(basis, q);
    cholesky_qr(&q).unwrap_or_else(|| householder(&q))
}

/// Z - V·(Vᵀ·Z).
fn outside(basis: &Mat<f64>, mut z: Mat<f64>) -> Mat<f64> {
    if basis.ncols() > 0 {
        let within = inner(basis.as_ref(), z.as_ref());
        matmul(z.as_mut(), Accum::Add, basis.as_ref(), within.as_ref(), -1.0, Par::Seq);
    }
    z
}

/// One step of CholeskyQR: Z·R⁻¹ with RᵀR = ZᵀZ; `None` if the columns are nearly dependent. One step leaves an error of the square of the
/// condition, a second one none to speak of.
fn cholesky_qr(z: &Mat<f64>) -> Option<Mat<f64>> {
    let gram = inner(z.as_ref(), z.as_ref());
    let (_, inverse) = cholesky(&gram, DEPENDENT)?;
    Some(product(z.as_ref(), inverse.as_ref()))
}

/// The upper triangular R with RᵀR = G, of which the lower half is looked at, and its inverse; `None` if a diagonal value of R is below `least` times the largest.
pub(super) fn cholesky(gram: &Mat<f64>, least: f64) -> Option<(Mat<f64>, Mat<f64>)> {
    let r = gram.llt(Side::Lower).ok()?.L().transpose().to_owned();
    let diagonal = || (0..r.ncols()).map(|i| r[(i, i)]);
    let largest = diagonal().fold(0.0, f64::max);
    // A value that is no number compares to nothing.
    if !largest.is_finite() || !diagonal().all(|value| value > least * largest) {
        return None;
    }
    let mut inverse = Mat::zeros(r.nrows(), r.ncols());
    invert_upper_triangular(inverse.as_mut(), r.as_ref(), Par::Seq);
    Some((r, inverse))
}

fn householder(z: &Mat<f64>) -> Mat<f64> {
    z.qr().compute_thin_Q()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn off(q: &Mat<f64>) -> f64 {
        let gram = inner(q.as_ref(), q.as_ref());
        let entry = |i: usize, j: usize| (gram[(i, j)] - if i == j { 1.0 } else { 0.0 }).abs();
        (0..q.ncols()).flat_map(|i| (0..q.ncols()).map(move |j| (i, j))).map(|(i, j)| entry(i, j)).fold(0.0, f64::max)
    }

    fn wave(i: usize, j: usize) -> f64 {
        ((i * 7 + j * 13) as f64).sin() + 0.1 * ((i * j) as f64).cos()
    }

    #[test]
    fn columns_are_orthonormal_whatever_their_condition() {
        let basis = orthonormal(&Mat::zeros(60, 0), Mat::from_fn(60, 6, wave));
        assert!(off(&basis) < 1e-14);
        let scaled = Mat::from_fn(60, 6, |i, j| wave(i, j + 9) * 10f64.powi(-3 * j as i32));
        let dependent = Mat::from_fn(60, 6, |i, j| if j < 4 { wave(i, j + 9) } else { wave(i, 9) });
        let inside = product(basis.as_ref(), Mat::from_fn(6, 6, wave).as_ref());
        let nothing = Mat::zeros(60, 6);
        for (what, z) in [("scaled", scaled), ("dependent", dependent), ("inside", inside), ("zero", nothing)] {
            let q = orthonormal(&basis, z);
            let across = inner(basis.as_ref(), q.as_ref());
            let across = (0..6).flat_map(|i| (0..6).map(move |j| (i, j))).map(|(i, j)| across[(i, j)].abs()).fold(0.0, f64::max);
            assert!(off(&q) < 1e-13 && across < 1e-13, "{what}: {:e} {across:e}", off(&q));
        }
    }

    #[test]
    fn the_columns_span_what_was_given() {
        let z = Mat::from_fn(40, 3, wave);
        let q = orthonormal(&Mat::zeros(40, 0), z.clone());
        let back = outside(&q, z);
        assert!((0..3).all(|j| (0..40).all(|i| back[(i, j)].abs() < 1e-13)));
    }
}

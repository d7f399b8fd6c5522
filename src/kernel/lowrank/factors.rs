//! From singular components to the two factors that are stored: where the singular values go, rounding, and the second factor fitted to the
//! rounded first one.

use faer::Mat;
use nalgebra::{Cholesky, DMatrix};

use super::super::float::Float;
use super::basis::{inner, product};
use super::found::Found;

/// Columns that were multiplied in f32 are orthonormal to about 1e-7, and a difference of squares of norms is uncertain by that share.
const UNSURE: f64 = 1e-6;

/// Which factor takes the singular values. The product is the same; what is stored differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Share {
    /// Their square roots go to both: factors of like size, none of which leaves the range of 16 bits.
    Both,
    /// The left one is U·S, the right one is orthonormal.
    Left,
    /// The right one is S·Vᵀ, the left one is orthonormal.
    Right,
}

/// L `(rows, rank)` and R `(rank, cols)`, in f64 but with values of the format that they are stored in.
pub(crate) struct Factors {
    pub(crate) left: Mat<f64>,
    pub(crate) right: Mat<f64>,
    /// ‖D - L·R‖², by the norms: nothing is known of it below about 1e-7 ‖D‖².
    pub(crate) error_squared: f64,
    /// A bound of ‖U·S·Vᵀ - L·R‖: what rounding has added.
    pub(crate) rounding: f64,
}

/// The factors of the first `rank` components, each of which has a singular value above zero. The sign of a component is that which makes
/// the largest value of its left vector positive.
///
/// A factor of 16 bits is off by 1.7e-3 of its norm, and rounding both is off by 2.3e-3 of the product. So the left one is rounded first,
/// and the right one becomes the best for it: argmin ‖D - L·R‖ = (LᵀL)⁻¹·Lᵀ·D, and is then rounded.
pub(crate) fn factors(found: &Found, rank: usize, share: Share, float: Float, norm_squared: f64) -> Factors {
    let (scaled, unit) = found.components(rank);
    let mut v = unit.clone();
    let values = found.values();
    let mut left = scaled.clone();
    for k in 0..rank {
        let sign = sign(&left, k);
        let (to_left, to_right) = match share {
            Share::Both => (1.0 / values[k].sqrt(), values[k].sqrt()),
            Share::Left => (1.0, 1.0),
            Share::Right => (1.0 / values[k], values[k]),
        };
        (0..left.nrows()).for_each(|i| left[(i, k)] *= sign * to_left);
        (0..v.nrows()).for_each(|j| v[(j, k)] *= sign * to_right);
    }
    round(&mut left, float);
    let projected = found.projected(&left);
    let mut right = match float {
        Float::F16 | Float::BF16 => fitted(&left, &projected).unwrap_or_else(|| v.transpose().to_owned()),
        Float::F32 | Float::F64 => v.transpose().to_owned(),
    };
    round(&mut right, float);
    let across = (0..rank).flat_map(|k| (0..right.ncols()).map(move |j| (k, j))).map(|at| projected[at] * right[at]).sum::<f64>();
    let own = trace(&inner(left.as_ref(), left.as_ref()), &product(right.as_ref(), right.transpose()));
    // ⟨U·S·Vᵀ, L·R⟩ = tr((Lᵀ·U·S)·(R·V)ᵀ).
    let kept = trace(&inner(left.as_ref(), scaled.as_ref()), &product(unit.transpose(), right.transpose()));
    let best: f64 = values[..rank].iter().map(|value| value * value).sum();
    let rounding = ((best - 2.0 * kept + own).max(0.0) + UNSURE * best).sqrt();
    Factors { left, right, error_squared: (norm_squared - 2.0 * across + own).max(0.0), rounding }
}

/// tr(X·Y).
fn trace(x: &Mat<f64>, y: &Mat<f64>) -> f64 {
    (0..x.nrows()).flat_map(|i| (0..x.ncols()).map(move |j| (i, j))).map(|(i, j)| x[(i, j)] * y[(j, i)]).sum()
}

/// (LᵀL)⁻¹·P; `None` if the columns of L are nearly dependent.
fn fitted(left: &Mat<f64>, projected: &Mat<f64>) -> Option<Mat<f64>> {
    let gram = inner(left.as_ref(), left.as_ref());
    let gram = DMatrix::from_fn(gram.nrows(), gram.ncols(), |i, j| gram[(i, j)]);
    let inverse = Cholesky::new(gram)?.inverse();
    let inverse = Mat::from_fn(inverse.nrows(), inverse.ncols(), |i, j| inverse[(i, j)]);
    (0..inverse.ncols()).all(|i| inverse[(i, i)].is_finite()).then(|| product(inverse.as_ref(), projected.as_ref()))
}

/// Rounds every value to the format.
fn round(matrix: &mut Mat<f64>, float: Float) {
    let mut raw = vec![0; matrix.nrows() * float.size()];
    for column in matrix.col_iter_mut() {
        let Some(column) = column.try_as_col_major_mut() else { continue };
        let values = column.as_slice_mut();
        float.narrow(values, &mut raw);
        float.widen(&raw, values);
    }
}

/// One factor alone, rounded, where D is an update in the metric of a layer's inputs: the one on the side of the outputs, from the left
/// vectors `(rows, rank)` or, if the inputs are the rows, from the right ones `(cols, rank)`. `share` is that of the factor: all of the
/// singular values, their square roots, or none.
pub(crate) fn outer(found: &Found, rank: usize, inputs_are_rows: bool, share: f64, float: Float) -> Mat<f64> {
    let (scaled, unit) = found.components(rank);
    let (mut factor, power) = if inputs_are_rows { (unit, share) } else { (scaled, share - 1.0) };
    for (k, value) in found.values()[..rank].iter().enumerate() {
        let by = sign(&factor, k) * value.powf(power);
        (0..factor.nrows()).for_each(|i| factor[(i, k)] *= by);
    }
    round(&mut factor, float);
    factor
}

/// The other factor `(rank, inputs)` for it, rounded: argmin ‖(D - L·R)·F‖ over R is (LᵀL)⁻¹·Lᵀ·D whatever F is, as the gradient
/// Lᵀ·(L·R - D)·F·Fᵀ vanishes there. `projected` is Lᵀ·D. `None` if the columns of L are nearly dependent.
pub(crate) fn fitted_to(outer: &Mat<f64>, projected: &Mat<f64>, float: Float) -> Option<Mat<f64>> {
    let mut factor = fitted(outer, projected)?;
    round(&mut factor, float);
    Some(factor)
}

/// What makes the largest value of a column positive.
fn sign(matrix: &Mat<f64>, column: usize) -> f64 {
    let largest = (0..matrix.nrows()).map(|i| matrix[(i, column)]);
    let largest = largest.fold(0.0f64, |most, x| if x.abs() > most.abs() { x } else { most });
    if largest < 0.0 { -1.0 } else { 1.0 }
}

//! From singular components to the two factors that are stored: where the singular values go, rounding, and the second factor fitted to the
//! rounded first one.

use faer::Mat;
use nalgebra::{Cholesky, DMatrix};

use super::super::float::Float;
use super::basis::{inner, product};
use super::found::Found;

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
    /// ‖U·S·Vᵀ - L·R‖: what rounding has added.
    pub(crate) rounding: f64,
}

/// The factors of the first `rank` components, each of which has a singular value above zero. The sign of a component is that which makes
/// the largest value of its left vector positive.
///
/// A factor of 16 bits is off by 1.7e-3 of its norm, and rounding both is off by 2.3e-3 of the product. So the left one is rounded first,
/// and the right one becomes the best for it: argmin ‖D - L·R‖ = (LᵀL)⁻¹·Lᵀ·D, and is then rounded.
///
/// Where D is a difference whose rows or columns were multiplied by `weights`, the factors are of what it was before, and errors are those of
/// D. The left factor then has a weight for each row, or the right one for each column.
pub(crate) fn factors(
    found: &Found,
    rank: usize,
    share: Share,
    float: Float,
    norm_squared: f64,
    weights: (Option<&[f32]>, Option<&[f32]>),
) -> Factors {
    let (scaled, unit) = found.components(rank);
    let mut v = unit.clone();
    let values = found.values();
    let mut left = scaled.clone();
    for k in 0..rank {
        let largest = (0..left.nrows()).map(|i| left[(i, k)]).fold(0.0f64, |most, x| if x.abs() > most.abs() { x } else { most });
        let sign = if largest < 0.0 { -1.0 } else { 1.0 };
        let (to_left, to_right) = match share {
            Share::Both => (1.0 / values[k].sqrt(), values[k].sqrt()),
            Share::Left => (1.0, 1.0),
            Share::Right => (1.0 / values[k], values[k]),
        };
        (0..left.nrows()).for_each(|i| left[(i, k)] *= sign * to_left);
        (0..v.nrows()).for_each(|j| v[(j, k)] *= sign * to_right);
    }
    round(&mut left, float, weights.0, Side::Rows);
    let projected = found.projected(&left);
    let mut right = match float {
        Float::F16 | Float::BF16 => fitted(&left, &projected).unwrap_or_else(|| v.transpose().to_owned()),
        Float::F32 | Float::F64 => v.transpose().to_owned(),
    };
    round(&mut right, float, weights.1, Side::Columns);
    let across = (0..rank).flat_map(|k| (0..right.ncols()).map(move |j| (k, j))).map(|at| projected[at] * right[at]).sum::<f64>();
    let own = trace(&inner(left.as_ref(), left.as_ref()), &product(right.as_ref(), right.transpose()));
    // ⟨U·S·Vᵀ, L·R⟩ = tr((Lᵀ·U·S)·(R·V)ᵀ).
    let kept = trace(&inner(left.as_ref(), scaled.as_ref()), &product(unit.transpose(), right.transpose()));
    let best: f64 = values[..rank].iter().map(|value| value * value).sum();
    let rounding = (best - 2.0 * kept + own).max(0.0).sqrt();
    divide(&mut left, weights.0, Side::Rows);
    divide(&mut right, weights.1, Side::Columns);
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

/// What of a matrix has weights.
#[derive(Clone, Copy)]
enum Side {
    Rows,
    Columns,
}

/// Divides every value by its weight.
fn divide(matrix: &mut Mat<f64>, weights: Option<&[f32]>, side: Side) {
    each_with_weight(matrix, weights, side, |value, weight| value / weight);
}

fn each_with_weight(matrix: &mut Mat<f64>, weights: Option<&[f32]>, side: Side, with: impl Fn(f64, f64) -> f64) {
    let Some(weights) = weights else { return };
    for (j, column) in matrix.col_iter_mut().enumerate() {
        for (i, value) in column.iter_mut().enumerate() {
            let at = match side {
                Side::Rows => i,
                Side::Columns => j,
            };
            *value = with(*value, weights.get(at).map_or(1.0, |weight| f64::from(*weight)));
        }
    }
}

/// Rounds every value to the format; where there are weights, the value without its weight.
fn round(matrix: &mut Mat<f64>, float: Float, weights: Option<&[f32]>, side: Side) {
    divide(matrix, weights, side);
    let mut raw = vec![0; matrix.nrows() * float.size()];
    for column in matrix.col_iter_mut() {
        let Some(column) = column.try_as_col_major_mut() else { continue };
        let values = column.as_slice_mut();
        float.narrow(values, &mut raw);
        float.widen(&raw, values);
    }
    each_with_weight(matrix, weights, side, |value, weight| value * weight);
}

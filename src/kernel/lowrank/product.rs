//! The singular value decomposition of a product of two thin factors, without the product: orthonormal bases of both, and the decomposition of
//! the small core between them, all in f64.

use faer::{Mat, MatRef};

use super::basis::{cholesky, gram, product};
use super::found::{Found, Thin};

/// A diagonal value of the Cholesky factor below this share of the largest: the basis that one step of CholeskyQR gives would be off by
/// more than 1e-8, the square of the condition times the unit roundoff.
const DEPENDENT: f64 = 1e-4;

/// Singular values below this share of ‖B‖·‖A‖ are the rounding of f64: of a sum that cancels nothing else is left.
const RESOLUTION: f64 = 1e-14;

/// X = Q·R with Q = thin·to_q orthonormal.
pub(crate) struct Triangle {
    /// X itself, or Q.
    thin: Thin,
    to_q: Mat<f64>,
    r: Mat<f64>,
    /// The thin matrix is Q, because columns of X are nearly dependent.
    is_q: bool,
}

impl Triangle {
    fn of(thin: Thin) -> Triangle {
        if let Some((r, to_q)) = cholesky(&gram(thin.view()), DEPENDENT) {
            return Triangle { thin, to_q, r, is_q: false };
        }
        let qr = thin.view().to_owned().qr();
        let (q, r) = (qr.compute_thin_Q(), qr.thin_R().to_owned());
        Triangle { to_q: Mat::identity(q.ncols(), q.ncols()), thin: Thin::Columns(q), r, is_q: true }
    }
}

impl Triangle {
    /// Q `(rows, d)` with orthonormal columns and R `(d, cols)` with Q·R = X; d is the smaller of rows and cols.
    pub(crate) fn columns(x: Mat<f64>) -> (Mat<f64>, Mat<f64>) {
        let Triangle { thin, to_q, r, is_q } = Triangle::of(Thin::Columns(x));
        (if is_q { thin.view().to_owned() } else { product(thin.view(), to_q.as_ref()) }, r)
    }
}

impl Found {
    /// The decomposition of scale·B·A for B `(out, rank)` and A `(rank, in)`, both row-major, with nothing left out. `None` if none was found.
    /// Values that are only rounding are 0. With B = Q·R and Aᵀ = P·T the core is scale·R·Tᵀ, and Q = B·R⁻¹ and P = Aᵀ·T⁻¹ need not be formed.
    pub(crate) fn of_product(b: &[f64], a: &[f64], rank: usize, scale: f64) -> Option<Found> {
        // Row-major B (out, rank) is column-major Bᵀ (rank, out); row-major A (rank, in) is column-major Aᵀ (in, rank).
        let b = Thin::Rows(MatRef::from_column_major_slice(b, rank, b.len() / rank).to_owned());
        let a = Thin::Columns(MatRef::from_column_major_slice(a, a.len() / rank, rank).to_owned());
        let (b, a) = (Triangle::of(b), Triangle::of(a));
        let mut core = product(b.r.as_ref(), a.r.transpose());
        core.col_iter_mut().for_each(|column| column.iter_mut().for_each(|value| *value *= scale));
        let svd = core.thin_svd().ok()?;
        let floor = RESOLUTION * scale.abs() * b.r.norm_l2() * a.r.norm_l2();
        let value = |value: f64| if value > floor || value.is_nan() { value } else { 0.0 };
        let values: Vec<f64> = (0..svd.S().dim()).map(|i| value(svd.S()[i])).collect();
        if values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        let scaled = Mat::from_fn(svd.U().nrows(), values.len(), |i, k| svd.U()[(i, k)] * values[k]);
        let between = match (b.is_q, a.is_q) {
            (false, false) => None,
            (true, false) => Some(b.r),
            (false, true) => Some(a.r.transpose().to_owned()),
            (true, true) => Some(product(b.r.as_ref(), a.r.transpose())),
        };
        Some(Found {
            left: product(b.to_q.as_ref(), scaled.as_ref()),
            right: product(a.to_q.as_ref(), svd.V()),
            image: b.thin,
            basis: a.thin,
            between,
            factor: scale,
            rank: values.len(),
            values,
            excess: 0.0,
            blocks: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_decomposition_is_that_of_the_product() {
        let (out, inner) = (30, 20);
        for (what, rank, dependent) in [("full", 5, false), ("dependent", 6, true), ("wide", 24, false)] {
            let wave = |i: usize, j: usize| ((i * 7 + j * 13) as f64).sin() + 0.3 * ((i * i + j) as f64).cos();
            let b: Vec<f64> = (0..out * rank).map(|n| wave(n / rank, if dependent { n % rank % 4 } else { n % rank })).collect();
            let a: Vec<f64> = (0..rank * inner).map(|n| wave(n / inner + 50, n % inner)).collect();
            let dense =
                Mat::from_fn(out, inner, |i, j| -1.5 * (0..rank).map(|k| b[i * rank + k] * a[k * inner + j]).sum::<f64>());
            let wanted = dense.singular_values().unwrap();
            let found = Found::of_product(&b, &a, rank, -1.5).unwrap();
            let values = found.values();
            for (k, want) in wanted.iter().enumerate() {
                let got = values.get(k).copied().unwrap_or(0.0);
                assert!((got - want).abs() < 1e-12 * wanted[0], "{what} {k}: {got} for {want}");
            }
            let (us, v) = found.components(3);
            let part = product(us.as_ref(), v.transpose());
            let error =
                (0..out).flat_map(|i| (0..inner).map(move |j| (i, j))).map(|at| (dense[at] - part[at]).powi(2)).sum::<f64>();
            let best: f64 = wanted[3..].iter().map(|s| s * s).sum();
            assert!((error - best).abs() < 1e-10 * wanted[0].powi(2), "{what}: {error} for {best}");
        }
    }
}

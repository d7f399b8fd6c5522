//! The norm of B·A without forming it: ‖B·A‖² = tr((BᵀB)(A·Aᵀ)), two small Gram matrices in f64.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};

/// ‖B·A‖ (Frobenius) for B `(out, rank)` and A `(rank, in)`, both row-major. The two cores are `(rank, rank)`. The relative error
/// is about `rank · 2⁻⁵³` times the condition of the product's cancellation, far below what is printed.
///
/// # Panics
/// If the lengths are not multiples of `rank`, or `rank` is 0.
pub(crate) fn product_norm(b: &[f64], a: &[f64], rank: usize) -> f64 {
    product_inner((b, a, rank), (b, a, rank)).max(0.0).sqrt()
}

/// ⟨B·A, D·C⟩ (Frobenius) = tr((DᵀB)·(A·Cᵀ)) for two pairs of factors and their ranks, as in [`product_norm`].
///
/// # Panics
/// As [`product_norm`].
pub(crate) fn product_inner((b, a, rank): (&[f64], &[f64], usize), (d, c, other): (&[f64], &[f64], usize)) -> f64 {
    // Row-major B (out, rank) read column-major is Bᵀ (rank, out); row-major A read column-major is Aᵀ (in, rank).
    let (out, inner) = (b.len() / rank, a.len() / rank);
    let bt = |values, rank| MatRef::from_column_major_slice(values, rank, out);
    let at = |values, rank| MatRef::from_column_major_slice(values, inner, rank);
    let (mut across_b, mut across_a) = (Mat::<f64>::zeros(other, rank), Mat::<f64>::zeros(other, rank));
    matmul(across_b.as_mut(), Accum::Replace, bt(d, other), bt(b, rank).transpose(), 1.0, Par::Seq);
    matmul(across_a.as_mut(), Accum::Replace, at(c, other).transpose(), at(a, rank), 1.0, Par::Seq);
    (0..rank).flat_map(|j| (0..other).map(move |i| (i, j))).map(|place| across_b[place] * across_a[place]).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_inner_product_is_that_of_the_products() {
        let (b, a, d, c) = ([1.0f64, 2.0, 3.0, 4.0], [1.0f64, -1.0, 0.5, 2.0], [2.0f64, -1.0], [0.5f64, 3.0]);
        let dense = |i: usize, j: usize| b[2 * i] * a[j] + b[2 * i + 1] * a[2 + j];
        let wanted: f64 = (0..4).map(|n| dense(n / 2, n % 2) * d[n / 2] * c[n % 2]).sum();
        assert!((product_inner((&b, &a, 2), (&d, &c, 1)) - wanted).abs() < 1e-12);
        assert!((product_inner((&b, &a, 2), (&b, &a, 2)).sqrt() - product_norm(&b, &a, 2)).abs() < 1e-12);
    }

    #[test]
    fn the_norm_is_that_of_the_product() {
        let (b, a) = ([1.0f64, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0f64, -1.0, 0.5, 2.0]);
        let dense: f64 = (0..3)
            .flat_map(|i| (0..2).map(move |j| (i, j)))
            .map(|(i, j)| (b[2 * i] * a[j] + b[2 * i + 1] * a[2 + j]).powi(2))
            .sum();
        assert!((product_norm(&b, &a, 2) - dense.sqrt()).abs() < 1e-12);
    }
}

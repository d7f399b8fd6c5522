//! The norm of B·A without forming it: ‖B·A‖² = tr((BᵀB)(A·Aᵀ)), two small Gram matrices in f64.

use nalgebra::DMatrix;

/// ‖B·A‖ (Frobenius) for B `(out, rank)` and A `(rank, in)`, both row-major. The two cores are `(rank, rank)`. The relative error
/// is about `rank · 2⁻⁵³` times the condition of the product's cancellation, far below what is printed.
///
/// # Panics
/// If the lengths are not multiples of `rank`, or `rank` is 0.
pub(crate) fn product_norm(b: &[f64], a: &[f64], rank: usize) -> f64 {
    // Row-major B (out, rank) read column-major is Bᵀ (rank, out); row-major A read column-major is Aᵀ (in, rank).
    let bt = DMatrix::from_column_slice(rank, b.len() / rank, b);
    let at = DMatrix::from_column_slice(a.len() / rank, rank, a);
    let (gram_b, gram_a) = (&bt * bt.transpose(), at.transpose() * &at);
    (&gram_b * gram_a).trace().max(0.0).sqrt()
}

/// ⟨B·A, D·C⟩ (Frobenius) = tr((DᵀB)·(A·Cᵀ)) for two pairs of factors and their ranks, as in [`product_norm`].
///
/// # Panics
/// As [`product_norm`].
pub(crate) fn product_inner((b, a, rank): (&[f64], &[f64], usize), (d, c, other): (&[f64], &[f64], usize)) -> f64 {
    let thin = |values: &[f64], rank: usize| DMatrix::from_column_slice(rank, values.len() / rank, values);
    let wide = |values: &[f64], rank: usize| DMatrix::from_column_slice(values.len() / rank, rank, values);
    let (across_b, across_a) = (thin(d, other) * thin(b, rank).transpose(), wide(a, rank).transpose() * wide(c, other));
    (across_b * across_a).trace()
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

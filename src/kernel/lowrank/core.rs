//! The eigenvalues of a small symmetric matrix.

use faer::{Mat, Side};
use nalgebra::{DMatrix, SymmetricEigen};

/// Up to this size nalgebra is as fast as faer, and its iterations are counted.
const SMALL: usize = 96;
/// More iterations than any matrix of that size needs: QR takes two or three for each eigenvalue.
const ITERATIONS: usize = 100 * SMALL;

/// Eigenvalues, the largest first and none below zero, and the eigenvectors as columns in the same order.
pub(super) struct Eigen {
    pub(super) values: Vec<f64>,
    pub(super) vectors: Mat<f64>,
}

/// The decomposition of a symmetric matrix without negative eigenvalues; `None` if it is not finite or none was found.
pub(super) fn eigen(matrix: &Mat<f64>) -> Option<Eigen> {
    let n = matrix.nrows();
    if (0..n).any(|j| (0..n).any(|i| !matrix[(i, j)].is_finite())) {
        return None;
    }
    let (values, vectors) = if n <= SMALL {
        let dense = DMatrix::from_fn(n, n, |i, j| matrix[(i, j)]);
        let found = SymmetricEigen::try_new(dense, f64::EPSILON, ITERATIONS)?;
        (found.eigenvalues.as_slice().to_vec(), Mat::from_fn(n, n, |i, j| found.eigenvectors[(i, j)]))
    } else {
        let found = matrix.self_adjoint_eigen(Side::Lower).ok()?;
        let values = (0..n).map(|i| found.S()[i]).collect();
        (values, found.U().to_owned())
    };
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|x, y| values[*y].total_cmp(&values[*x]));
    let sorted = order.iter().map(|i| values[*i].max(0.0)).collect();
    Some(Eigen { values: sorted, vectors: Mat::from_fn(n, n, |i, j| vectors[(i, order[j])]) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_decompose() {
        for n in [1, 5, SMALL, SMALL + 4] {
            let root = Mat::from_fn(n, n, |i, j| ((i * 5 + j * 11) as f64).sin());
            let matrix = root.transpose() * &root;
            let found = eigen(&matrix).unwrap();
            assert!(found.values.is_sorted_by(|x, y| x >= y));
            let scaled = Mat::from_fn(n, n, |i, j| found.vectors[(i, j)] * found.values[j]);
            let back = &scaled * found.vectors.transpose();
            assert!((0..n).all(|i| (0..n).all(|j| (back[(i, j)] - matrix[(i, j)]).abs() < 1e-11 * n as f64)), "{n}");
        }
    }

    #[test]
    fn what_is_not_finite_is_refused() {
        let mut matrix = Mat::<f64>::identity(3, 3);
        matrix[(1, 2)] = f64::NAN;
        assert!(eigen(&matrix).is_none());
    }
}

//! The singular components of a matrix, however they were found: as mixtures of the columns of two thin matrices.

use faer::{Mat, MatRef};

use super::basis::{inner, product};
use super::core::Eigen;
use super::krylov::Want;

/// A thin matrix that is stored by columns, or by rows as files have it.
pub(super) enum Thin {
    Columns(Mat<f64>),
    /// The transpose, by columns.
    Rows(Mat<f64>),
}

impl Thin {
    pub(super) fn view(&self) -> MatRef<'_, f64> {
        match self {
            Thin::Columns(matrix) => matrix.as_ref(),
            Thin::Rows(matrix) => matrix.transpose(),
        }
    }
}

/// What was found of D.
pub(crate) struct Found {
    /// `(rows, d)`: D is taken for factor·image·between·basisᵀ.
    pub(super) image: Thin,
    /// The identity if there is none.
    pub(super) between: Option<Mat<f64>>,
    /// `(cols, d)`.
    pub(super) basis: Thin,
    pub(super) factor: f64,
    /// image·left = U·S, and basis·right = V, in the order of the values.
    pub(super) left: Mat<f64>,
    pub(super) right: Mat<f64>,
    /// Singular values, largest first.
    pub(super) values: Vec<f64>,
    /// How many components are wanted.
    pub(crate) rank: usize,
    /// Estimate of the excess of the error over the smallest possible one, as a share of it; 0 where nothing is left to be found.
    pub(crate) excess: f64,
    /// Krylov blocks that were multiplied.
    pub(crate) blocks: usize,
}

impl Found {
    /// From an orthonormal basis V `(cols, d)`, D·V, and the eigenvectors of (D·V)ᵀ·(D·V).
    pub(super) fn ritz(basis: Mat<f64>, image: Mat<f64>, eigen: Eigen) -> Found {
        Found {
            basis: Thin::Columns(basis),
            image: Thin::Columns(image),
            between: None,
            factor: 1.0,
            left: eigen.vectors.clone(),
            right: eigen.vectors,
            values: eigen.values.iter().map(|square| square.sqrt()).collect(),
            rank: eigen.values.len(),
            excess: 0.0,
            blocks: 0,
        }
    }

    /// All of it: the singular value decomposition of D in f64. `None` if none was found.
    pub(crate) fn exact(dense: &Mat<f64>, want: &dyn Fn(&[f64]) -> Want) -> Option<Found> {
        let svd = dense.thin_svd().ok()?;
        let values: Vec<f64> = (0..svd.S().dim()).map(|i| svd.S()[i]).collect();
        if values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        let rank = match want(&values) {
            Want::Rank(rank) => rank.min(values.len()),
            Want::More => values.len(),
        };
        let image = Mat::from_fn(dense.nrows(), values.len(), |i, k| svd.U()[(i, k)] * values[k]);
        let one = Mat::identity(values.len(), values.len());
        let eigen = Eigen { values: values.iter().map(|value| value * value).collect(), vectors: one };
        Some(Found { rank, ..Found::ritz(svd.V().to_owned(), image, eigen) })
    }

    /// All singular values that are known, largest first; of an iteration the later ones are too small.
    pub(crate) fn values(&self) -> &[f64] {
        &self.values
    }

    /// The square of the norm of what is captured.
    pub(crate) fn captured(&self) -> f64 {
        self.values.iter().map(|value| value * value).sum()
    }

    /// The components of D times a number above 0.
    pub(crate) fn scaled(mut self, by: f64) -> Found {
        self.factor *= by;
        self.left.col_iter_mut().for_each(|column| column.iter_mut().for_each(|value| *value *= by));
        self.values.iter_mut().for_each(|value| *value *= by);
        self
    }

    /// U·S `(rows, rank)` and V `(cols, rank)` of the first components.
    pub(crate) fn components(&self, rank: usize) -> (Mat<f64>, Mat<f64>) {
        (product(self.image.view(), self.left.subcols(0, rank)), product(self.basis.view(), self.right.subcols(0, rank)))
    }

    /// Bᵀ·D `(rank, cols)` for B `(rows, rank)`, as far as D is captured.
    pub(crate) fn projected(&self, b: &Mat<f64>) -> Mat<f64> {
        let within = inner(b.as_ref(), self.image.view());
        let mut within = match &self.between {
            Some(between) => product(within.as_ref(), between.as_ref()),
            None => within,
        };
        within.col_iter_mut().for_each(|column| column.iter_mut().for_each(|value| *value *= self.factor));
        product(within.as_ref(), self.basis.view().transpose())
    }
}

//! A difference in the metric of a layer's inputs: D·F, whose norm is what the difference makes of inputs x with E[x·xᵀ] = F·Fᵀ. F is
//! multiplied with the thin matrices of an iteration, so that D·F is not formed but where its norm is wanted.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};

use super::difference::{Difference, Scratch};
use crate::error::{Error, Result};
use crate::kernel::lowrank::{Sweeps, squares};

/// The factor F of the covariance of a layer's inputs.
pub(crate) enum Metric {
    /// F is diagonal: the root mean squares.
    Diagonal(Vec<f32>),
    /// F `(inputs, columns)`, row-major.
    Factor { values: Vec<f32>, columns: usize },
}

impl Metric {
    fn columns(&self) -> usize {
        match self {
            Metric::Diagonal(values) => values.len(),
            Metric::Factor { columns, .. } => *columns,
        }
    }

    /// F·X `(inputs, width)` for X `(columns, width)`.
    fn times(&self, x: &[f32], width: usize) -> Vec<f32> {
        match self {
            Metric::Diagonal(values) => scaled(x, values, width),
            Metric::Factor { values, columns } => {
                let f = MatRef::from_row_major_slice(values, values.len() / columns, *columns);
                multiplied(f, MatRef::from_row_major_slice(x, *columns, width))
            }
        }
    }

    /// Fᵀ·Y `(columns, width)` for Y `(inputs, width)`.
    fn transposed_times(&self, y: &[f32], width: usize) -> Vec<f32> {
        match self {
            Metric::Diagonal(values) => scaled(y, values, width),
            Metric::Factor { values, columns } => {
                let inputs = values.len() / columns;
                let f = MatRef::from_row_major_slice(values, inputs, *columns);
                multiplied(f.transpose(), MatRef::from_row_major_slice(y, inputs, width))
            }
        }
    }
}

/// Each row of a thin matrix times a value.
fn scaled(x: &[f32], by: &[f32], width: usize) -> Vec<f32> {
    x.chunks_exact(width).zip(by).flat_map(|(row, by)| row.iter().map(move |x| x * by)).collect()
}

/// A·B, row-major.
fn multiplied(a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Vec<f32> {
    let mut out = vec![0.0; a.nrows() * b.ncols()];
    let view = MatMut::from_row_major_slice_mut(&mut out, a.nrows(), b.ncols());
    matmul(view, Accum::Replace, a, b, 1.0, Par::Seq);
    out
}

/// D·F, or Fᵀ·D where the inputs of the layer are the rows of the stored matrix.
pub(crate) struct Weighted<'d, 'a> {
    pub(crate) d: &'d Difference<'a>,
    pub(crate) metric: &'d Metric,
    pub(crate) inputs_are_rows: bool,
}

/// The squares of two norms of one matrix.
#[derive(Default)]
pub(crate) struct Squares {
    /// ‖D‖².
    pub(crate) plain: f64,
    /// ‖D·F‖².
    pub(crate) weighted: f64,
}

impl Weighted<'_, '_> {
    /// What an iteration starts from, by the start Dᵀ·Ω of the plain difference.
    pub(crate) fn start(&self, plain: Vec<f32>, width: usize) -> Vec<f32> {
        if self.inputs_are_rows { plain } else { self.metric.transposed_times(&plain, width) }
    }

    /// The norms of D, or of D - L·R for L `(rows, rank)` and R `(rank, cols)`, summed value by value.
    ///
    /// # Errors
    /// `E-001`, `E-004`, `E-006`.
    pub(crate) fn squares(&self, less: Option<(&Mat<f64>, &Mat<f64>)>) -> Result<Squares> {
        let cols = self.d.cols;
        let mut whole = match (self.metric, self.inputs_are_rows) {
            // A row of the product depends on all rows of D.
            (Metric::Factor { columns, .. }, true) => Some(Mat::<f32>::zeros(*columns, cols)),
            _ => None,
        };
        let mut sums = Squares::default();
        let mut step = |tile: &std::ops::Range<usize>, scratch: &mut Scratch| {
            if let Some((left, right)) = less {
                let mut product = Mat::<f64>::zeros(tile.len(), cols);
                matmul(product.as_mut(), Accum::Replace, left.subrows(tile.start, tile.len()), right, 1.0, Par::Seq);
                for (i, row) in scratch.d.chunks_exact_mut(cols).enumerate() {
                    row.iter_mut().enumerate().for_each(|(j, d)| *d = (f64::from(*d) - product[(i, j)]) as f32);
                }
            }
            sums.plain += squares(self.d.isa, &scratch.d);
            match (self.metric, &mut whole) {
                (Metric::Diagonal(values), _) if self.inputs_are_rows => {
                    sums.weighted += squares(self.d.isa, &scaled(&scratch.d, &values[tile.clone()], cols));
                }
                (Metric::Diagonal(values), _) => {
                    scratch.d.chunks_exact_mut(cols).for_each(|row| row.iter_mut().zip(values).for_each(|(d, by)| *d *= by));
                    sums.weighted += squares(self.d.isa, &scratch.d);
                }
                (Metric::Factor { values, columns }, whole) => {
                    let d = MatRef::from_row_major_slice(&scratch.d, tile.len(), cols);
                    let f = MatRef::from_row_major_slice(values, values.len() / columns, *columns);
                    match whole {
                        Some(whole) => {
                            let f = f.subrows(tile.start, tile.len());
                            matmul(whole.as_mut(), Accum::Add, f.transpose(), d, 1.0, Par::Seq);
                        }
                        None => sums.weighted += squares(self.d.isa, &multiplied(d, f)),
                    }
                }
            }
            Ok(())
        };
        self.d.each_tile(0..self.d.rows, &mut Scratch::default(), &mut step)?;
        if let Some(whole) = whole {
            sums.weighted = whole.col_iter().flat_map(|column| column.iter()).map(|x| f64::from(*x).powi(2)).sum();
        }
        Ok(sums)
    }

    /// All of it, in f64.
    ///
    /// # Errors
    /// `E-001`, `E-004`, `E-006`.
    pub(crate) fn dense(&self) -> Result<Mat<f64>> {
        let d = self.d.dense()?;
        let f = match self.metric {
            Metric::Diagonal(values) => {
                let by = |i: usize, j: usize| values[if self.inputs_are_rows { i } else { j }];
                return Ok(Mat::from_fn(d.nrows(), d.ncols(), |i, j| d[(i, j)] * f64::from(by(i, j))));
            }
            Metric::Factor { values, columns } => {
                Mat::from_fn(values.len() / columns, *columns, |i, j| f64::from(values[i * columns + j]))
            }
        };
        Ok(if self.inputs_are_rows { f.transpose() * d } else { d * f })
    }
}

impl Sweeps for Weighted<'_, '_> {
    type Error = Error;

    fn shape(&self) -> (usize, usize) {
        let columns = self.metric.columns();
        if self.inputs_are_rows { (columns, self.d.cols) } else { (self.d.rows, columns) }
    }

    fn times(&self, x: &[f32], width: usize) -> Result<Vec<f32>> {
        if self.inputs_are_rows {
            Ok(self.metric.transposed_times(&self.d.times(x, width)?, width))
        } else {
            self.d.times(&self.metric.times(x, width), width)
        }
    }

    fn transposed_times(&self, y: &[f32], width: usize) -> Result<Vec<f32>> {
        if self.inputs_are_rows {
            self.d.transposed_times(&self.metric.times(y, width), width)
        } else {
            Ok(self.metric.transposed_times(&self.d.transposed_times(y, width)?, width))
        }
    }

    fn both(&self, x: &[f32], width: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        if self.inputs_are_rows {
            let y = self.times(x, width)?;
            let z = self.transposed_times(&y, width)?;
            return Ok((y, z));
        }
        let (y, z) = self.d.both(&self.metric.times(x, width), width)?;
        Ok((y, self.metric.transposed_times(&z, width)))
    }
}

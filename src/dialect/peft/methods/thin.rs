//! Matrices in f64, of which one side is a rank: small enough to be computed whole when a factor is read.

use std::sync::Arc;

use crate::adapter::Factor;
use crate::error::Result;
use crate::kernel::Float;
use crate::tensor::{Derived, Dtype, Shape, TensorInfo, TensorSource, read_all};

/// A row-major matrix.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::dialect::peft) struct Matrix {
    pub(in crate::dialect::peft) rows: usize,
    pub(in crate::dialect::peft) cols: usize,
    pub(in crate::dialect::peft) values: Vec<f64>,
}

impl Matrix {
    /// The tensor of a source, whose first dimension counts the rows. Exact, unless it holds no plain floats, which is refused elsewhere.
    ///
    /// # Errors
    /// As [`TensorSource::read`].
    pub(in crate::dialect::peft) fn read(source: &dyn TensorSource, name: &str) -> Result<Matrix> {
        let bytes = read_all(source, name)?;
        let Some(info) = source.info(name) else { return Ok(Matrix { rows: 0, cols: 0, values: Vec::new() }) };
        let mut values = vec![0.0; info.shape.elements() as usize];
        match info.dtype {
            Dtype::F64 => Float::F64.widen(&bytes, &mut values),
            Dtype::F32 => Float::F32.widen(&bytes, &mut values),
            Dtype::F16 => Float::F16.widen(&bytes, &mut values),
            _ => Float::BF16.widen(&bytes, &mut values),
        }
        let (rows, cols) = info.shape.split(1);
        Ok(Matrix { rows: rows as usize, cols: cols as usize, values })
    }

    /// Computes each value from its row and column.
    pub(in crate::dialect::peft) fn of(rows: usize, cols: usize, value: impl Fn(usize, usize) -> f64) -> Matrix {
        let values = (0..rows * cols).map(|i| value(i / cols.max(1), i % cols.max(1))).collect();
        Matrix { rows, cols, values }
    }

    pub(in crate::dialect::peft) fn at(&self, row: usize, col: usize) -> f64 {
        self.values.get(row * self.cols + col).copied().unwrap_or(f64::NAN)
    }

    pub(in crate::dialect::peft) fn transposed(&self) -> Matrix {
        Matrix::of(self.cols, self.rows, |row, col| self.at(col, row))
    }

    pub(in crate::dialect::peft) fn identity(size: usize) -> Matrix {
        Matrix::of(size, size, |row, col| f64::from(u8::from(row == col)))
    }

    /// The Kronecker product.
    pub(in crate::dialect::peft) fn kron(&self, other: &Matrix) -> Matrix {
        let value =
            |row: usize, col: usize| self.at(row / other.rows, col / other.cols) * other.at(row % other.rows, col % other.cols);
        Matrix::of(self.rows * other.rows, self.cols * other.cols, value)
    }

    fn bytes(&self) -> Vec<u8> {
        self.values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }
}

/// Bytes of the largest factor that is computed.
pub(in crate::dialect::peft) const MOST: u64 = 1 << 30;

/// A factor of F64 with the name of the tensor that it is mostly made of; `compute` gives a matrix of these sizes. `None` if it would be too
/// large.
pub(in crate::dialect::peft) fn computed(
    source: &Arc<dyn TensorSource>,
    name: &str,
    (rows, cols): (u64, u64),
    compute: impl Fn(&dyn TensorSource) -> Result<Matrix> + Send + Sync + 'static,
) -> Option<Factor> {
    let info = TensorInfo { dtype: Dtype::F64, shape: Shape::new(vec![rows, cols])? };
    (info.bytes() <= MOST).then_some(())?;
    let mut derived = Derived::new(source);
    derived.insert(name, info, move |source| Ok(compute(source)?.bytes()));
    let derived: Arc<dyn TensorSource> = Arc::new(derived);
    Factor::new(&derived, name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kronecker_product_has_a_block_for_each_value() {
        let x = Matrix { rows: 1, cols: 2, values: vec![2.0, 3.0] };
        let y = Matrix { rows: 2, cols: 1, values: vec![5.0, 7.0] };
        assert_eq!(x.kron(&y), Matrix { rows: 2, cols: 2, values: vec![10.0, 15.0, 14.0, 21.0] });
        assert_eq!(x.transposed(), Matrix { rows: 2, cols: 1, values: vec![2.0, 3.0] });
        assert_eq!(Matrix::identity(2).kron(&x).values, [2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 2.0, 3.0]);
    }
}

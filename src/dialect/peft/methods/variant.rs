//! Variants of LoRA that store a factor in another form: BD-LoRA leaves out the zeros of a block diagonal factor, QALoRA has a column of A
//! for each group of inputs, KaSA has a diagonal between B and A (PEFT `tuners/lora/variants.py`).

use std::sync::Arc;

use super::thin::{Matrix, computed};
use crate::adapter::Factor;
use crate::error::Result;
use crate::tensor::{Derived, Shape, TensorInfo, TensorSource, is_plain_float, read_all};

/// `use_bdlora`: which modules have a block diagonal factor, and of how many blocks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(in crate::dialect::peft) struct BlockDiagonal {
    pub(in crate::dialect::peft) blocks: u64,
    pub(in crate::dialect::peft) a: Vec<String>,
    pub(in crate::dialect::peft) b: Vec<String>,
}

impl BlockDiagonal {
    /// The factors of a module with their zeros; `None` if they do not fall into so many blocks.
    pub(in crate::dialect::peft) fn whole(
        &self,
        source: &Arc<dyn TensorSource>,
        module: &str,
        a: Factor,
        b: Factor,
    ) -> Option<(Factor, Factor)> {
        // PEFT asks whether the name occurs in the path, wherever that is.
        let listed = |names: &[String]| names.iter().any(|name| !name.is_empty() && module.contains(name.as_str()));
        let a = if listed(&self.a) { self.written_out(source, &a)? } else { a };
        let b = if listed(&self.b) { self.written_out(source, &b)? } else { b };
        Some((a, b))
    }

    /// `(rows, cols)` with the blocks below each other as `(rows, blocks · cols)` with them on the diagonal.
    fn written_out(&self, source: &Arc<dyn TensorSource>, factor: &Factor) -> Option<Factor> {
        let (rows, cols) = factor.info().shape.matrix()?;
        if self.blocks == 0 || rows % self.blocks != 0 {
            return None;
        }
        let info = TensorInfo { dtype: factor.info().dtype, shape: Shape::new(vec![rows, cols.checked_mul(self.blocks)?])? };
        let size = info.bytes().checked_div(info.shape.elements())?;
        let (name, len, high) = (factor.name().to_owned(), info.bytes(), rows / self.blocks);
        let mut derived = Derived::new(source);
        derived.insert(factor.name(), info, move |source| {
            let stored = read_all(source, &name)?;
            let mut whole = vec![0; len as usize];
            let width = (cols * size) as usize;
            for (row, line) in (0u64..).zip(stored.chunks_exact(width.max(1))) {
                let at = (row * (len / rows) + row / high * cols * size) as usize;
                if let Some(place) = whole.get_mut(at..at + width) {
                    place.copy_from_slice(line);
                }
            }
            Ok(whole)
        });
        let derived: Arc<dyn TensorSource> = Arc::new(derived);
        Factor::new(&derived, factor.name())
    }
}

/// QALoRA's A `(rank, in / group)` for inputs one by one: PEFT takes the mean of each group and multiplies it by the number of groups.
pub(in crate::dialect::peft) fn ungrouped(source: &Arc<dyn TensorSource>, a: &Factor, group: u64) -> Option<Factor> {
    let (rank, groups) = a.info().shape.matrix().filter(|_| is_plain_float(a.info().dtype))?;
    let name = a.name().to_owned();
    computed(source, a.name(), (rank, groups.checked_mul(group)?), move |source| {
        let a = Matrix::read(source, &name)?;
        let by = a.cols as f64 / group as f64;
        Ok(Matrix::of(a.rows, a.cols * group as usize, |k, i| a.at(k, i / group as usize) * by))
    })
}

/// KaSA's B·diag.
pub(in crate::dialect::peft) fn with_diagonal(source: &Arc<dyn TensorSource>, b: &Factor, diagonal: &str) -> Option<Factor> {
    let (out, rank) = b.info().shape.matrix()?;
    let info = source.info(diagonal)?;
    if info.shape.dims() != [rank] || !is_plain_float(info.dtype) || !is_plain_float(b.info().dtype) {
        return None;
    }
    let names = [b.name().to_owned(), diagonal.to_owned()];
    computed(source, b.name(), (out, rank), move |source| -> Result<Matrix> {
        let (b, diagonal) = (Matrix::read(source, &names[0])?, Matrix::read(source, &names[1])?);
        Ok(Matrix::of(b.rows, b.cols, |row, k| b.at(row, k) * diagonal.at(k, 0)))
    })
}

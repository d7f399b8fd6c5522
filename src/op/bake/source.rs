//! The baked tensors, computed where they are read: a factor times a number, rounded once, with zeros where the rank is higher. Nothing
//! is held but the piece that is asked for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::adapter::Factor;
use crate::error::{Error, Result};
use crate::exec;
use crate::kernel::Float;
use crate::rules;
use crate::tensor::{TensorInfo, TensorSource};

/// One baked tensor: a matrix in the upper left corner, and zeros to the right or below.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// What it becomes.
    pub(super) info: TensorInfo,
    /// What it is made of.
    pub(super) from: Factor,
    /// What its values are multiplied by.
    pub(super) times: f64,
}

impl Entry {
    /// The formats that it has and gets.
    pub(super) fn floats(&self) -> Result<(Float, Float)> {
        let float = |dtype| exec::float_of(dtype).ok_or_else(|| Error::new(rules::FACTOR_DTYPE, format!("{dtype} is no float")));
        Ok((float(self.from.info().dtype)?, float(self.info.dtype)?))
    }

    /// Values `first..first + values.len()` of the baked tensor, before they are rounded.
    fn values(&self, first: u64, values: &mut [f64]) -> Result<()> {
        let outside = || Error::new(rules::READ, "read outside the tensor").tensor(self.from.name());
        let shape = |info: &TensorInfo| info.shape.matrix().ok_or_else(outside);
        let ((rows, cols), (_, wide)) = (shape(self.from.info())?, shape(&self.info)?);
        values.fill(0.0);
        if values.is_empty() || wide == 0 {
            return Ok(());
        }
        let end = first.checked_add(values.len() as u64).ok_or_else(outside)?;
        let (from_row, to_row) = (first / wide, end.div_ceil(wide).min(rows));
        if from_row >= to_row {
            return Ok(());
        }
        let found = self.rows(from_row, to_row - from_row, cols)?;
        for (row, found) in (from_row..to_row).zip(found.chunks_exact(cols.max(1) as usize)) {
            // Of this row, the columns that the matrix has and that were asked for.
            let start = row * wide;
            let (from, to) = (first.max(start), end.min(start + cols));
            if from < to {
                let target = values.get_mut((from - first) as usize..(to - first) as usize).ok_or_else(outside)?;
                let source = found.get((from - start) as usize..(to - start) as usize).ok_or_else(outside)?;
                target.iter_mut().zip(source).for_each(|(value, found)| *value = found * self.times);
            }
        }
        Ok(())
    }

    /// Whole rows of the matrix.
    fn rows(&self, from: u64, count: u64, cols: u64) -> Result<Vec<f64>> {
        let (float, _) = self.floats()?;
        let size = float.size() as u64;
        let mut raw = vec![0; (count * cols * size) as usize];
        self.from.read(from * cols * size, &mut raw)?;
        let mut values = vec![0.0; (count * cols) as usize];
        float.widen(&raw, &mut values);
        Ok(values)
    }
}

/// All baked tensors, by the names that they are written under.
#[derive(Debug)]
pub(super) struct Baked {
    label: PathBuf,
    entries: BTreeMap<String, Entry>,
}

impl Baked {
    pub(super) fn new(label: &str, entries: BTreeMap<String, Entry>) -> Self {
        Baked { label: PathBuf::from(label), entries }
    }
}

impl TensorSource for Baked {
    fn label(&self) -> &Path {
        &self.label
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.entries.keys().map(String::as_str))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.entries.get(name).map(|entry| &entry.info)
    }

    fn read(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let outside = || Error::new(rules::READ, "read outside the tensor").tensor(name).offset(offset);
        let entry = self.entries.get(name).ok_or_else(outside)?;
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= entry.info.bytes()).ok_or_else(outside)?;
        let (_, float) = entry.floats()?;
        let size = float.size() as u64;
        let first = offset / size;
        let mut values = vec![0.0; (end.div_ceil(size) - first) as usize];
        entry.values(first, &mut values)?;
        let mut raw = vec![0; values.len() * float.size()];
        float.narrow(&values, &mut raw);
        let start = (offset - first * size) as usize;
        buf.copy_from_slice(raw.get(start..start + buf.len()).ok_or_else(outside)?);
        Ok(())
    }

    fn unchanged(&self) -> Result<()> {
        self.entries.values().try_for_each(|entry| entry.from.source().unchanged())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::tensor::{Dtype, MemorySource, Shape};

    fn info(dtype: Dtype, rows: u64, cols: u64) -> TensorInfo {
        TensorInfo { dtype, shape: Shape::new(vec![rows, cols]).unwrap() }
    }

    /// 1 to 6 in two rows of three, baked into `(rows, cols)`.
    fn baked(rows: u64, cols: u64, times: f64) -> Baked {
        let mut memory = MemorySource::new();
        let bytes = (1..=6u8).flat_map(|n| f32::from(n).to_le_bytes()).collect();
        memory.insert("x", info(Dtype::F32, 2, 3), bytes).unwrap();
        let source: Arc<dyn TensorSource> = Arc::new(memory);
        let from = Factor::new(&source, "x").unwrap();
        Baked::new("test", [("y".to_owned(), Entry { info: info(Dtype::F32, rows, cols), from, times })].into())
    }

    #[test]
    fn zeros_are_added_to_the_right_and_below() {
        let cases: [(u64, u64, &[f32]); 3] = [
            (2, 3, &[2., 4., 6., 8., 10., 12.]),
            (2, 5, &[2., 4., 6., 0., 0., 8., 10., 12., 0., 0.]),
            (4, 3, &[2., 4., 6., 8., 10., 12., 0., 0., 0., 0., 0., 0.]),
        ];
        for (rows, cols, expected) in cases {
            let bytes: Vec<u8> = expected.iter().flat_map(|value| value.to_le_bytes()).collect();
            let baked = baked(rows, cols, 2.0);
            // Every range of bytes, aligned or not.
            for from in 0..=bytes.len() {
                for to in from..=bytes.len() {
                    let mut buf = vec![0xaa; to - from];
                    baked.read("y", from as u64, &mut buf).unwrap();
                    assert_eq!(buf, bytes[from..to], "{rows}x{cols} {from}..{to}");
                }
            }
            assert!(baked.read("y", bytes.len() as u64, &mut [0]).is_err());
        }
    }
}

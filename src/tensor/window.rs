//! A part of a tensor as a tensor of its own: runs of values at even distances, such as one slice of a stack, or some columns of it.

use std::path::Path;
use std::sync::Arc;

use super::{TensorInfo, TensorSource};
use crate::error::Result;

/// Rows of a matrix that lie `stride` values apart in tensor `name` of another source, the first at value `first`. The matrix goes by
/// that name too.
pub(crate) struct Window {
    pub(crate) of: Arc<dyn TensorSource>,
    pub(crate) name: String,
    pub(crate) first: u64,
    pub(crate) stride: u64,
    /// The last dimension is the length of a row.
    pub(crate) info: TensorInfo,
}

impl TensorSource for Window {
    fn label(&self) -> &Path {
        self.of.label()
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(std::iter::once(self.name.as_str()))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        (name == self.name).then_some(&self.info)
    }

    fn read(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let size = self.info.bytes().checked_div(self.info.shape.elements()).unwrap_or(1);
        let width = self.info.shape.dims().last().copied().unwrap_or(0) * size;
        let (first, stride) = (self.first * size, self.stride * size);
        if stride == width || width == 0 {
            return self.of.read(name, first + offset, buf);
        }
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let (row, column) = (at / width, at % width);
            let (run, others) = rest.split_at_mut(((width - column) as usize).min(rest.len()));
            self.of.read(name, first + row * stride + column, run)?;
            at += run.len() as u64;
            rest = others;
        }
        Ok(())
    }

    fn unchanged(&self) -> Result<()> {
        self.of.unchanged()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{Dtype, MemorySource, Shape};

    #[test]
    fn a_window_reads_the_values_that_it_covers() {
        let info = |dims: &[u64]| TensorInfo { dtype: Dtype::U8, shape: Shape::new(dims.to_vec()).unwrap_or_default() };
        let mut memory = MemorySource::new();
        memory.insert("x", info(&[4, 5]), (0..20).collect()).unwrap();
        let window = |first, stride, dims: &[u64], of: &Arc<dyn TensorSource>| Window {
            of: Arc::clone(of),
            name: "x".to_owned(),
            first,
            stride,
            info: info(dims),
        };
        let of: Arc<dyn TensorSource> = Arc::new(memory);
        let columns = window(6, 5, &[3, 2], &of);
        let mut buf = [0; 6];
        columns.read("x", 0, &mut buf).unwrap();
        assert_eq!(buf, [6, 7, 11, 12, 16, 17]);
        columns.read("x", 1, &mut buf[..4]).unwrap();
        assert_eq!(buf[..4], [7, 11, 12, 16]);
        window(10, 5, &[2, 5], &of).read("x", 3, &mut buf).unwrap();
        assert_eq!(buf, [13, 14, 15, 16, 17, 18]);
    }
}

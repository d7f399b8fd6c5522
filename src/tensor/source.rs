//! The seam between "a named tensor" and "where its bytes are": one file, a shard set, memory, or a test double.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Dtype, Shape};
use crate::error::{Error, Result};
use crate::rules;

/// Dtype and shape of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Shape,
}

impl TensorInfo {
    /// Bytes of the whole tensor. Sources only hold tensors for which this is exact.
    pub fn bytes(&self) -> u64 {
        self.shape.bytes(self.dtype).unwrap_or(u64::MAX)
    }
}

/// Named tensors whose bytes can be read in ranges, from any thread.
pub trait TensorSource: Send + Sync {
    /// The file or folder, for messages.
    fn label(&self) -> &Path;

    /// Names in the order of the file.
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_>;

    /// What the tensor is, or `None` if there is none of that name.
    fn info(&self, name: &str) -> Option<&TensorInfo>;

    /// Fills `buf` with the bytes of the tensor from byte `offset` of the tensor on (little-endian, row-major).
    ///
    /// # Errors
    /// `E-001` if the bytes cannot be read, `E-004` if the file became shorter since it was opened.
    ///
    /// # Panics
    /// May panic if the tensor does not exist; callers hold names that [`info`](Self::info) confirmed.
    fn read(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Fills `out` with values of an F64 tensor from value `first` on, where the source computes them and need not make bytes of them first. `None`
    /// if it has bytes: [`read`](Self::read) them.
    fn values(&self, _name: &str, _first: u64, _out: &mut [f64]) -> Option<Result<()>> {
        None
    }

    /// Makes sure that what was read is still there, as far as the source can tell. Memory does not change.
    ///
    /// # Errors
    /// `E-004` if a file was changed, replaced or removed since it was opened.
    fn unchanged(&self) -> Result<()> {
        Ok(())
    }
}

/// Bytes that [`pieces`] reads at a time. A multiple of the size of every value.
const PIECE: u64 = 1 << 20;

/// Calls `step` with the offset of each piece of `len` bytes and a buffer as long as it, for reading from end to end what may be larger
/// than memory.
///
/// # Errors
/// The first of `step`, which ends it.
pub(crate) fn pieces(len: u64, mut step: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<()> {
    let mut buffer = vec![0; len.min(PIECE) as usize];
    let mut offset = 0;
    while offset < len {
        let size = (len - offset).min(PIECE);
        if let Some(piece) = buffer.get_mut(..size as usize) {
            step(offset, piece)?;
        }
        offset += size;
    }
    Ok(())
}

/// Tensors in memory: what a program that computes its factors hands to the library, and what tests use.
#[derive(Debug, Default, Clone)]
pub struct MemorySource {
    tensors: BTreeMap<String, (TensorInfo, Vec<u8>)>,
}

impl MemorySource {
    /// An empty source.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor of little-endian bytes.
    ///
    /// # Errors
    /// `C-013` if `bytes` is not as long as dtype and shape demand.
    pub fn insert(&mut self, name: impl Into<String>, info: TensorInfo, bytes: Vec<u8>) -> Result<()> {
        let name = name.into();
        let found = bytes.len() as u64;
        if info.shape.bytes(info.dtype) != Some(found) {
            let message = format!("tensor {name:?} is {} {} but has {found} bytes", info.dtype, info.shape);
            return Err(Error::new(rules::SIZE_AGREES, message).tensor(name));
        }
        self.tensors.insert(name, (info, bytes));
        Ok(())
    }
}

impl TensorSource for MemorySource {
    fn label(&self) -> &Path {
        Path::new("(memory)")
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.tensors.keys().map(String::as_str))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info)
    }

    fn read(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let bytes = self.tensors.get(name).map_or(&[][..], |(_, bytes)| bytes);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        match start.checked_add(buf.len()).and_then(|end| bytes.get(start..end)) {
            Some(found) => buf.copy_from_slice(found),
            None => return Err(Error::new(rules::READ, "read past the end of the tensor").tensor(name).offset(offset)),
        }
        Ok(())
    }
}

//! A factor: one tensor of an adapter, read when needed.

use std::sync::Arc;

use crate::error::Result;
use crate::tensor::{TensorInfo, TensorSource};

/// A handle to one tensor of an adapter.
#[derive(Clone)]
pub struct Factor {
    source: Arc<dyn TensorSource>,
    name: String,
    info: TensorInfo,
}

impl Factor {
    /// The tensor `name` of `source`; `None` if there is none.
    pub fn new(source: &Arc<dyn TensorSource>, name: &str) -> Option<Self> {
        let info = source.info(name)?.clone();
        Some(Factor { source: Arc::clone(source), name: name.to_owned(), info })
    }

    /// Name of the tensor in the adapter's file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Dtype and shape.
    pub fn info(&self) -> &TensorInfo {
        &self.info
    }

    /// The source, for messages and for reading all factors of one file.
    pub fn source(&self) -> &Arc<dyn TensorSource> {
        &self.source
    }

    /// Fills `buf` with little-endian bytes from byte `offset` of the tensor on.
    ///
    /// # Errors
    /// As [`TensorSource::read`].
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.source.read(&self.name, offset, buf)
    }

    /// See [`TensorSource::values`].
    pub(crate) fn values(&self, first: u64, out: &mut [f64]) -> Option<Result<()>> {
        self.source.values(&self.name, first, out)
    }

    /// Whether the other has the same dtype, shape and bytes. Reads both, a part at a time.
    ///
    /// # Errors
    /// As [`TensorSource::read`].
    pub(crate) fn equals(&self, other: &Factor) -> Result<bool> {
        if self.info != other.info {
            return Ok(false);
        }
        let bytes = self.info.bytes();
        let (mut ours, mut theirs) = (vec![0; PART], vec![0; PART]);
        let mut at = 0;
        while at < bytes {
            let len = usize::try_from(bytes - at).unwrap_or(PART).min(PART);
            let (Some(ours), Some(theirs)) = (ours.get_mut(..len), theirs.get_mut(..len)) else { return Ok(false) };
            self.read(at, ours)?;
            other.read(at, theirs)?;
            if ours != theirs {
                return Ok(false);
            }
            at += len as u64;
        }
        Ok(true)
    }
}

/// Bytes that are compared at a time.
const PART: usize = 1 << 20;

impl std::fmt::Debug for Factor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.name, self.info.dtype, self.info.shape)
    }
}

//! Factors on their way into a file whose header depends on all of them: they are kept in a file without a name beside the output, so that
//! memory does not follow the size of the adapter.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::io::{OutputKind, Overwrite, Staging, disk, read_error, write_error};
use crate::rules;
use crate::tensor::{TensorInfo, TensorSource};

/// Where tensors are put, from any thread.
pub(super) struct Spool {
    file: File,
    target: PathBuf,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    tensors: BTreeMap<String, (TensorInfo, u64)>,
    len: u64,
}

impl Spool {
    /// An empty one beside `output`.
    ///
    /// # Errors
    /// `E-002`.
    pub(super) fn new(output: &Path) -> Result<Self> {
        let file = Staging::new(output, OutputKind::File, Overwrite::Refuse)?.nameless()?;
        Ok(Spool { file, target: output.to_owned(), held: Mutex::default() })
    }

    /// Room for a tensor.
    pub(super) fn reserve(&self, name: &str, info: TensorInfo) -> Place {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = held.len;
        held.len += info.bytes();
        held.tensors.insert(name.to_owned(), (info, offset));
        Place(offset)
    }

    /// Puts bytes at `offset` of a tensor.
    ///
    /// # Errors
    /// `E-002`.
    pub(super) fn put(&self, place: Place, offset: u64, bytes: &[u8]) -> Result<()> {
        disk::write_at(&self.file, bytes, place.0 + offset).map_err(|e| write_error(&self.target, e))
    }

    /// The tensors, for reading.
    pub(super) fn finish(self) -> Spooled {
        let tensors = self.held.into_inner().unwrap_or_else(PoisonError::into_inner).tensors;
        Spooled { file: self.file, target: self.target, tensors }
    }
}

/// Where a tensor lies in the spool.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place(u64);

/// What was put into a spool.
pub(super) struct Spooled {
    file: File,
    target: PathBuf,
    tensors: BTreeMap<String, (TensorInfo, u64)>,
}

impl TensorSource for Spooled {
    fn label(&self) -> &Path {
        &self.target
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.tensors.keys().map(String::as_str))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info)
    }

    fn read(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let missing = || Error::new(rules::READ, "no such tensor").file(&self.target).tensor(name);
        let (_, start) = self.tensors.get(name).ok_or_else(missing)?;
        disk::read_at(&self.file, buf, start + offset).map_err(|e| read_error(&self.target, e))
    }
}

//! One safetensors file, open: the header checked once, tensors read by range from the same file.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::Strictness;
use super::header::{self, Entry, Header};
use crate::error::{Diagnostic, Error, Result};
use crate::io::{self, ByteSource, ReadMode};
use crate::limits::Limits;
use crate::rules;
use crate::tensor::{TensorInfo, TensorSource};

/// An open safetensors file.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    source: ByteSource,
    header: Header,
    index: HashMap<String, usize>,
}

impl SafetensorsFile {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// `E-001`, `E-007` if it cannot be opened; otherwise the first broken rule of `C-001` to `C-023`.
    pub fn open(path: &Path, mode: ReadMode, strictness: Strictness, limits: &Limits) -> Result<Self> {
        let source = io::open(path, mode)?;
        let header = header::read(&source, path, strictness, limits)?;
        let index = header.entries.iter().enumerate().map(|(i, e)| (e.name.clone(), i)).collect();
        Ok(SafetensorsFile { path: path.to_owned(), source, header, index })
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the file in bytes.
    pub fn file_len(&self) -> u64 {
        self.source.len()
    }

    /// `__metadata__`, in the order of the file.
    pub fn metadata(&self) -> &[(String, String)] {
        &self.header.metadata
    }

    /// What the reader let pass.
    pub fn warnings(&self) -> &[Diagnostic] {
        &self.header.warnings
    }

    /// Device and inode of the open file.
    pub(crate) fn identity(&self) -> (u64, u64) {
        self.source.identity()
    }

    /// The header, for writers that keep the layout.
    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// The same file with each tensor under the names that `names_of` gives it, which may be none or several.
    pub(crate) fn renamed(mut self, names_of: impl Fn(&str) -> Vec<String>) -> Self {
        let entries = std::mem::take(&mut self.header.entries);
        let named = |entry: Entry| names_of(&entry.name).into_iter().map(move |name| Entry { name, ..entry.clone() });
        self.header.entries = entries.into_iter().flat_map(named).collect();
        self.index = self.header.entries.iter().enumerate().map(|(i, entry)| (entry.name.clone(), i)).collect();
        self
    }

    /// The entry of a tensor.
    pub(crate) fn entry(&self, name: &str) -> Option<&Entry> {
        self.index.get(name).and_then(|&i| self.header.entries.get(i))
    }

    /// Fills `buf` from byte `offset` of the file.
    pub(crate) fn read_bytes(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.source.read_at(&self.path, offset, buf)
    }

    /// Copies `len` bytes from byte `offset` of the file on to `to_offset` of `to`; false where the system cannot by itself.
    pub(crate) fn copy_bytes(&self, offset: u64, to: &File, to_offset: u64, len: u64) -> Result<bool> {
        self.source.copy_to(&self.path, offset, to, to_offset, len)
    }
}

impl TensorSource for SafetensorsFile {
    fn label(&self) -> &Path {
        &self.path
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.header.entries.iter().map(|e| e.name.as_str()))
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.entry(name).map(|e| &e.info)
    }

    fn read(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let outside = || Error::new(rules::READ, "read outside the tensor").file(&self.path).tensor(name);
        let entry = self.entry(name).ok_or_else(outside)?;
        let begin = entry.begin.checked_add(offset).ok_or_else(outside)?;
        match begin.checked_add(buf.len() as u64) {
            Some(end) if end <= entry.end => self.read_bytes(begin, buf).map_err(|e| e.tensor(name)),
            _ => Err(outside()),
        }
    }

    fn unchanged(&self) -> Result<()> {
        self.source.unchanged(&self.path)
    }
}

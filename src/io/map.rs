//! Memory maps of input files, read-only. The one place outside the kernels with `unsafe`: a map of a file is sound only while
//! nobody truncates the file, which no program can prove; [`ReadMode::Map`](super::ReadMode) says so and is never the default.
#![allow(unsafe_code)]

use std::fs::File;

/// A read-only map of the first `len` bytes of a file.
#[derive(Debug)]
pub(super) struct Map(memmap2::Mmap);

impl Map {
    /// Maps the file, or `None` where it cannot be mapped (empty file, file system without maps): reads take its place.
    pub(super) fn new(file: &File, len: u64) -> Option<Map> {
        let len = usize::try_from(len).ok().filter(|&len| len > 0)?;
        // SAFETY: the map is private and read-only, and only `len` bytes are mapped, which the file had when it was opened. That
        // no other process truncates the file is the contract of `ReadMode::Map`, which the caller chose.
        unsafe { memmap2::MmapOptions::new().len(len).map(file) }.ok().map(Map)
    }

    /// `len` bytes from `offset` on, or `None` past the end.
    pub(super) fn get(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        self.0.get(start..start.checked_add(len)?)
    }
}

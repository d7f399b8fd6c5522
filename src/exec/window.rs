//! The windows of a merge in place: consecutive pieces of the changed tensors, small enough to be computed in memory, and the units in
//! them, of which a disk writes each whole or not at all. `spec/journal.md` defines both.

use std::ops::Range;

use twox_hash::XxHash3_64;

use super::block::{Ground, Scratch, rows_cols};
use super::tasks::{size_of_value, tiles_within};
use crate::error::Result;
use crate::kernel::{Isa, Sums};
use crate::plan::Change;

/// Most bytes of one window. Part of the journal's format.
pub(crate) const WINDOW: u64 = 8 << 20;
/// Bytes between the borders of units, counted from the start of the file: the sector of a disk.
pub(super) const UNIT: u64 = 512;

/// A piece of one change that lies in one piece in the file: whole rows, or a part of one row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Window {
    /// Index of the change.
    pub(super) change: usize,
    pub(super) rows: Range<u64>,
    pub(super) cols: Range<u64>,
    /// Offset of its first byte in the file.
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Number of its first unit among those of all windows.
    pub(super) first_unit: u64,
}

impl Window {
    /// Units that it touches. The first and the last may be shared with a neighbour, of which each has its own part.
    pub(super) fn units(&self) -> u64 {
        (self.offset + self.len).div_ceil(UNIT) - self.offset / UNIT
    }

    /// The ranges of the units within the window's bytes.
    pub(super) fn pieces(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (offset, len) = (self.offset, self.len);
        (offset / UNIT..(offset + len).div_ceil(UNIT)).map(move |unit| {
            let (begin, end) = ((unit * UNIT).max(offset), ((unit + 1) * UNIT).min(offset + len));
            (begin - offset) as usize..(end - offset) as usize
        })
    }
}

/// All windows of the changes, in order, and the number of units in them.
pub(super) fn windows<'c, 'a: 'c>(changes: impl Iterator<Item = &'c Change<'a>>) -> (Vec<Window>, u64) {
    let (mut windows, mut units) = (Vec::new(), 0);
    for (index, change) in changes.enumerate() {
        let (rows, cols) = rows_cols(change);
        let size = size_of_value(change);
        let high = (WINDOW / (cols * size).max(1)).max(1);
        let wide = (WINDOW / size).min(cols).max(1);
        let mut row = 0;
        while row < rows {
            let slice_end = (row / change.slice_rows() + 1) * change.slice_rows();
            let row_end = rows.min(row + high).min(slice_end);
            let mut col = 0;
            while col < cols {
                let col_end = cols.min(col + wide);
                let window = Window {
                    change: index,
                    rows: row..row_end,
                    cols: col..col_end,
                    offset: change.begin + (row * cols + col) * size,
                    len: (row_end - row) * (col_end - col) * size,
                    first_unit: units,
                };
                units += window.units();
                windows.push(window);
                col = col_end;
            }
            row = row_end;
        }
    }
    (windows, units)
}

/// The mark of a unit's bytes: XXH3, never 0, which says that there is none yet.
pub(super) fn mark(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes).max(1)
}

/// How a block is computed: with or without a look at its values.
pub(super) type Compute = fn(&dyn Ground, Isa, &Change<'_>, Range<u64>, Range<u64>, &mut Scratch, &mut [u8]) -> Result<Sums>;

/// All bytes of a window, in the buffer that `scratch` has for them, which is to be put back.
pub(super) fn compute_window(
    ground: &dyn Ground,
    isa: Isa,
    change: &Change<'_>,
    window: &Window,
    tile: u64,
    scratch: &mut Scratch,
    block: Compute,
) -> Result<(Sums, Vec<u8>)> {
    let (mut sums, mut out) = (Sums::default(), std::mem::take(&mut scratch.window));
    out.resize(window.len as usize, 0);
    let size = size_of_value(change) as usize;
    let total = (window.cols.end - window.cols.start) as usize * size;
    for (rows, cols) in tiles_within(change, tile, window.rows.clone(), window.cols.clone()) {
        let width = (cols.end - cols.start) as usize * size;
        let first = (rows.start - window.rows.start) as usize * total + (cols.start - window.cols.start) as usize * size;
        let len = (rows.end - rows.start) as usize * width;
        if width == total || rows.end - rows.start == 1 {
            sums.add(&block(ground, isa, change, rows, cols, scratch, &mut out[first..first + len])?);
            continue;
        }
        let mut part = std::mem::take(&mut scratch.out);
        part.resize(len, 0);
        sums.add(&block(ground, isa, change, rows, cols, scratch, &mut part)?);
        for (row, bytes) in part.chunks_exact(width.max(1)).enumerate() {
            out[first + row * total..first + row * total + width].copy_from_slice(bytes);
        }
        scratch.out = part;
    }
    Ok((sums, out))
}

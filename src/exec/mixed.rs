//! Changes to which several adapters add by a method that works on single values (TIES and its kin): a block of each update is computed, what
//! the method drops is dropped, and the rest becomes one value that is added to the base's. What is dropped depends on all values of an
//! update; whoever comes first finds that out, by reading it several times, and no update is ever held whole.

use std::ops::Range;
use std::sync::{Arc, PoisonError};

use super::block::{in_slice, rows_cols};
use super::load::overflowed;
use super::scaled::{Buffers, product};
use crate::error::{Error, Result};
use crate::kernel::Isa;
use crate::kernel::fusion::{Keep, Reading, key};
use crate::plan::{Change, Contribution, Mixing, Panel};

/// Values of an update, in f64, that are computed at a time.
const STRIP: u64 = 1 << 15;

/// The updates of a block as one, added to `base`, into `buffers.sum`.
///
/// # Errors
/// `A-008`, `A-031`, `E-001`, `E-004`.
pub(super) fn sums(
    isa: Isa,
    change: &Change<'_>,
    mixing: &Mixing,
    (rows, cols): (&Range<u64>, &Range<u64>),
    base: &[f64],
    buffers: &mut Buffers,
) -> Result<()> {
    let keeps = keeps(isa, change, mixing)?;
    let (slice, within) = in_slice(change, rows);
    let width = ((cols.end - cols.start) as usize).max(1);
    let mut blocks = Vec::with_capacity(change.contributions.len());
    for (i, contribution) in change.contributions.iter().enumerate() {
        if !product(isa, change, contribution, rows, cols, buffers)? {
            return Err(overflowed(&change.name));
        }
        let mut block = std::mem::take(&mut buffers.delta);
        let keep = keeps.get(slice.index as usize).and_then(|keeps| keeps.get(i)).copied().unwrap_or(Keep::All);
        let lay = Lay::of(change, contribution);
        for (row, at) in block.chunks_exact_mut(width).zip(within.clone()) {
            keep.row(row, lay.index(at, cols.start), lay.stride());
        }
        blocks.push(block);
    }
    // In an order of their own, whatever the one is that they were given in.
    let mut order: Vec<usize> = (0..blocks.len()).collect();
    let key = |i: usize| {
        let contribution = &change.contributions[i];
        (mixing.roots.get(contribution.adapter), contribution.scale.to_bits())
    };
    order.sort_by(|x, y| key(*x).cmp(&key(*y)));
    let terms: Vec<(f64, &[f64])> = order.iter().map(|i| (1.0, &blocks[*i][..])).collect();
    buffers.sum.resize(base.len(), 0.0);
    mixing.method.tally.of(&terms, &mut buffers.sum);
    // Where nothing is added, the value keeps the sign of a zero.
    buffers.sum.iter_mut().zip(base).for_each(|(d, w)| *d = if *d == 0.0 { *w } else { w + *d });
    Ok(())
}

/// What is kept of each contribution, for each slice.
fn keeps(isa: Isa, change: &Change<'_>, mixing: &Mixing) -> Result<Arc<Vec<Vec<Keep>>>> {
    let mut cell = change.keeps.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(keeps) = &*cell {
        return Ok(Arc::clone(keeps));
    }
    let (rows, cols) = rows_cols(change);
    let high = change.slice_rows();
    let mut keeps = Vec::new();
    for slice in 0..rows.div_ceil(high) {
        let of = |contribution: &Contribution| {
            let update = Update { isa, change, contribution, rows: slice * high..(slice + 1) * high, cols };
            let root = mixing.roots.get(contribution.adapter).map_or("", String::as_str);
            mixing.method.drops.keep(&update, high * cols, |seed| key(seed, &change.name, slice, root))
        };
        keeps.push(change.contributions.iter().map(of).collect::<Result<_>>()?);
    }
    let keeps = Arc::new(keeps);
    *cell = Some(Arc::clone(&keeps));
    Ok(keeps)
}

/// Where the value at a row and a column of the stored matrix is in the layer's `(out, in)`.
#[derive(Clone, Copy)]
struct Lay {
    is_transposed: bool,
    rows: u64,
    cols: u64,
}

impl Lay {
    fn of(change: &Change<'_>, contribution: &Contribution) -> Lay {
        let is_transposed = matches!(contribution.left, Panel::Transposed(_));
        Lay { is_transposed, rows: change.slice_rows(), cols: rows_cols(change).1 }
    }

    fn index(self, row: u64, col: u64) -> u64 {
        if self.is_transposed { col * self.rows + row } else { row * self.cols + col }
    }

    /// From a value to the next one of its row.
    fn stride(self) -> u64 {
        if self.is_transposed { self.rows } else { 1 }
    }
}

/// One update of one slice, as it is read for what is kept of it: in the order of the layer's `(out, in)`.
struct Update<'u, 'a> {
    isa: Isa,
    change: &'u Change<'a>,
    contribution: &'u Contribution,
    /// Of the slice.
    rows: Range<u64>,
    cols: u64,
}

impl Reading for Update<'_, '_> {
    type Error = Error;

    fn each(&self, step: &mut dyn FnMut(u64, &[f64])) -> Result<()> {
        let mut buffers = Buffers::default();
        let high = self.rows.end - self.rows.start;
        if !Lay::of(self.change, self.contribution).is_transposed {
            let strip = (STRIP / self.cols.max(1)).max(1);
            for start in (0..high).step_by(strip as usize) {
                let rows = self.rows.start + start..self.rows.start + (start + strip).min(high);
                if !product(self.isa, self.change, self.contribution, &rows, &(0..self.cols), &mut buffers)? {
                    return Err(overflowed(&self.change.name));
                }
                step(start * self.cols, &buffers.delta);
            }
            return Ok(());
        }
        let strip = (STRIP / high.max(1)).max(1);
        let mut turned = Vec::new();
        for start in (0..self.cols).step_by(strip as usize) {
            let cols = start..(start + strip).min(self.cols);
            if !product(self.isa, self.change, self.contribution, &self.rows, &cols, &mut buffers)? {
                return Err(overflowed(&self.change.name));
            }
            let width = (cols.end - cols.start) as usize;
            turned.clear();
            turned.extend((0..width).flat_map(|j| buffers.delta.iter().skip(j).step_by(width)).copied());
            step(start * high, &turned);
        }
        Ok(())
    }
}

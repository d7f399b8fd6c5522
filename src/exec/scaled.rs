//! Changes whose sums are multiplied: DoRA, `m / ‖W + ΔW‖ · (W + ΔW)` (Liu et al. 2024, equation 5), and IA3, `l · W` (Liu et al. 2022,
//! section 3.3). In f64 throughout, in the order that section 4.4 of `spec/adapter-model.md` states, and rounded once.

use std::ops::Range;
use std::sync::{Arc, PoisonError};

use super::block::{Ground, Scratch, in_slice, keeps_nonfinite, rows_cols, widened_origin};
use super::load::{block, coordinates, float_of, left, right};
use super::mixed;
use crate::adapter::Factor;
use crate::error::{Error, Result};
use crate::kernel::{Isa, Part, Sums, delta_tile, place};
use crate::plan::{Along, Change, Contribution, Gain, Over};
use crate::rules;

/// Buffers of one thread.
#[derive(Default)]
pub(super) struct Buffers {
    raw: Vec<u8>,
    left: Vec<f64>,
    right: Vec<f64>,
    pub(super) delta: Vec<f64>,
    pub(super) sum: Vec<f64>,
}

/// Bytes of values, in f64, that are read at a time for the norms of columns.
const STRIP: u64 = 1 << 20;

/// Computes a block of a scaled change from its origin, which is in `scratch.wide`.
///
/// # Errors
/// `A-008`, `A-031`, `E-001`, `E-004`.
pub(super) fn compute(
    ground: &dyn Ground,
    isa: Isa,
    change: &Change<'_>,
    rows: &Range<u64>,
    cols: &Range<u64>,
    scratch: &mut Scratch,
    out: &mut [u8],
) -> Result<Sums> {
    let Scratch { wide: base, scaled: buffers, .. } = scratch;
    sums(ground, isa, change, (rows, cols), base, buffers)?;
    let to = float_of(change.info.dtype).unwrap_or_else(|| unreachable!("only plain floats are changed"));
    Ok(place(to, base, &buffers.sum, keeps_nonfinite(ground, change), out))
}

/// The sums of a block of a scaled change that are to be rounded, into `buffers.sum`.
///
/// # Errors
/// As [`compute`].
pub(super) fn sums(
    ground: &dyn Ground,
    isa: Isa,
    change: &Change<'_>,
    (rows, cols): (&Range<u64>, &Range<u64>),
    base: &[f64],
    buffers: &mut Buffers,
) -> Result<()> {
    if let Some(mixing) = &change.mixing {
        return mixed::sums(isa, change, mixing, (rows, cols), base, buffers);
    }
    let width = (cols.end - cols.start) as usize;
    let mut sum = std::mem::take(&mut buffers.sum);
    sum.clear();
    sum.extend_from_slice(base);
    for (i, contribution) in change.contributions.iter().enumerate() {
        product(isa, change, contribution, rows, cols, buffers)?;
        if contribution.rank > 0 {
            sum.iter_mut().zip(&buffers.delta).for_each(|(t, d)| *t += d);
        }
        if let Some(gain) = &contribution.gain {
            let norms = || norms_of_columns(ground, isa, change);
            let by = factors(change, i, gain, (base, &buffers.delta), (rows, cols), norms)?;
            multiply(&mut sum, gain.along, &by, width);
        }
    }
    buffers.sum = sum;
    Ok(())
}

/// A block of what one adapter adds, into `buffers.delta`, with the bits of an unscaled merge. Are all values finite?
///
/// # Errors
/// `A-008`, `E-001`, `E-004`.
pub(super) fn product(
    isa: Isa,
    change: &Change<'_>,
    contribution: &Contribution,
    rows: &Range<u64>,
    cols: &Range<u64>,
    buffers: &mut Buffers,
) -> Result<bool> {
    let (_, total) = rows_cols(change);
    let count = ((rows.end - rows.start) * (cols.end - cols.start)) as usize;
    buffers.delta.clear();
    buffers.delta.resize(count, 0.0);
    let rank = contribution.rank;
    if rank == 0 {
        return Ok(true);
    }
    let Buffers { raw, left: l, right: r, delta, .. } = buffers;
    let (slice, within) = in_slice(change, rows);
    left(&contribution.left, slice, within, rank, raw, l)?;
    right(&contribution.right, slice, cols.clone(), rank, total, raw, r)?;
    let part = Part { left: l, right: r, rank: rank as usize, scale: contribution.scale };
    Ok(delta_tile(isa, (cols.end - cols.start) as usize, &[part], delta))
}

/// What a block is multiplied by, one factor for each of its rows or columns. `base` and `delta` are the block of W and of the update;
/// `norms` gives those of all columns, for every contribution.
///
/// # Errors
/// `A-008`, `E-001`, `E-004`; `A-031` where a norm is zero.
pub(super) fn factors(
    change: &Change<'_>,
    index: usize,
    gain: &Gain,
    (base, delta): (&[f64], &[f64]),
    (rows, cols): (&Range<u64>, &Range<u64>),
    norms: impl FnOnce() -> Result<Arc<Vec<Vec<f64>>>>,
) -> Result<Vec<f64>> {
    let lines = if gain.along == Along::Rows { rows } else { cols };
    let places = match gain.along {
        Along::Rows => 1,
        // Of an input of a convolution, all places of the kernel have one factor.
        Along::Cols => (rows_cols(change).1 / gain.by.info().shape.elements().max(1)).max(1),
    };
    let mut by = vector(&gain.by, lines, places)?;
    if gain.over == Over::One {
        return Ok(by);
    }
    let width = ((cols.end - cols.start) as usize).max(1);
    let all;
    let own: Vec<f64>;
    let norms: &[f64] = match gain.along {
        Along::Rows => {
            let lines = base.chunks_exact(width).zip(delta.chunks_exact(width));
            own = lines.map(|(w, d)| w.iter().zip(d).fold(0.0, |sum, (w, d)| sum + (w + d) * (w + d)).sqrt()).collect();
            &own
        }
        Along::Cols => {
            all = norms()?;
            all.get(index).and_then(|norms| norms.get(cols.start as usize..cols.end as usize)).unwrap_or_default()
        }
    };
    for (i, (m, norm)) in by.iter_mut().zip(norms).enumerate() {
        if !norm.is_finite() {
            let line = |j: usize| if gain.along == Along::Rows { j / width == i } else { j % width == i };
            if let Some(at) = base.iter().enumerate().position(|(j, w)| !w.is_finite() && line(j)) {
                let element = (rows.start + (at / width) as u64) * rows_cols(change).1 + cols.start + (at % width) as u64;
                return Err(nonfinite_base(change, element, base[at]));
            }
        }
        if *norm == 0.0 || !norm.is_finite() {
            return Err(no_norm(change, gain.along, lines.start + i as u64, *norm));
        }
        *m /= norm;
    }
    Ok(by)
}

fn nonfinite_base(change: &Change<'_>, element: u64, value: f64) -> Error {
    let at = coordinates(change.info.shape.dims(), element);
    let message = format!("the base holds {value} in {:?} at {at}, so that its row or column has no norm", change.name);
    Error::new(rules::BASE_FINITE, message)
        .tensor(&change.name)
        .help("the base is damaged; no flag can leave such a value as it is here")
}

fn no_norm(change: &Change<'_>, along: Along, line: u64, norm: f64) -> Error {
    let what = if along == Along::Rows { "row" } else { "column" };
    let message =
        format!("{what} {line} of {:?} has the norm {norm} after the update, so no magnitude can scale it", change.name);
    Error::new(rules::RESULT_FINITE, message).tensor(&change.name).help("this is not the base that the adapter was trained on")
}

/// Multiplies a block of so many columns.
pub(super) fn multiply(block: &mut [f64], along: Along, by: &[f64], width: usize) {
    match along {
        Along::Rows => {
            block.chunks_exact_mut(width.max(1)).zip(by).for_each(|(row, g)| row.iter_mut().for_each(|x| *x *= g));
        }
        Along::Cols => block.chunks_exact_mut(width.max(1)).for_each(|row| row.iter_mut().zip(by).for_each(|(x, g)| *x *= g)),
    }
}

/// Values `lines` of a vector, whatever dimensions of size 1 it has, each so many times.
fn vector(factor: &Factor, lines: &Range<u64>, times: u64) -> Result<Vec<f64>> {
    let (mut raw, mut out) = (Vec::new(), Vec::<f64>::new());
    let own = lines.start / times..lines.end.div_ceil(times);
    block(factor, 0, 0..1, own.clone(), factor.info().shape.elements(), &mut raw, &mut out)?;
    Ok(lines.clone().map(|line| out[(line / times - own.start) as usize]).collect())
}

/// The norms of all columns of W + ΔW, for each contribution of a change that is divided by them; rows ascending. Whoever comes first
/// computes them.
///
/// # Errors
/// `A-008`, `E-001`, `E-004`.
pub(super) fn norms_of_columns(ground: &dyn Ground, isa: Isa, change: &Change<'_>) -> Result<Arc<Vec<Vec<f64>>>> {
    let mut cell = change.norms.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(norms) = &*cell {
        return Ok(Arc::clone(norms));
    }
    let (rows, cols) = rows_cols(change);
    let high = (STRIP / (8 * cols).max(1)).max(1);
    let mut squares = vec![vec![0.0; cols as usize]; change.contributions.len()];
    let (mut scratch, mut buffers) = (Scratch::default(), Buffers::default());
    let mut row = 0;
    while row < rows {
        let strip = row..rows.min(row + high).min((row / change.slice_rows() + 1) * change.slice_rows());
        widened_origin(ground, change, &strip, &(0..cols), &mut scratch)?;
        for (contribution, squares) in change.contributions.iter().zip(&mut squares) {
            product(isa, change, contribution, &strip, &(0..cols), &mut buffers)?;
            let lines = scratch.wide.chunks_exact(cols as usize).zip(buffers.delta.chunks_exact(cols as usize));
            for (w, d) in lines {
                squares.iter_mut().zip(w.iter().zip(d)).for_each(|(sum, (w, d))| *sum += (w + d) * (w + d));
            }
        }
        row = strip.end;
    }
    squares.iter_mut().flatten().for_each(|x| *x = x.sqrt());
    let norms = Arc::new(squares);
    *cell = Some(Arc::clone(&norms));
    Ok(norms)
}

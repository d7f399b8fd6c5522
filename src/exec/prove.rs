//! The proof before a merge in place: that no result will be NaN or infinite. In place there is no way back, so nothing may be found
//! wrong with a value once the first byte is changed. Mostly a bound is enough: |W + Σ s·L·R| ≤ max|W| + Σ |s|·‖L‖·‖R‖ (Cauchy and
//! Schwarz, with Frobenius norms); only where it is not, the window is computed.

use std::hash::Hasher as _;
use twox_hash::xxhash3_64::Hasher;

use super::block::{Ground, compute_block};
use super::budget::threads;
use super::load::{each_value, float_of};
use super::pool::each;
use super::run::{ExecOptions, Progress, interrupted};
use super::window::{Window, compute_window, windows};
use crate::error::Result;
use crate::kernel::{Isa, largest, limit};
use crate::plan::{Change, Origin, Panel};
use crate::tensor::pieces;

/// Proves that all results are finite, and takes the mark of every window's bytes as they are now.
///
/// # Errors
/// The first in the order of the file: `A-008`, `A-030`, `A-031`, `E-001`, `E-004`; `E-006`.
pub(crate) fn prove(
    ground: &dyn Ground,
    changes: &[(usize, &Change<'_>)],
    options: &ExecOptions,
    progress: &dyn Progress,
) -> Result<Vec<u64>> {
    let isa = if options.portable { Isa::Portable } else { Isa::best() };
    let (windows, _) = windows(changes.iter().map(|(_, change)| *change));
    let bounds = each(threads(options, changes.len()), changes.len(), |index, _| bound(changes[index].1))?;
    each(threads(options, windows.len()), windows.len(), |index, scratch| {
        if progress.cancelled() {
            return Err(interrupted());
        }
        let window = &windows[index];
        let (file, change) = changes[window.change];
        let (mark, greatest) = scan(ground, isa, file, change, window)?;
        let safe = float_of(change.info.dtype).is_some_and(|to| greatest + bounds[window.change] < limit(to));
        if !safe || !matches!(change.origin, Origin::Base { .. }) {
            let (_, out) = compute_window(ground, isa, change, window, options.tile_bytes as u64, scratch, compute_block)?;
            scratch.window = out;
        }
        Ok(mark)
    })
}

/// Σ |s|·‖L‖·‖R‖ of a change, a little more than that against rounding.
fn bound(change: &Change<'_>) -> Result<f64> {
    let mut sum = 0.0;
    for contribution in &change.contributions {
        let norms = norm(&contribution.left)? * norm(&contribution.right)?;
        sum += contribution.scale.abs() * norms * (1.0 + 1e-6);
    }
    Ok(sum)
}

fn norm(panel: &Panel) -> Result<f64> {
    let Some(factor) = panel.factor() else { return Ok(1.0) };
    let mut square = 0.0;
    each_value(factor, |values| square += values.iter().map(|x| x * x).sum::<f64>())?;
    Ok(square.sqrt())
}

/// The mark of a window's bytes in the file, and the largest magnitude among them.
fn scan(ground: &dyn Ground, isa: Isa, file: usize, change: &Change<'_>, window: &Window) -> Result<(u64, f64)> {
    let (mut hash, mut greatest) = (Hasher::new(), 0.0f64);
    let float = float_of(change.info.dtype);
    pieces(window.len, |offset, bytes| {
        ground.read(file, window.offset + offset, bytes)?;
        hash.write(bytes);
        greatest = greatest.max(float.map_or(f64::INFINITY, |float| largest(isa, float, bytes)));
        Ok(())
    })?;
    Ok((hash.finish().max(1), greatest))
}

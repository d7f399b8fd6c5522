//! How many threads there are and how much memory their buffers take.

use std::num::NonZeroUsize;

use super::block::is_widened;
use super::quantised::STRIP;
use super::run::ExecOptions;
use super::tasks::{rank, size_of_value, tiles};
use crate::error::{Error, Result};
use crate::io::most_threads;
use crate::kernel::fusion::CANDIDATES;
use crate::plan::{Change, Plan, Quantised, Role};
use crate::rules;

/// Threads beyond this only cost.
const MOST_THREADS: usize = 256;

/// No more threads than work or than files may be open, and never so many that starting them is the work.
pub(super) fn threads(options: &ExecOptions, tasks: usize) -> usize {
    options
        .threads
        .or(std::thread::available_parallelism().ok())
        .map_or(1, NonZeroUsize::get)
        .min(tasks)
        .clamp(1, MOST_THREADS.min(most_threads()))
}

/// What a run needs beside its tiles.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Needs {
    /// Bytes that each thread holds.
    pub(crate) held: u64,
    /// Blocks are whole rows.
    pub(crate) whole_rows: bool,
}

/// Bytes that the buffers of all threads take at most: tile, result, the tile's widened forms if there are any, the panels of the largest
/// change, and what is held.
pub(crate) fn memory(plans: &[&Plan<'_>], options: &ExecOptions, needs: Needs) -> u64 {
    let threads = threads(options, usize::MAX) as u64;
    let tile = options.tile_bytes.max(64) as u64;
    let of = |plan: &Plan<'_>, change: &Change<'_>| {
        let Some((rows, cols)) = tiles(change, rank(change), tile, needs.whole_rows).into_iter().next() else { return 0 };
        let (rows, cols) = (rows.end - rows.start, cols.end - cols.start);
        if let Some(how) = &change.quantised {
            return of_quantised(change, how, rows, cols);
        }
        let panels: u64 = change.contributions.iter().map(|c| 3 * 8 * c.rank * (rows + cols)).sum();
        // As stored, which is 8 bytes at most, and twice as F64.
        let base = if is_widened(plan, change) { 24 } else { size_of_value(change) };
        let base = base + of_scaled(change);
        let held = if change.mixing.is_some() { CANDIDATES } else { 0 };
        rows * cols * (base + size_of_value(change)) + panels + held
    };
    let most = plans.iter().flat_map(|plan| plan.changes().map(|change| of(plan, change))).max();
    threads * (most.unwrap_or(0).max(tile) + needs.held)
}

/// Of each value two codes, W, D and the sum of both, and what a scaled change takes; the panels.
fn of_quantised(change: &Change<'_>, how: &Quantised<'_>, rows: u64, cols: u64) -> u64 {
    let (weight, (rows, cols)) = match &how.role {
        Role::Codes => (change, (rows, cols)),
        Role::Scales(weight) => (&**weight, (rows * how.block.0, cols * how.block.1)),
    };
    let panels: u64 = weight.contributions.iter().map(|c| 3 * 8 * c.rank * (rows + cols)).sum();
    // For the one scale of a weight, a thread reads all of it in strips.
    let strip = if how.is_one() { how.shape.1.max(STRIP / 8).min(how.shape.0 * how.shape.1) } else { 0 };
    let tile = if how.is_one() && change.is_of_scales() { 0 } else { rows * cols };
    (tile + strip) * (3 + 24 + 16 + of_scaled(weight)) + panels
}

/// Bytes for each value of a change whose sums are multiplied, or made by a method of all updates: the sum and an update, and of a method
/// all updates at once.
fn of_scaled(change: &Change<'_>) -> u64 {
    match &change.mixing {
        Some(_) => 8 * (2 + change.contributions.len() as u64),
        None if change.is_scaled() => 16,
        None => 0,
    }
}

/// Tiles are not made smaller than this to save memory: the factors' panels then take more than they do.
const SMALLEST_TILE: usize = 1 << 14;

/// What a thread takes beside its buffers: its stack, most of all.
pub(super) const THREAD: u64 = 2 << 20;

/// The options with tiles and threads that fit into the memory that they allow, and that the process can have.
///
/// # Errors
/// `E-008` if one thread with small tiles takes more.
pub(crate) fn fitted(plans: &[&Plan<'_>], options: &ExecOptions, needs: Needs) -> Result<ExecOptions> {
    let mut fitted = options.clone();
    let limit = options.memory.unwrap_or(u64::MAX);
    loop {
        let needed = memory(plans, &fitted, needs);
        let threads = threads(&fitted, usize::MAX);
        let allowed = needed <= limit;
        if allowed && can_be_had(needed + threads as u64 * THREAD) {
            return Ok(fitted);
        } else if fitted.tile_bytes > SMALLEST_TILE {
            fitted.tile_bytes /= 2;
        } else if threads > 1 {
            fitted.threads = NonZeroUsize::new(threads / 2);
        } else if !allowed {
            let message = format!("the buffers take {needed} bytes at least, and {limit} are allowed");
            return Err(Error::new(rules::MEMORY, message).help("allow more with --memory"));
        } else {
            let message = format!("the buffers take {needed} bytes at least, and the system does not give them");
            return Err(Error::new(rules::MEMORY, message).help("raise the limits on memory (ulimit -d, ulimit -v)"));
        }
    }
}

/// Asks the system. A buffer that cannot be had later would end the process in the middle of its work.
pub(super) fn can_be_had(bytes: u64) -> bool {
    usize::try_from(bytes).is_ok_and(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_ok())
}

//! The plan's files split into tasks of about one tile of bytes, in the order of the files.

use std::ops::Range;

use super::block::rows_cols;
use crate::plan::{Change, CopyRange, Plan};

/// What one task does.
pub(super) enum Work<'p, 'a> {
    Copy(Range<u64>, &'p CopyRange),
    /// Rows and columns of a change; `.1` is its place in the outcome.
    Tile(&'p Change<'a>, usize, Range<u64>, Range<u64>),
}

/// One thread's next piece of work.
pub(super) struct Task<'p, 'a> {
    /// Index of the output file.
    pub(super) file: usize,
    pub(super) work: Work<'p, 'a>,
}

/// All tasks of a plan.
pub(super) fn split<'p, 'a>(plan: &'p Plan<'a>, tile_bytes: usize) -> Vec<Task<'p, 'a>> {
    let tile_bytes = tile_bytes as u64;
    let mut tasks = Vec::new();
    let mut place = 0;
    for (file, shard) in plan.shards.iter().enumerate() {
        for range in &shard.copies {
            let mut at = 0;
            while at < range.len {
                let end = range.len.min(at + tile_bytes);
                tasks.push(Task { file, work: Work::Copy(at..end, range) });
                at = end;
            }
        }
        for change in &shard.changes {
            for (rows, cols) in tiles(change, tile_bytes) {
                tasks.push(Task { file, work: Work::Tile(change, place, rows, cols) });
            }
            place += 1;
        }
    }
    tasks
}

/// Splits a change into blocks.
pub(super) fn tiles(change: &Change<'_>, tile_bytes: u64) -> Vec<(Range<u64>, Range<u64>)> {
    let (rows, cols) = rows_cols(change);
    tiles_within(change, tile_bytes, 0..rows, 0..cols)
}

/// Splits a part of a change into blocks. A right panel may take four tiles' worth of memory, a left one a single one: columns are split
/// only when a row, or its panel, is longer than that.
pub(super) fn tiles_within(
    change: &Change<'_>,
    tile_bytes: u64,
    rows: Range<u64>,
    cols: Range<u64>,
) -> Vec<(Range<u64>, Range<u64>)> {
    let rank: u64 = change.contributions.iter().map(|c| c.rank).sum();
    let size = size_of_value(change);
    let per_value = 8 * rank.max(1);
    let wide = (4 * tile_bytes / per_value).min((4 * tile_bytes / size).max(1)).clamp(1, (cols.end - cols.start).max(1));
    let high = (tile_bytes / (wide * size)).min(tile_bytes / per_value).clamp(1, (rows.end - rows.start).max(1));
    let mut blocks = Vec::new();
    let mut row = rows.start;
    while row < rows.end {
        let row_end = rows.end.min(row + high);
        let mut col = cols.start;
        while col < cols.end {
            let col_end = cols.end.min(col + wide);
            blocks.push((row..row_end, col..col_end));
            col = col_end;
        }
        row = row_end;
    }
    blocks
}

/// Bytes of one value of the result.
pub(super) fn size_of_value(change: &Change<'_>) -> u64 {
    change.info.bytes().checked_div(change.info.shape.elements()).unwrap_or(1).max(1)
}

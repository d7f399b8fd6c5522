//! The output files of one or several plans split into tasks of about one tile of bytes, and the tasks put in order. A batch is what one
//! thread does in one go: mostly one task; all of a tensor where its digest is wanted, which is a hash in the order of the bytes; and
//! where there are several plans, what they compute from the same bytes of the base, which are then read once.

use std::collections::HashMap;
use std::ops::Range;

use super::block::rows_cols;
use super::run::Output;
use crate::checkpoint::Checkpoint;
use crate::plan::{Change, CopyRange, Origin, OutTensor, Plan, Quantised, Role};

/// What one task does.
pub(super) enum Work<'p, 'a> {
    Copy(CopyRange),
    /// Rows and columns of a change; `.1` is its place among those of its file.
    Tile(&'p Change<'a>, usize, Range<u64>, Range<u64>),
}

/// One step of a thread's work.
pub(super) struct Task<'p, 'a> {
    /// Index of the output file.
    pub(super) output: usize,
    pub(super) work: Work<'p, 'a>,
}

impl Task<'_, '_> {
    /// Bytes that it writes.
    pub(super) fn bytes(&self) -> u64 {
        match &self.work {
            Work::Copy(range) => range.len,
            Work::Tile(change, _, rows, cols) => (rows.end - rows.start) * (cols.end - cols.start) * size_of_value(change),
        }
    }
}

/// Tasks that one thread does, one after the other.
pub(super) struct Batch<'p> {
    /// Index of the output file of the first of them.
    pub(super) output: usize,
    pub(super) tasks: Range<usize>,
    /// The tensor that the tasks write, all of it in order, if its digest is wanted.
    pub(super) digest: Option<&'p OutTensor>,
}

/// All work, in the order in which it is begun.
pub(super) struct Schedule<'p, 'a> {
    pub(super) tasks: Vec<Task<'p, 'a>>,
    pub(super) batches: Vec<Batch<'p>>,
}

/// The work on `outputs`, but for those that are done already.
pub(super) fn schedule<'p, 'a>(
    plans: &[&'p Plan<'a>],
    outputs: &[Output<'p, 'a>],
    tile_bytes: usize,
    digests: bool,
) -> Schedule<'p, 'a> {
    let tile_bytes = tile_bytes as u64;
    let ranks = ranks(plans);
    let (mut tasks, mut batches) = (Vec::new(), Vec::new());
    for (index, output) in outputs.iter().enumerate().filter(|(_, output)| output.done.is_none()) {
        let base = plans[output.plan].base;
        let of_change = |place: usize, change: &'p Change<'a>| {
            let rank = ranks.get(change.name.as_str()).copied().unwrap_or(1);
            let blocks = tiles(change, rank, tile_bytes, digests);
            blocks.into_iter().map(move |(rows, cols)| Task { output: index, work: Work::Tile(change, place, rows, cols) })
        };
        if digests {
            by_tensor(index, output, base, tile_bytes, of_change, &mut tasks, &mut batches);
            continue;
        }
        for range in output.shard.copies(base) {
            tasks.extend(parts(range, tile_bytes).map(|part| Task { output: index, work: Work::Copy(part) }));
        }
        for (place, change) in output.shard.changes.iter().enumerate() {
            tasks.extend(of_change(place, change));
        }
    }
    if !digests {
        if plans.len() > 1 {
            tasks.sort_by_key(|task| source(task));
        }
        batches = in_batches(&tasks);
    }
    Schedule { tasks, batches }
}

/// A batch for each tensor of a file.
fn by_tensor<'p, 'a, I: Iterator<Item = Task<'p, 'a>>>(
    index: usize,
    output: &Output<'p, 'a>,
    base: &Checkpoint,
    tile_bytes: u64,
    of_change: impl Fn(usize, &'p Change<'a>) -> I,
    tasks: &mut Vec<Task<'p, 'a>>,
    batches: &mut Vec<Batch<'p>>,
) {
    if let Some(header) = output.shard.header(base) {
        batches.push(Batch { output: index, tasks: tasks.len()..tasks.len() + 1, digest: None });
        tasks.push(Task { output: index, work: Work::Copy(header) });
    }
    let mut changes = output.shard.changes.iter().enumerate();
    for tensor in &output.shard.tensors {
        let first = tasks.len();
        match tensor.copy() {
            Some(range) => tasks.extend(parts(range, tile_bytes).map(|part| Task { output: index, work: Work::Copy(part) })),
            None => tasks.extend(changes.next().into_iter().flat_map(|(place, change)| of_change(place, change))),
        }
        batches.push(Batch { output: index, tasks: first..tasks.len(), digest: Some(tensor) });
    }
}

/// A range in parts of a tile.
fn parts(range: CopyRange, tile_bytes: u64) -> impl Iterator<Item = CopyRange> {
    (0..range.len.div_ceil(tile_bytes)).map(move |i| {
        let at = i * tile_bytes;
        CopyRange { from: range.from + at, to: range.to + at, len: (range.len - at).min(tile_bytes), ..range }
    })
}

/// Tasks that begin with the same bytes of the base are one batch.
fn in_batches<'p>(tasks: &[Task<'p, '_>]) -> Vec<Batch<'p>> {
    let mut batches: Vec<Batch<'p>> = Vec::new();
    for (at, task) in tasks.iter().enumerate() {
        let together = |last: &&mut Batch<'p>| {
            let first = &tasks[last.tasks.start];
            matches!((&first.work, &task.work), (Work::Tile(..), Work::Tile(..)))
                && first.output != task.output
                && source(first) == source(task)
        };
        match batches.last_mut().filter(together) {
            Some(last) => last.tasks.end = at + 1,
            None => batches.push(Batch { output: task.output, tasks: at..at + 1, digest: None }),
        }
    }
    batches
}

/// The file and offset of the base that a task reads from first, and how much.
fn source(task: &Task<'_, '_>) -> (usize, u64, u64) {
    match &task.work {
        Work::Copy(range) => (range.shard, range.from, range.len),
        Work::Tile(change, _, rows, cols) => {
            let (_, total) = rows_cols(change);
            let count = (rows.end - rows.start) * (cols.end - cols.start);
            match &change.origin {
                Origin::Base { shard, begin, info } => {
                    let size = info.bytes().checked_div(info.shape.elements()).unwrap_or(1);
                    (*shard, begin + (rows.start * total + cols.start) * size, count * size)
                }
                Origin::Adapter(_) => (usize::MAX, change.begin, count),
            }
        }
    }
}

/// The largest rank that any of the plans brings to each tensor, so that all of them split it in the same way.
fn ranks<'p>(plans: &[&'p Plan<'_>]) -> HashMap<&'p str, u64> {
    let mut ranks = HashMap::new();
    for change in plans.iter().flat_map(|plan| plan.changes()) {
        let most = ranks.entry(change.name.as_str()).or_insert(1);
        *most = rank(change).max(*most);
    }
    ranks
}

/// Of all adapters together.
pub(super) fn rank(change: &Change<'_>) -> u64 {
    if let Some(Quantised { role: Role::Scales(weight), .. }) = &change.quantised {
        return rank(weight);
    }
    change.contributions.iter().map(|c| c.rank).sum::<u64>().max(1)
}

/// Splits a change into blocks as if it had this rank. With `whole_rows` the blocks are consecutive in the file.
pub(super) fn tiles(change: &Change<'_>, rank: u64, tile_bytes: u64, whole_rows: bool) -> Vec<(Range<u64>, Range<u64>)> {
    if let Some(how) = change.quantised.as_ref().filter(|how| !how.is_one()) {
        return tiles_of_blocks(change, how, rank, tile_bytes, whole_rows);
    }
    let (rows, cols) = rows_cols(change);
    let widest = if whole_rows && rows > 1 { cols } else { least(change) };
    split(change, rank, tile_bytes, widest, 0..rows, 0..cols)
}

/// Splits the codes of a weight where its blocks end, as many side by side as a tile has values in f64, and its scales likewise.
fn tiles_of_blocks(
    change: &Change<'_>,
    how: &Quantised<'_>,
    rank: u64,
    tile_bytes: u64,
    whole_rows: bool,
) -> Vec<(Range<u64>, Range<u64>)> {
    let (rows, cols) = rows_cols(change);
    let ((high, wide), weight) = match &how.role {
        Role::Codes => (how.block, change),
        Role::Scales(weight) => ((1, 1), &**weight),
    };
    let values = tile_bytes / 8;
    let beside = (values / (how.block.0 * how.block.1)).min(4 * values / (rank * how.block.1)).max(1);
    let wide = if whole_rows || weight.needs_whole_rows() { cols } else { beside * wide };
    let lines = (0..rows.div_ceil(high)).map(|i| i * high..rows.min((i + 1) * high));
    let parts = |rows: Range<u64>| (0..cols.div_ceil(wide)).map(move |j| (rows.clone(), j * wide..cols.min((j + 1) * wide)));
    lines.flat_map(parts).collect()
}

/// Splits a part of a change into blocks.
pub(super) fn tiles_within(
    change: &Change<'_>,
    tile_bytes: u64,
    rows: Range<u64>,
    cols: Range<u64>,
) -> Vec<(Range<u64>, Range<u64>)> {
    split(change, rank(change), tile_bytes, least(change), rows, cols)
}

/// Columns that a block has at least.
fn least(change: &Change<'_>) -> u64 {
    if change.needs_whole_rows() { rows_cols(change).1 } else { 1 }
}

/// A right panel may take four tiles' worth of memory, a left one a single one: columns are split only when a row, or its panel, is longer
/// than that, and no block is narrower than `least` columns.
fn split(
    change: &Change<'_>,
    rank: u64,
    tile_bytes: u64,
    least: u64,
    rows: Range<u64>,
    cols: Range<u64>,
) -> Vec<(Range<u64>, Range<u64>)> {
    let per_value = 8 * rank;
    // Codes are computed in f64.
    let size = if change.quantised.is_some() { 8 } else { size_of_value(change) };
    let wide =
        (4 * tile_bytes / per_value).min((4 * tile_bytes / size).max(1)).max(least).clamp(1, (cols.end - cols.start).max(1));
    let high = (tile_bytes / (wide * size)).min(tile_bytes / per_value).clamp(1, (rows.end - rows.start).max(1));
    let mut blocks = Vec::new();
    let mut row = rows.start;
    while row < rows.end {
        let slice_end = (row / change.slice_rows() + 1) * change.slice_rows();
        let row_end = rows.end.min(row + high).min(slice_end);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Contribution, Keeps, Norms, Origin, Panel};
    use crate::tensor::{Dtype, Shape, TensorInfo};

    fn update(dims: [u64; 2], rank: u64) -> Change<'static> {
        let info = TensorInfo { dtype: Dtype::BF16, shape: Shape::new(dims.to_vec()).unwrap() };
        let (left, right) = (Panel::One, Panel::One);
        let contributions = vec![Contribution {
            adapter: 0,
            tensors: Vec::new(),
            left,
            right,
            rank,
            scale: 1.0,
            lead: 1,
            gain: None,
            rounded_apart: false,
        }];
        let origin = Origin::Base { shard: 0, begin: 0, info: info.clone() };
        let (name, patches, norms, keeps) = ("w".to_owned(), Vec::new(), Norms::default(), Keeps::default());
        let (begin, added, mixing, quantised) = (0, false, None, None);
        Change { name, info, begin, origin, contributions, added, patches, norms, mixing, keeps, quantised }
    }

    /// R11 of the catalogue: nothing is counted in 32 bits, and a block is small whichever side is long.
    #[test]
    fn a_row_and_a_column_of_2_31_values_are_split_into_small_blocks() {
        let long = 1 << 31;
        for (dims, rank) in [([1, long], 1), ([long, 1], 1), ([1, long], 256), ([long, 1], 256), ([3, long / 2], 8)] {
            let blocks = tiles(&update(dims, rank), rank, 1 << 20, false);
            let values: u64 = blocks.iter().map(|(rows, cols)| (rows.end - rows.start) * (cols.end - cols.start)).sum();
            assert_eq!(values, dims[0] * dims[1]);
            for (rows, cols) in blocks {
                let (rows, cols) = (rows.end - rows.start, cols.end - cols.start);
                assert!(2 * rows * cols <= 4 << 20 && 8 * rank * (rows + cols) <= 6 << 20, "{dims:?} {rank}: {rows} x {cols}");
            }
        }
    }
}

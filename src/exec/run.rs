//! The executor: the plan's files split into tasks of about one tile of bytes, done on all cores. Every output byte is computed by
//! one task from its own inputs, so the bytes depend neither on the number of threads nor on the size of the tiles.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::load::{coordinates, float_of, left, nonfinite, right};
use crate::error::{Error, Result};
use crate::io::{disk, write_error};
use crate::kernel::{Float, Isa, Part, Sums, Tile, update_tile};
use crate::plan::{Change, Contribution, CopyRange, Head, Origin, OutShard, Plan};
use crate::rules;

/// How a plan is carried out. Nothing here changes a byte of the result.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExecOptions {
    /// Threads. Default: one per core.
    pub threads: Option<NonZeroUsize>,
    /// Bytes of weights in one tile. Default 1 MiB, about one core's second-level cache.
    pub tile_bytes: usize,
    /// Use the portable kernels even where the machine has better ones. Default false.
    pub portable: bool,
}

impl Default for ExecOptions {
    fn default() -> Self {
        ExecOptions { threads: None, tile_bytes: 1 << 20, portable: false }
    }
}

/// Watches a run, and may stop it. Called from all threads.
pub trait Progress: Sync {
    /// So many more bytes of output are written.
    fn advance(&self, bytes: u64) {
        let _ = bytes;
    }

    /// True if the run should stop; what was written is then removed.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Watches nothing.
impl Progress for () {}

/// Threads beyond this only cost.
const MOST_THREADS: usize = 256;

/// What a run found out, by the order of [`Plan::changes`].
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) sums: Vec<Sums>,
}

enum Work<'p, 'a> {
    Copy(Range<u64>, &'p CopyRange),
    /// Rows and columns of a change; `.1` is its place in the outcome.
    Tile(&'p Change<'a>, usize, Range<u64>, Range<u64>),
}

struct Task<'p, 'a> {
    file: usize,
    work: Work<'p, 'a>,
}

/// An open output file.
struct Output<'p, 'a> {
    shard: &'p OutShard<'a>,
    file: File,
    /// Its name in messages.
    path: PathBuf,
}

/// Buffers of one thread, reused from task to task.
#[derive(Default)]
struct Scratch {
    base: Vec<u8>,
    wide: Vec<f64>,
    out: Vec<u8>,
    raw: Vec<u8>,
    panels: Vec<(Vec<f64>, Vec<f64>)>,
}

/// Writes the weights of every output shard into files that `create` makes; the path that it gives is the file's name in messages.
///
/// # Errors
/// The first by the order of the plan: `E-001`, `E-002`, `E-004`, `E-006`, `A-008`, `A-030`, `A-031`.
pub(crate) fn run(
    plan: &Plan<'_>,
    options: &ExecOptions,
    progress: &dyn Progress,
    mut create: impl FnMut(&str) -> Result<(File, PathBuf)>,
) -> Result<Outcome> {
    let mut outputs = Vec::new();
    for shard in &plan.shards {
        let (file, path) = create(&shard.file_name)?;
        prepare(&file, shard).map_err(|e| write_error(&path, e))?;
        outputs.push(Output { shard, file, path });
    }
    let tasks = split(plan, options.tile_bytes.max(64));
    let isa = if options.portable { Isa::Portable } else { Isa::best() };
    let failed = AtomicUsize::new(usize::MAX);
    let one = |scratch: &mut Scratch, (index, task): (usize, &Task<'_, '_>)| {
        if index > failed.load(Ordering::Relaxed) {
            return Ok(Sums::default());
        }
        let done =
            if progress.cancelled() { Err(interrupted()) } else { outputs[task.file].carry_out(plan, isa, &task.work, scratch) };
        match done {
            Ok((sums, bytes)) => {
                progress.advance(bytes);
                Ok(sums)
            }
            Err(error) => {
                failed.fetch_min(index, Ordering::Relaxed);
                Err(error)
            }
        }
    };
    // No more threads than work, and never so many that starting them is the work.
    let threads = options.threads.map_or(0, |n| n.get().min(tasks.len()).min(MOST_THREADS));
    // Where threads cannot be had, the work is done on this one: the bytes are the same.
    let results: Vec<Result<Sums>> = match rayon::ThreadPoolBuilder::new().num_threads(threads).build() {
        Ok(pool) => pool.install(|| tasks.par_iter().enumerate().map_init(Scratch::default, one).collect()),
        Err(_) => {
            let mut scratch = Scratch::default();
            tasks.iter().enumerate().map(|task| one(&mut scratch, task)).collect()
        }
    };
    let mut sums = vec![Sums::default(); plan.changes().count()];
    for (task, result) in tasks.iter().zip(results) {
        let found = result?;
        if let Work::Tile(_, place, ..) = task.work {
            sums[place].add(&found);
        }
    }
    Ok(Outcome { sums })
}

/// Bytes that the buffers of all threads take at most: tile, result, its widened form, and the panels of the largest change.
pub(crate) fn memory(plan: &Plan<'_>, options: &ExecOptions) -> u64 {
    let threads = options.threads.map_or_else(rayon::current_num_threads, NonZeroUsize::get) as u64;
    let tile = options.tile_bytes.max(64) as u64;
    let of = |change: &Change<'_>| {
        let Some((rows, cols)) = tiles(change, tile).into_iter().next() else { return 0 };
        let (rows, cols) = (rows.end - rows.start, cols.end - cols.start);
        let panels: u64 = change.contributions.iter().map(|c| 3 * 8 * c.rank * (rows + cols)).sum();
        let size = change.info.bytes().checked_div(change.info.shape.elements()).unwrap_or(1);
        rows * cols * (2 * size + 8) + panels
    };
    threads * plan.changes().map(of).max().unwrap_or(0).max(tile)
}

/// The error of work that [`Progress::cancelled`] ended.
pub(crate) fn interrupted() -> Error {
    Error::new(rules::INTERRUPTED, "interrupted; nothing was published").help("run the command again")
}

/// Reserves the file's space, so that a full disk is known before anything is computed, and writes a new header.
fn prepare(file: &File, shard: &OutShard<'_>) -> std::io::Result<()> {
    disk::allocate(file, shard.len)?;
    match &shard.head {
        Head::Kept => Ok(()),
        Head::New(bytes) => disk::write_at(file, bytes, 0),
    }
}

/// Rows and columns of a change as the kernels see it: vectors and plain copies are one long row.
pub(super) fn rows_cols(change: &Change<'_>) -> (u64, u64) {
    match change.info.shape.matrix() {
        Some(matrix) if !change.contributions.is_empty() => matrix,
        _ => (1, change.info.shape.elements()),
    }
}

fn split<'p, 'a>(plan: &'p Plan<'a>, tile_bytes: usize) -> Vec<Task<'p, 'a>> {
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

/// Splits a change into blocks. A right panel may take four tiles' worth of memory, a left one a single one: columns are split
/// only when a row, or its panel, is longer than that.
fn tiles(change: &Change<'_>, tile_bytes: u64) -> Vec<(Range<u64>, Range<u64>)> {
    let (rows, cols) = rows_cols(change);
    let rank: u64 = change.contributions.iter().map(|c| c.rank).sum();
    let size = change.info.bytes().checked_div(change.info.shape.elements()).unwrap_or(1).max(1);
    let per_value = 8 * rank.max(1);
    let wide = (4 * tile_bytes / per_value).min((4 * tile_bytes / size).max(1)).clamp(1, cols.max(1));
    let high = (tile_bytes / (wide * size)).min(tile_bytes / per_value).clamp(1, rows.max(1));
    let mut blocks = Vec::new();
    let mut row = 0;
    while row < rows {
        let row_end = rows.min(row + high);
        let mut col = 0;
        while col < cols {
            let col_end = cols.min(col + wide);
            blocks.push((row..row_end, col..col_end));
            col = col_end;
        }
        row = row_end;
    }
    blocks
}

impl Output<'_, '_> {
    /// Does one task; returns its sums and how many bytes it wrote.
    fn carry_out(&self, plan: &Plan<'_>, isa: Isa, work: &Work<'_, '_>, scratch: &mut Scratch) -> Result<(Sums, u64)> {
        match work {
            Work::Copy(part, range) => {
                let len = part.end - part.start;
                scratch.base.resize(len as usize, 0);
                plan.base.shards()[self.shard.shard].file.read_bytes(range.from + part.start, &mut scratch.base)?;
                self.write(&scratch.base, range.to + part.start)?;
                Ok((Sums::default(), len))
            }
            Work::Tile(change, _, rows, cols) => {
                let sums = compute_block(plan, isa, change, rows.clone(), cols.clone(), scratch)?;
                let (_, total) = rows_cols(change);
                let size = scratch.out.len() as u64 / ((rows.end - rows.start) * (cols.end - cols.start)).max(1);
                let width = ((cols.end - cols.start) * size) as usize;
                if cols.end - cols.start == total {
                    self.write(&scratch.out, change.begin + rows.start * total * size)?;
                } else {
                    for (row, bytes) in rows.clone().zip(scratch.out.chunks_exact(width.max(1))) {
                        self.write(bytes, change.begin + (row * total + cols.start) * size)?;
                    }
                }
                Ok((sums, scratch.out.len() as u64))
            }
        }
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        disk::write_at(&self.file, bytes, at).map_err(|e| write_error(&self.path, e).offset(at))
    }
}

/// The whole result of one change, in memory, for programs that want a single tensor.
pub(crate) fn compute(plan: &Plan<'_>, change: &Change<'_>, options: &ExecOptions) -> Result<(Vec<u8>, Sums)> {
    let (rows, cols) = rows_cols(change);
    let isa = if options.portable { Isa::Portable } else { Isa::best() };
    let mut scratch = Scratch::default();
    let (mut bytes, mut sums) = (Vec::new(), Sums::default());
    let rank: u64 = change.contributions.iter().map(|c| c.rank).sum();
    let high = (options.tile_bytes as u64 / (8 * cols.max(rank).max(1))).max(1);
    let mut row = 0;
    while row < rows {
        let end = rows.min(row + high);
        sums.add(&compute_block(plan, isa, change, row..end, 0..cols, &mut scratch)?);
        bytes.extend_from_slice(&scratch.out);
        row = end;
    }
    Ok((bytes, sums))
}

/// Computes one block into `scratch.out`.
fn compute_block(
    plan: &Plan<'_>,
    isa: Isa,
    change: &Change<'_>,
    rows: Range<u64>,
    cols: Range<u64>,
    scratch: &mut Scratch,
) -> Result<Sums> {
    let (_, total) = rows_cols(change);
    let count = ((rows.end - rows.start) * (cols.end - cols.start)) as usize;
    let to = float_of(change.info.dtype).unwrap_or_else(|| unreachable!("only plain floats are changed"));
    let stored = read_origin(plan, change, &rows, &cols, total, scratch)?;
    let from = if stored == to { to } else { Float::F64 };
    if from != stored {
        scratch.wide.clear();
        scratch.wide.resize(count, 0.0);
        stored.widen(&scratch.base, &mut scratch.wide);
        scratch.base.resize(count * 8, 0);
        Float::F64.narrow(&scratch.wide, &mut scratch.base);
    }
    scratch.panels.resize_with(change.contributions.len().max(scratch.panels.len()), Default::default);
    for (contribution, (l, r)) in change.contributions.iter().zip(&mut scratch.panels) {
        left(&contribution.left, rows.clone(), contribution.rank, &mut scratch.raw, l)?;
        right(&contribution.right, cols.clone(), contribution.rank, total, &mut scratch.raw, r)?;
    }
    let parts: Vec<Part<'_>> = change
        .contributions
        .iter()
        .zip(scratch.panels.iter().map(|p| (&p.0, &p.1)))
        .map(|(c, (l, r))| part_of(c, l, r))
        .collect();
    scratch.out.resize(count * to.size(), 0);
    let mut tile = Tile {
        from,
        to,
        base: &scratch.base,
        out: &mut scratch.out,
        cols: (cols.end - cols.start) as usize,
        keep_nonfinite: plan.keep_nonfinite && matches!(change.origin, Origin::Base { .. }),
    };
    let sums = update_tile(isa, &mut tile, &parts);
    if sums.nonfinite > 0 {
        return Err(first_nonfinite(plan, change, from, to, rows, cols, total, scratch));
    }
    Ok(sums)
}

fn part_of<'s>(contribution: &Contribution<'_>, left: &'s [f64], right: &'s [f64]) -> Part<'s> {
    Part { left, right, rank: contribution.rank as usize, scale: contribution.scale }
}

/// Reads a block of the values that the change starts from into `scratch.base`, as stored.
fn read_origin(
    plan: &Plan<'_>,
    change: &Change<'_>,
    rows: &Range<u64>,
    cols: &Range<u64>,
    total: u64,
    scratch: &mut Scratch,
) -> Result<Float> {
    let info = match &change.origin {
        Origin::Base { info, .. } => info,
        Origin::Adapter(factor) => factor.info(),
    };
    let float = float_of(info.dtype).unwrap_or_else(|| unreachable!("only plain floats are changed"));
    let size = float.size() as u64;
    let width = cols.end - cols.start;
    let read = |element: u64, buf: &mut [u8]| match &change.origin {
        Origin::Base { shard, begin, .. } => plan.base.shards()[*shard].file.read_bytes(begin + element * size, buf),
        Origin::Adapter(factor) => factor.read(element * size, buf),
    };
    scratch.base.resize(((rows.end - rows.start) * width * size) as usize, 0);
    if width == total {
        read(rows.start * total, &mut scratch.base)?;
    } else {
        for (row, buf) in rows.clone().zip(scratch.base.chunks_exact_mut((width * size).max(1) as usize)) {
            read(row * total + cols.start, buf)?;
        }
    }
    Ok(float)
}

/// Finds the first value of a block that is not finite and says whose fault it is.
#[expect(clippy::too_many_arguments, reason = "the cold path of compute_block, with its whole state")]
fn first_nonfinite(
    plan: &Plan<'_>,
    change: &Change<'_>,
    from: Float,
    to: Float,
    rows: Range<u64>,
    cols: Range<u64>,
    total: u64,
    scratch: &Scratch,
) -> Error {
    let width = (cols.end - cols.start) as usize;
    let (mut base, mut out) = (vec![0.0; scratch.out.len() / to.size()], vec![0.0; scratch.out.len() / to.size()]);
    from.widen(&scratch.base, &mut base);
    to.widen(&scratch.out, &mut out);
    let at = out
        .iter()
        .zip(&base)
        .position(|(m, w)| {
            !m.is_finite() && (w.is_finite() || !plan.keep_nonfinite || matches!(change.origin, Origin::Adapter(_)))
        })
        .unwrap_or(0);
    let element = (rows.start + (at / width.max(1)) as u64) * total + cols.start + (at % width.max(1)) as u64;
    let coordinates = coordinates(change.info.shape.dims(), element);
    let dtype = change.info.dtype;
    if base[at].is_finite() {
        let message =
            format!("the merged value of {:?} at {coordinates} overflows {dtype} (base value {:e})", change.name, base[at]);
        return Error::new(rules::RESULT_FINITE, message)
            .file(plan.base.path())
            .tensor(&change.name)
            .help("merge into a base of a wider dtype");
    }
    match &change.origin {
        Origin::Adapter(factor) => nonfinite(factor, element, base[at]),
        Origin::Base { .. } => {
            let message = format!("the base holds {} in {:?} at {coordinates}", base[at], change.name);
            Error::new(rules::BASE_FINITE, message)
                .file(plan.base.path())
                .tensor(&change.name)
                .help("the base is damaged; to leave such values as they are, pass --allow-nonfinite-base")
        }
    }
}

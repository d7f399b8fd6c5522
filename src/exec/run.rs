//! The executor: the plan's files split into tasks of about one tile of bytes, done on all cores. Every output byte is computed by
//! one task from its own inputs, so the bytes depend neither on the number of threads nor on the size of the tiles.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::block::{Scratch, compute_block, rows_cols};
use crate::error::{Error, Result};
use crate::io::{Durability, disk, write_error};
use crate::kernel::{Isa, Sums};
use crate::plan::{Change, CopyRange, Head, OutShard, Plan};
use crate::rules;

/// How a plan is carried out. Nothing here changes a byte of the result.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExecOptions {
    /// Threads. Default: one per core.
    pub threads: Option<NonZeroUsize>,
    /// Bytes of weights in one tile. Default 1 MiB, about one core's second-level cache.
    pub tile_bytes: usize,
    /// Bytes that the buffers of all threads may take. Tiles, and then threads, are made fewer to fit. Default: no limit.
    pub memory: Option<u64>,
    /// Use the portable kernels even where the machine has better ones. Default false.
    pub portable: bool,
}

impl Default for ExecOptions {
    fn default() -> Self {
        ExecOptions { threads: None, tile_bytes: 1 << 20, memory: None, portable: false }
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

/// Writes the weights of every output shard into files that `create` makes; the path that it gives is the file's name in messages.
///
/// # Errors
/// The first by the order of the plan: `E-001`, `E-002`, `E-004`, `E-006`, `A-008`, `A-030`, `A-031`.
pub(crate) fn run(
    plan: &Plan<'_>,
    options: &ExecOptions,
    durability: Durability,
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
    let crew = Crew {
        plan,
        isa,
        outputs: &outputs,
        tasks: &tasks,
        progress,
        next: AtomicUsize::new(0),
        failed: AtomicUsize::new(usize::MAX),
        written: AtomicU64::new(0),
        at_work: AtomicUsize::new(1),
    };
    let mut results = crew.run(threads(options, tasks.len()), durability)?;
    results.sort_by_key(|(index, _)| *index);
    let mut sums = vec![Sums::default(); plan.changes().count()];
    for (index, result) in results {
        let found = result?;
        if let Work::Tile(_, place, ..) = tasks[index].work {
            sums[place].add(&found);
        }
    }
    Ok(Outcome { sums })
}

/// No more threads than work, and never so many that starting them is the work.
fn threads(options: &ExecOptions, tasks: usize) -> usize {
    options.threads.or(std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get).min(tasks).clamp(1, MOST_THREADS)
}

/// Bytes that may wait for the disk before it is asked to start on them.
const FLUSH: u64 = 128 << 20;

/// The threads that carry out the tasks, in order, so that files are finished one after the other.
struct Crew<'c, 'p, 'a> {
    plan: &'p Plan<'a>,
    isa: Isa,
    outputs: &'c [Output<'p, 'a>],
    tasks: &'c [Task<'p, 'a>],
    progress: &'c dyn Progress,
    next: AtomicUsize,
    /// The first task that failed; later ones are not begun.
    failed: AtomicUsize,
    written: AtomicU64,
    /// Threads that still take tasks.
    at_work: AtomicUsize,
}

type Results = Vec<(usize, Result<Sums>)>;

impl Crew<'_, '_, '_> {
    /// Does all tasks on `threads` threads, this one included. Where threads cannot be had, fewer do: the bytes are the same.
    ///
    /// # Errors
    /// `E-002` if what was written cannot be forced to disk.
    fn run(&self, threads: usize, durability: Durability) -> Result<Results> {
        std::thread::scope(|scope| {
            let flusher = (durability == Durability::Synced && self.plan.bytes() > FLUSH)
                .then(|| std::thread::Builder::new().spawn_scoped(scope, || self.flush()).ok())
                .flatten();
            let mut others = Vec::new();
            for _ in 1..threads {
                self.at_work.fetch_add(1, Ordering::SeqCst);
                match std::thread::Builder::new().spawn_scoped(scope, || self.work()) {
                    Ok(handle) => others.push(handle),
                    Err(_) => {
                        self.at_work.fetch_sub(1, Ordering::SeqCst);
                        break;
                    }
                }
            }
            let mut results = self.work();
            for handle in others {
                results.extend(handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            if let Some(flusher) = flusher {
                flusher.thread().unpark();
                flusher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
            Ok(results)
        })
    }

    fn work(&self) -> Results {
        let _leave = Leave(&self.at_work);
        let (mut scratch, mut results) = (Scratch::default(), Vec::new());
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(task) = self.tasks.get(index).filter(|_| index < self.failed.load(Ordering::Relaxed)) else {
                return results;
            };
            let done = if self.progress.cancelled() {
                Err(interrupted())
            } else {
                self.outputs[task.file].carry_out(self.plan, self.isa, &task.work, &mut scratch)
            };
            match done {
                Ok((sums, bytes)) => {
                    self.written.fetch_add(bytes, Ordering::Relaxed);
                    self.progress.advance(bytes);
                    results.push((index, Ok(sums)));
                }
                Err(error) => {
                    self.failed.fetch_min(index, Ordering::Relaxed);
                    results.push((index, Err(error)));
                }
            }
        }
    }

    /// Keeps the disk busy while the others compute, so that little is left to force to it at the end. An error here is final: the
    /// system tells it once (`fsync(2)`), and the later call would succeed.
    fn flush(&self) -> Result<()> {
        let mut flushed = 0;
        while self.at_work.load(Ordering::SeqCst) > 0 {
            let written = self.written.load(Ordering::Relaxed);
            if written < flushed + FLUSH {
                std::thread::park_timeout(std::time::Duration::from_millis(10));
                continue;
            }
            for output in self.outputs {
                disk::sync(&output.file).map_err(|e| write_error(&output.path, e))?;
            }
            flushed = written;
        }
        Ok(())
    }
}

/// Counts a thread out, however it ends.
struct Leave<'c>(&'c AtomicUsize);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Bytes that the buffers of all threads take at most: tile, result, its widened form, and the panels of the largest change.
pub(crate) fn memory(plan: &Plan<'_>, options: &ExecOptions) -> u64 {
    let threads = threads(options, usize::MAX) as u64;
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

/// Tiles are not made smaller than this to save memory: the factors' panels then take more than they do.
const SMALLEST_TILE: usize = 1 << 14;

/// The options with tiles and threads that fit into the memory that they allow.
///
/// # Errors
/// `E-008` if one thread with small tiles takes more.
pub(crate) fn fitted(plan: &Plan<'_>, options: &ExecOptions) -> Result<ExecOptions> {
    let mut fitted = options.clone();
    let Some(limit) = options.memory else { return Ok(fitted) };
    loop {
        let needed = memory(plan, &fitted);
        let threads = threads(&fitted, usize::MAX);
        if needed <= limit {
            return Ok(fitted);
        } else if fitted.tile_bytes > SMALLEST_TILE {
            fitted.tile_bytes /= 2;
        } else if threads > 1 {
            fitted.threads = NonZeroUsize::new(threads / 2);
        } else {
            let message = format!("the buffers take {needed} bytes at least, and {limit} are allowed");
            return Err(Error::new(rules::MEMORY, message).help("allow more with --memory"));
        }
    }
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
                let source = &plan.base.shards()[self.shard.shard].file;
                let (from, to) = (range.from + part.start, range.to + part.start);
                if !source.copy_bytes(from, &self.file, to, len)? {
                    scratch.base.resize(len as usize, 0);
                    source.read_bytes(from, &mut scratch.base)?;
                    self.write(&scratch.base, to)?;
                }
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

//! The threads that carry out the tasks of a plan. Every output byte is computed by one task from its own inputs, so the bytes depend
//! neither on the number of threads nor on which of them did what.

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::block::{Scratch, compute_block, rows_cols};
use super::run::{Progress, interrupted};
use super::tasks::{Task, Work};
use crate::error::Result;
use crate::io::{Durability, disk, write_error};
use crate::kernel::{Isa, Sums};
use crate::plan::{OutShard, Plan};

/// An open output file.
pub(super) struct Output<'p, 'a> {
    pub(super) shard: &'p OutShard<'a>,
    pub(super) file: File,
    /// Its name in messages.
    pub(super) path: PathBuf,
}

/// Bytes that may wait for the disk before it is asked to start on them.
const FLUSH: u64 = 128 << 20;

/// The threads that carry out the tasks, in order, so that files are finished one after the other.
pub(super) struct Crew<'c, 'p, 'a> {
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

/// Results of tasks with the tasks' places, in no order.
type Results = Vec<(usize, Result<Sums>)>;

impl<'c, 'p, 'a> Crew<'c, 'p, 'a> {
    /// A crew that has not begun.
    pub(super) fn new(
        plan: &'p Plan<'a>,
        isa: Isa,
        outputs: &'c [Output<'p, 'a>],
        tasks: &'c [Task<'p, 'a>],
        progress: &'c dyn Progress,
    ) -> Self {
        let (next, failed) = (AtomicUsize::new(0), AtomicUsize::new(usize::MAX));
        Crew { plan, isa, outputs, tasks, progress, next, failed, written: AtomicU64::new(0), at_work: AtomicUsize::new(1) }
    }

    /// Does all tasks on `threads` threads, this one included. Where threads cannot be had, fewer do: the bytes are the same.
    ///
    /// # Errors
    /// `E-002` if what was written cannot be forced to disk.
    pub(super) fn run(&self, threads: usize, durability: Durability) -> Result<Results> {
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

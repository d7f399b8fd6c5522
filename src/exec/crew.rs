//! Carries out the tasks of a plan. Every output byte is computed by one task from its own inputs, so the bytes depend neither on the
//! number of threads nor on which of them did what.

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::block::{Scratch, compute_block, rows_cols};
use super::pool::each;
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

/// What the threads share.
pub(super) struct Crew<'c, 'p, 'a> {
    pub(super) plan: &'p Plan<'a>,
    pub(super) isa: Isa,
    pub(super) outputs: &'c [Output<'p, 'a>],
    pub(super) tasks: &'c [Task<'p, 'a>],
    pub(super) progress: &'c dyn Progress,
}

impl Crew<'_, '_, '_> {
    /// Does all tasks, in order, so that files are finished one after the other; gives what each found.
    ///
    /// # Errors
    /// The first by the order of the tasks; `E-002` if what was written cannot be forced to disk.
    pub(super) fn run(&self, threads: usize, durability: Durability) -> Result<Vec<Sums>> {
        let (written, done) = (AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let flusher = (durability == Durability::Synced && self.plan.bytes() > FLUSH)
                .then(|| std::thread::Builder::new().spawn_scoped(scope, || self.flush(&written, &done)).ok())
                .flatten();
            let end = End(&done);
            let results = each(threads, self.tasks.len(), |index, scratch| {
                if self.progress.cancelled() {
                    return Err(interrupted());
                }
                let task = &self.tasks[index];
                let (sums, bytes) = self.outputs[task.file].carry_out(self.plan, self.isa, &task.work, scratch)?;
                written.fetch_add(bytes, Ordering::Relaxed);
                self.progress.advance(bytes);
                Ok(sums)
            });
            drop(end);
            if let Some(flusher) = flusher {
                flusher.thread().unpark();
                flusher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
            results
        })
    }

    /// Keeps the disk busy while the others compute, so that little is left to force to it at the end. An error here is final: the
    /// system tells it once (`fsync(2)`), and the later call would succeed.
    fn flush(&self, written: &AtomicU64, done: &AtomicBool) -> Result<()> {
        let mut flushed = 0;
        while !done.load(Ordering::SeqCst) {
            let written = written.load(Ordering::Relaxed);
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

/// Says that the work is at its end, however it ends.
struct End<'c>(&'c AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
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

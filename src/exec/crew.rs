//! Carries out a schedule. Every output byte is computed by one task from its own inputs, so the bytes depend neither on the number of
//! threads nor on which of them did what.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use super::block::{Scratch, compute_block, rows_cols};
use super::pool::{each_in_lanes, lanes};
use super::run::{Finished, Ledger, Output, Progress, interrupted};
use super::tasks::{Batch, Schedule, Task, Work, size_of_value};
use crate::error::Result;
use crate::io::{Durability, TensorHash, disk, tensor_digest, write_error};
use crate::kernel::{Isa, Sums};
use crate::plan::Plan;

/// Bytes that may wait for the disk before it is asked to start on them.
pub(super) const FLUSH: u64 = 128 << 20;

/// What the threads share.
pub(super) struct Crew<'c, 'p, 'a> {
    pub(super) plans: &'c [&'p Plan<'a>],
    pub(super) isa: Isa,
    pub(super) outputs: &'c [Output<'p, 'a>],
    pub(super) schedule: &'c Schedule<'p, 'a>,
    pub(super) progress: &'c dyn Progress,
    /// Is told of files that are finished and on disk.
    pub(super) ledger: Option<&'c dyn Ledger>,
    pub(super) found: Found,
}

/// What the tasks found out.
pub(super) struct Found {
    /// By task.
    sums: Vec<OnceLock<Sums>>,
    /// By batch.
    digests: Vec<OnceLock<String>>,
    /// The tasks of each output.
    tasks: Vec<Vec<usize>>,
    /// How many of them are left to do.
    left: Vec<AtomicUsize>,
}

impl Found {
    pub(super) fn new(outputs: &[Output<'_, '_>], schedule: &Schedule<'_, '_>) -> Found {
        let mut tasks = vec![Vec::new(); outputs.len()];
        schedule.tasks.iter().enumerate().for_each(|(at, task)| tasks[task.output].push(at));
        let left = tasks.iter().map(|tasks| AtomicUsize::new(tasks.len())).collect();
        Found {
            sums: schedule.tasks.iter().map(|_| OnceLock::new()).collect(),
            digests: schedule.batches.iter().map(|_| OnceLock::new()).collect(),
            tasks,
            left,
        }
    }
}

impl Crew<'_, '_, '_> {
    /// Does all work, a file for each thread, so that files are finished one after the other.
    ///
    /// # Errors
    /// The first by the order of the schedule; `E-002` if what was written cannot be forced to disk.
    pub(super) fn run(&self, threads: usize, durability: Durability) -> Result<()> {
        let (written, done, failed) = (AtomicU64::new(0), AtomicBool::new(false), AtomicBool::new(false));
        let bytes = self.outputs.iter().map(|output| output.shard.len).fold(0, u64::saturating_add);
        let flushes = durability == Durability::Synced && bytes > FLUSH;
        std::thread::scope(|scope| {
            let flusher = flushes
                .then(|| std::thread::Builder::new().spawn_scoped(scope, || self.flush(&written, &done, &failed)).ok())
                .flatten();
            let end = End(&done);
            let results = each_in_lanes(threads, &self.lanes(), |index, scratch| {
                // The flusher has the error to report.
                if self.progress.cancelled() || failed.load(Ordering::Relaxed) {
                    return Err(interrupted());
                }
                let bytes = self.batch(index, &self.schedule.batches[index], scratch)?;
                written.fetch_add(bytes, Ordering::Relaxed);
                self.progress.advance(bytes);
                Ok(())
            });
            drop(end);
            if let Some(flusher) = flusher {
                flusher.thread().unpark();
                flusher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
            results.map(drop)
        })
    }

    /// A lane for each output; one for all, where the outputs are those of several plans and are written together.
    fn lanes(&self) -> Vec<Range<usize>> {
        let one = self.plans.len() > 1;
        lanes(self.schedule.batches.iter().map(|batch| if one { 0 } else { batch.output }))
    }

    /// Keeps the disk busy while the others compute, so that little is left to force to it at the end. An error here is final: the
    /// system tells it once (`fsync(2)`), and the later call would succeed.
    fn flush(&self, written: &AtomicU64, done: &AtomicBool, failed: &AtomicBool) -> Result<()> {
        let mut flushed = 0;
        while !done.load(Ordering::SeqCst) {
            let written = written.load(Ordering::Relaxed);
            if written < flushed + FLUSH {
                std::thread::park_timeout(std::time::Duration::from_millis(10));
                continue;
            }
            let flush = self.outputs.iter().try_for_each(Output::sync);
            flush.inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
            flushed = written;
        }
        Ok(())
    }

    /// A file is complete: once it is on disk, the ledger gets to know it.
    fn tell(&self, index: usize) -> Result<()> {
        let (Some(ledger), output) = (self.ledger, &self.outputs[index]) else { return Ok(()) };
        output.sync()?;
        // What was computed from a base that has changed is not to be kept.
        self.plans[output.plan].unchanged()?;
        ledger.finished(index, &self.finished(index))
    }

    /// What was found out while output number `index` was written.
    pub(super) fn finished(&self, index: usize) -> Finished {
        let output = &self.outputs[index];
        if let Some(done) = &output.done {
            return done.clone();
        }
        let mut finished = Finished { sums: vec![Sums::default(); output.shard.changes.len()], digests: BTreeMap::new() };
        for &at in &self.found.tasks[index] {
            if let (Work::Tile(_, place, ..), Some(sums)) = (&self.schedule.tasks[at].work, self.found.sums[at].get()) {
                finished.sums[*place].add(sums);
            }
        }
        let batches = self.schedule.batches.iter().zip(&self.found.digests).filter(|(batch, _)| batch.output == index);
        for (batch, digest) in batches {
            // A tensor without values has no task.
            let digest = digest.get().cloned();
            if let Some(tensor) = batch.digest {
                finished.digests.insert(tensor.name.clone(), digest.unwrap_or_else(|| tensor_digest(&tensor.info).finish()));
            }
        }
        finished
    }

    /// Does one batch; returns how many bytes it wrote.
    fn batch(&self, index: usize, batch: &Batch<'_>, scratch: &mut Scratch) -> Result<u64> {
        let mut hash = batch.digest.map(|tensor| tensor_digest(&tensor.info));
        scratch.share(batch.tasks.len() > 1 && hash.is_none());
        let mut written = 0;
        for at in batch.tasks.clone() {
            let (sums, bytes) = self.task(&self.schedule.tasks[at], scratch, hash.as_mut())?;
            _ = self.found.sums[at].set(sums);
            written += bytes;
        }
        if let Some(hash) = hash {
            _ = self.found.digests[index].set(hash.finish());
        }
        for at in batch.tasks.clone() {
            let output = self.schedule.tasks[at].output;
            // Acquires what the other threads have found out of this file.
            if self.found.left[output].fetch_sub(1, Ordering::AcqRel) == 1 {
                self.tell(output)?;
            }
        }
        Ok(written)
    }

    /// Does one task; returns its sums and how many bytes it wrote, which `hash` takes in.
    fn task(&self, task: &Task<'_, '_>, scratch: &mut Scratch, hash: Option<&mut TensorHash>) -> Result<(Sums, u64)> {
        let output = &self.outputs[task.output];
        let plan = self.plans[output.plan];
        match &task.work {
            Work::Copy(range) => {
                let source = &plan.base.shards()[range.shard].file;
                let copy = || {
                    let copied = output.file.with(|file| Ok(source.copy_bytes(range.from, file, range.to, range.len)));
                    copied.map_err(|e| write_error(&output.path, e).offset(range.to))?
                };
                if hash.is_some() || !copy()? {
                    let bytes = scratch.buffer(range.len as usize);
                    source.read_bytes(range.from, bytes)?;
                    if let Some(hash) = hash {
                        hash.update(bytes);
                    }
                    output.write(bytes, range.to)?;
                }
                Ok((Sums::default(), range.len))
            }
            Work::Tile(change, _, rows, cols) => {
                let (_, total) = rows_cols(change);
                let (size, width) = (size_of_value(change), cols.end - cols.start);
                let mut out = std::mem::take(&mut scratch.out);
                out.resize(((rows.end - rows.start) * width * size) as usize, 0);
                let sums = compute_block(plan, self.isa, change, rows.clone(), cols.clone(), scratch, &mut out)?;
                if let Some(hash) = hash {
                    hash.update(&out);
                }
                if width == total {
                    output.write(&out, change.begin + rows.start * total * size)?;
                } else {
                    for (row, bytes) in rows.clone().zip(out.chunks_exact((width * size).max(1) as usize)) {
                        output.write(bytes, change.begin + (row * total + cols.start) * size)?;
                    }
                }
                let written = out.len() as u64;
                scratch.out = out;
                Ok((sums, written))
            }
        }
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
    /// Forces what was written to disk.
    ///
    /// # Errors
    /// `E-002`, and then again for good.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync().map_err(|e| write_error(&self.path, e))
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.file.with(|file| disk::write_at(file, bytes, at)).map_err(|e| write_error(&self.path, e).offset(at))
    }
}

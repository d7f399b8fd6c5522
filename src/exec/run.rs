//! From plans to files: reserve their space, carry out the work on all cores, add up what was found.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use super::budget::threads;
use super::crew::{Crew, Found};
use super::tasks::{Task, schedule};
use crate::error::{Error, Result};
use crate::io::{Durability, Kept, disk, write_error};
use crate::kernel::{Isa, Sums};
use crate::plan::{Head, OutShard, Plan};
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
    /// So many bytes will be written in all; told once, before the first of them.
    fn expect(&self, bytes: u64) {
        let _ = bytes;
    }

    /// So many more bytes of output are written.
    fn advance(&self, bytes: u64) {
        let _ = bytes;
    }

    /// A part of the work is done, and this is what came of it, for somebody who watches.
    fn tell(&self, what: &str) {
        let _ = what;
    }

    /// True if the run should stop; what was written is then removed.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Watches nothing.
impl Progress for () {}

/// What was found out while one file was written.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Finished {
    /// By its changes.
    pub(crate) sums: Vec<Sums>,
    /// Digests of its tensors by name, if they are wanted.
    pub(crate) digests: BTreeMap<String, String>,
}

/// Is told, while a run goes on, of every output that is complete and on disk.
pub(crate) trait Ledger: Sync {
    /// # Errors
    /// `E-002` if it cannot be written down.
    fn finished(&self, output: usize, finished: &Finished) -> Result<()>;
}

/// An output file of one of the plans.
pub(crate) struct Output<'p, 'a> {
    /// Index of the plan.
    pub(crate) plan: usize,
    pub(crate) shard: &'p OutShard<'a>,
    pub(crate) file: Kept,
    /// Its name in messages.
    pub(crate) path: PathBuf,
    /// An earlier run has completed it, and found this.
    pub(crate) done: Option<Finished>,
}

/// What a run found out, by the order of [`Plan::changes`].
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) sums: Vec<Sums>,
    /// Digests of all tensors by name, if they are wanted.
    pub(crate) digests: BTreeMap<String, String>,
}

/// What becomes of the files of a run.
#[derive(Clone, Copy)]
pub(crate) struct Keeping<'k> {
    pub(crate) durability: Durability,
    /// Compute the digest of every tensor on the way.
    pub(crate) digests: bool,
    pub(crate) ledger: Option<&'k dyn Ledger>,
}

/// Writes the weights of all outputs, which are empty files unless they are done. One outcome for each plan.
///
/// # Errors
/// The first by the order of the work: `E-001`, `E-002`, `E-004`, `E-006`, `A-008`, `A-030`, `A-031`.
pub(crate) fn run<'p, 'a>(
    plans: &[&'p Plan<'a>],
    outputs: &[Output<'p, 'a>],
    options: &ExecOptions,
    keeping: Keeping<'_>,
    progress: &dyn Progress,
) -> Result<Vec<Outcome>> {
    for output in outputs.iter().filter(|output| output.done.is_none()) {
        output.file.with(|file| prepare(file, output.shard)).map_err(|e| write_error(&output.path, e))?;
    }
    let schedule = schedule(plans, outputs, options.tile_bytes.max(64), keeping.digests);
    progress.expect(schedule.tasks.iter().map(Task::bytes).sum());
    let isa = if options.portable { Isa::Portable } else { Isa::best() };
    let found = Found::new(outputs, &schedule);
    let crew = Crew { plans, isa, outputs, schedule: &schedule, progress, ledger: keeping.ledger, found };
    crew.run(threads(options, schedule.batches.len()), keeping.durability)?;
    if keeping.durability == Durability::Synced {
        // While the descriptors are open that have seen every error: one that is opened later may not hear of it.
        outputs.iter().try_for_each(Output::sync)?;
    }
    let mut outcomes: Vec<Outcome> = plans.iter().map(|_| Outcome { sums: Vec::new(), digests: BTreeMap::new() }).collect();
    for (index, output) in outputs.iter().enumerate() {
        let finished = crew.finished(index);
        let outcome = &mut outcomes[output.plan];
        outcome.sums.extend(finished.sums);
        outcome.digests.extend(finished.digests);
    }
    Ok(outcomes)
}

/// The error of work that [`Progress::cancelled`] ended.
pub(crate) fn interrupted() -> Error {
    Error::new(rules::INTERRUPTED, "interrupted; nothing was published").help("run the command again")
}

/// Reserves the file's space, so that a full disk is known before anything is computed, and writes a new header.
fn prepare(file: &std::fs::File, shard: &OutShard<'_>) -> std::io::Result<()> {
    disk::allocate(file, shard.len)?;
    match &shard.head {
        Head::Kept(_) => Ok(()),
        Head::New(bytes) => disk::write_at(file, bytes, 0),
    }
}
